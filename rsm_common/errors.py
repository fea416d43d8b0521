"""Every error that a user can see, in one tree, and how each one travels over gRPC.

RsmError
├── UsageError                  wrong command line or call
│   ├── ConfigError             settings that are out of range or contradict each other
│   ├── UnsupportedEnvError     an environment that is unknown, cannot be created or is not Box-to-Box
│   ├── MissingExtraError       an optional dependency that is not installed
│   └── AddressError            an address that cannot be bound
├── EnvFaultError               an environment that fails, or breaks its own spaces
├── TrainingError               a run that cannot continue
├── CheckpointError             a training checkpoint that is missing, damaged or foreign
│   └── DamagedCheckpointError  a file of a checkpoint is missing or not the one that was written
├── BundleError                 a policy bundle that is missing, damaged or foreign
│   └── ParityError             a graph that does not act like the policy it came from
└── RequestError                one act request failed
    ├── InvalidRequestError     wrong name, dtype, shape, byte count, NaN or Inf
    ├── PolicyNotFoundError     no such policy or version
    ├── NotReadyError           loading, draining, or no server at that address
    ├── UnauthenticatedError    the token or certificate was not accepted
    ├── PermissionDeniedError   the token does not allow the call
    ├── QueueFullError          the server is overloaded and refused the request
    │   └── LimitReachedError   too many requests a second of one client, or too many streams
    ├── DeadlineExpiredError    too late to be worth computing
    ├── SupersededError         a newer request of the same client took its place
    ├── RequestCancelledError   the caller cancelled the request
    ├── NotOfferedError         the server does not have the method, or has it switched off
    ├── RepositoryError         a policy could not be loaded or unloaded; what was loaded stays
    └── BackendError            the inference backend failed

A message is one sentence: what was expected, what was received and what to do.
"""

from __future__ import annotations

from dataclasses import dataclass


class RsmError(Exception):
    """Base of all errors of the toolkit."""


class UsageError(RsmError):
    """The command line or the call itself is wrong."""


class ConfigError(UsageError):
    """A setting is out of range, or two settings contradict each other."""


class UnsupportedEnvError(UsageError):
    """The environment is unknown, cannot be created, or its spaces are not flat boxes."""


class MissingExtraError(UsageError):
    """An optional dependency is not installed."""


class AddressError(UsageError):
    """The server cannot listen on the address."""


class EnvFaultError(RsmError):
    """An environment raised an exception, or returned values that its spaces or Gymnasium do not allow."""


class TrainingError(RsmError):
    """A training run cannot continue."""


class CheckpointError(RsmError):
    """A training checkpoint is missing, damaged or of another layout."""


class DamagedCheckpointError(CheckpointError):
    """A file of a training checkpoint is missing, or it is not the one that was written."""


class BundleError(RsmError):
    """A policy bundle is missing, damaged or of another schema."""


class ParityError(BundleError):
    """An exported graph does not give the actions of the policy it was made from."""


class RequestError(RsmError):
    """A request to a policy failed; the connection and the policy are unaffected.

    In a stream, a request that fails is answered with an error of the same name, and the stream continues.
    """


class InvalidRequestError(RequestError):
    """The policy does not accept the request.

    A name, a dtype, a shape, a byte count or the seeds are wrong; a value is NaN or Inf; there are more rows
    than --max-batch-size; or the message is not one of the protocol.
    """


class PolicyNotFoundError(RequestError):
    """The server has no such policy, or no such version of it."""


class NotReadyError(RequestError):
    """The policy cannot answer now, or no server answers at the address.

    The server or the version is loading or draining, or it failed to load. gRPC itself reports the same
    status if no server listens.
    """


class UnauthenticatedError(RequestError):
    """The token or certificate was not accepted.

    The token is missing, unknown or no longer valid, or a certificate is not trusted.
    """


class PermissionDeniedError(RequestError):
    """The token does not allow the call.

    The token is for acting, and the call needs an admin token.
    """


