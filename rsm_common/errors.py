"""The exceptions of the toolkit in one tree, and the gRPC status of each one.

RsmError
├── UsageError                  wrong command line or call
│   ├── ConfigError             a setting out of range, or two settings that contradict each other
│   ├── UnsupportedEnvError     an environment that is unknown, cannot be created or is not Box-to-Box
│   ├── MissingExtraError       an optional dependency that is not installed
│   └── AddressError            an address that the server cannot listen on
├── EnvFaultError               an environment that fails while it runs
├── TrainingError               a run that cannot continue
├── CheckpointError             a training checkpoint that cannot be used
│   └── DamagedCheckpointError  a file of a checkpoint that is missing or damaged
├── BundleError                 a policy bundle that is missing, damaged or of another schema version
│   └── ParityError             a graph whose actions differ from those of the torch policy
└── RequestError                a request that failed
    ├── InvalidRequestError     wrong name, dtype, shape, byte count, NaN or Inf
    ├── PolicyNotFoundError     no such policy or version
    ├── NotReadyError           loading, draining, or no server at the address
    ├── UnauthenticatedError    a token or a certificate that was not accepted
    ├── PermissionDeniedError   a token that does not allow the call
    ├── QueueFullError          an overloaded server that refused the request
    │   └── LimitReachedError   a limit on the requests a second or on the streams
    ├── DeadlineExpiredError    a deadline that passed
    ├── SupersededError         a newer request of the same client replaced this one
    ├── RequestCancelledError   the caller cancelled the request
    ├── NotOfferedError         a method that the server does not have, or that is switched off
    ├── RepositoryError         a policy that could not be loaded or unloaded
    └── BackendError            a policy that could not compute an action

A message is one sentence. It names the expected value, the received value and the remedy.
"""

from __future__ import annotations

from dataclasses import dataclass


class RsmError(Exception):
    """Base class of all errors of the toolkit."""


class UsageError(RsmError):
    """A command or a function got arguments that it cannot use.

    For example, an option needs a GPU and this machine has none.
    """


class ConfigError(UsageError):
    """A setting is out of range, or two settings contradict each other."""


class UnsupportedEnvError(UsageError):
    """The environment cannot be used.

    The id is unknown, the constructor failed, or the observation or action space is not a flat `Box`.
    """


class MissingExtraError(UsageError):
    """An optional dependency is not installed.

    The message names the missing package or library.
    """


class AddressError(UsageError):
    """The server cannot listen on the address.

    The address is malformed, or another program uses it. Without TLS, the server refuses an address that other
    machines can reach, unless `--insecure` is set.
    """


class EnvFaultError(RsmError):
    """The environment failed while it ran.

    It raised an exception, its process died, or it returned an invalid value. Invalid values are,
    for example, a reward of NaN and an observation of the wrong shape.
    """


class TrainingError(RsmError):
    """The training run cannot continue.

    For example, a loss is NaN, the environment failed, or the disk is full. The last checkpoint is intact.
    """


class CheckpointError(RsmError):
    """A training checkpoint cannot be used.

    It is missing or damaged, it has the format of another version, or it has no training state for `--resume`.
    """


class DamagedCheckpointError(CheckpointError):
    """A file of a training checkpoint is missing or damaged.

    The message names the file or the array. `rsm-train --resume` continues from the newest undamaged
    checkpoint.
    """


class BundleError(RsmError):
    """A policy bundle is missing or damaged, or it has another schema version."""


class ParityError(BundleError):
    """The exported graph and the torch policy give different actions."""


class RequestError(RsmError):
    """A request to a policy failed.

    Other requests are not affected. In a stream, the server answers the failed request with an `error`, and the
    stream stays open.
    """


class InvalidRequestError(RequestError):
    """The request is not valid.

    The message names the reason:

    - a name, a dtype, a shape, a byte count or a seed is wrong;
    - a value is NaN or Inf;
    - the request has more rows than `--max-batch-size`;
    - the bytes are not a message of the protocol, or the message is too large.
    """


class PolicyNotFoundError(RequestError):
    """The server does not have the policy or the version."""


class NotReadyError(RequestError):
    """The policy cannot answer now, or no server answers at the address.

    The server or the version is loading or draining, or the version failed to load. A draining server finishes
    its open requests and accepts no new ones. gRPC reports the same status if no server listens at the address.
    """


class UnauthenticatedError(RequestError):
    """The token or the certificate was not accepted.

    The token is missing, unknown or no longer valid, or the certificate is not trusted.
    """


class PermissionDeniedError(RequestError):
    """The token does not allow the call.

    The call needs an admin token. The given token allows requests for actions only.
    """


class QueueFullError(RequestError):
    """The server is overloaded and refused the request.

    The queue of the policy already holds `--max-queue-rows` rows.

    Args:
        message: text of the error.
        retry_after_s: seconds to wait before the next try; None if unknown.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LimitReachedError(QueueFullError):
    """The server refused a request or a stream because a limit was reached.

    `--max-rate` limits how many requests one client may send per second. `--max-streams` limits the number of
    open streams of all clients together. A Python client raises QueueFullError instead, because
    LimitReachedError has the same gRPC status.
    """


class DeadlineExpiredError(RequestError):
    """The deadline passed before the action was computed.

    If the deadline passes while the request is in the queue, the server does not compute the request.
    """


class SupersededError(RequestError):
    """A newer request of the same client replaced this request in the queue (`--latest-wins`)."""


class RequestCancelledError(RequestError):
    """The caller cancelled the request.

    If the request is still in the queue, the server does not compute it. gRPC also reports CANCELLED if more
    than 10,000 calls wait for the server. In that case the Python client raises NotReadyError.
    """


class NotOfferedError(RequestError):
    """The server does not have the method, or the method is switched off."""


class RepositoryError(RequestError):
    """A policy could not be loaded or unloaded.

    The versions that were loaded before stay loaded.
    """


class BackendError(RequestError):
    """The policy could not compute an action.

    The graph failed, or the action contained NaN or Inf, or the action was out of bounds. The server raises
    this error only if the option `--fallback` is not set. The details are only in the server's log.
    """


@dataclass(frozen=True)
class WireStatus:
    """How an error type appears to a remote caller.

    `code` is the name of a `grpc.StatusCode`. `public` replaces a message that could reveal internals; None
    sends the message itself.
    """

    code: str
    public: str | None = None


# Error type -> gRPC status and public sentence, by exact type. A client raises the first type of a status.
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
"""Most characters of a message that the server sends.

gRPC replaces a status of more than 8 KiB by RESOURCE_EXHAUSTED. One character takes up to 12 bytes there, and a
message can repeat a long name from the request."""


def wire_status(error: BaseException) -> tuple[str, str]:
    """(gRPC status name, sentence for the caller) of any exception.

    An exception that is not a RequestError is a fault of the server and is reported like a BackendError.
    """
    status = WIRE_STATUS.get(type(error)) if isinstance(error, RequestError) else None
    status = status or WIRE_STATUS[BackendError]
    sentence = status.public or str(error)
    return status.code, sentence if len(sentence) <= MAX_SENTENCE else sentence[: MAX_SENTENCE - 1] + "…"


def retry_after_ms(error: BaseException) -> int | None:
    """The `retry-after-ms` of an error: whole milliseconds, at least 1; None if the error has none."""
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