class QueueFullError(RequestError):
    """The server has too much work and refused the request.

    --max-queue-rows rows wait already. The error says when to try again.

    Args:
        message: the sentence.
        retry_after_s: seconds until the waiting rows are expected to be answered; None if unknown.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LimitReachedError(QueueFullError):
    """A limit of the server is reached: --max-rate of one client, or --max-streams of all clients.

    A remote caller gets QueueFullError, because the gRPC status and the remedy are the same.
    """


class DeadlineExpiredError(RequestError):
    """The deadline passed before an action was computed.

    A request that expires in the queue is not computed.
    """


class SupersededError(RequestError):
    """A newer request of the same client replaced this one in the queue (--latest-wins)."""


class RequestCancelledError(RequestError):
    """The caller cancelled the request.

    If the request was still in the queue, it is not computed. gRPC itself reports the same status if more than
    10,000 calls wait to be read; a client then raises NotReadyError.
    """


class NotOfferedError(RequestError):
    """The server does not offer the method, or has it switched off."""


class RepositoryError(RequestError):
    """A policy could not be loaded or unloaded; the versions that were loaded stay loaded."""


class BackendError(RequestError):
    """The policy could not be evaluated.

    The graph failed, or its action was not finite or out of bounds, and no fallback was configured
    (--fallback). Details are only in the server's log.
    """


@dataclass(frozen=True)
class WireStatus:
    """How an error type appears to a remote caller.

    `code` is the name of a `grpc.StatusCode`. `public` replaces the message where the message could
    reveal internals; None sends the message itself.
    """

    code: str
    public: str | None = None


# The one table of error type -> gRPC status -> public sentence, by exact type. Of two types with one status,
# a client raises the first.
WIRE_STATUS: dict[type[RequestError], WireStatus] = {
    InvalidRequestError: WireStatus("INVALID_ARGUMENT"),
    PolicyNotFoundError: WireStatus("NOT_FOUND"),
    NotReadyError: WireStatus("UNAVAILABLE"),
    UnauthenticatedError: WireStatus("UNAUTHENTICATED"),
    PermissionDeniedError: WireStatus("PERMISSION_DENIED"),
    QueueFullError: WireStatus("RESOURCE_EXHAUSTED"),
    LimitReachedError: WireStatus("RESOURCE_EXHAUSTED"),
    DeadlineExpiredError: WireStatus("DEADLINE_EXCEEDED"),
    SupersededError: WireStatus("ABORTED"),
    RequestCancelledError: WireStatus("CANCELLED"),
    NotOfferedError: WireStatus("UNIMPLEMENTED"),
    RepositoryError: WireStatus("FAILED_PRECONDITION"),
    BackendError: WireStatus("INTERNAL", "The server failed while computing the action. See the server's log."),
}


MAX_SENTENCE = 600
"""Characters that travel. A sentence repeats what a caller sent, and gRPC refuses a status of more than 8 KiB,
of which one character may take 12 bytes: instead of our sentence the caller would read RESOURCE_EXHAUSTED."""


def wire_status(error: BaseException) -> tuple[str, str]:
    """(gRPC status name, sentence for the caller) of any exception.

    An exception that is not a RequestError is a fault of the server and is reported like a BackendError.
    """
    status = WIRE_STATUS.get(type(error)) if isinstance(error, RequestError) else None
    status = status or WIRE_STATUS[BackendError]
    sentence = status.public or str(error)
    return status.code, sentence if len(sentence) <= MAX_SENTENCE else sentence[: MAX_SENTENCE - 1] + "…"


def retry_after_ms(error: BaseException) -> int | None:
    """The hint that travels with an error: when to try again, whole milliseconds from 1."""
    if not isinstance(error, QueueFullError) or error.retry_after_s is None:
        return None
    return max(1, round(1e3 * error.retry_after_s))


def error_from_status(code: str, message: str, retry_ms: int | None = None) -> RequestError:
    """The exception that a client raises for a gRPC status name; the inverse of `wire_status`.

    Args:
        code: name of the status.
        message: the server's sentence.
        retry_ms: see `retry_after_ms`.
    """
    if code == WIRE_STATUS[QueueFullError].code:
        return QueueFullError(message, None if retry_ms is None else retry_ms / 1e3)
    for kind, status in WIRE_STATUS.items():
        if status.code == code:
            return kind(message)
    return RequestError(f"{code}: {message}")
