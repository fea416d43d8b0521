"""How a request ended: the one event that everything which counts, traces or records requests reads."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rsm_common.errors import (
    BackendError,
    DeadlineExpiredError,
    InvalidRequestError,
    LimitReachedError,
    NotReadyError,
    PermissionDeniedError,
    PolicyNotFoundError,
    QueueFullError,
    RequestCancelledError,
    SupersededError,
    UnauthenticatedError,
    wire_status,
)

if TYPE_CHECKING:
    from rsm_common.policy import ActResult, ActRows

Answer = TypeVar("Answer")

REASONS: dict[type[BaseException], str] = {
    InvalidRequestError: "invalid",
    PolicyNotFoundError: "unknown_policy",
    NotReadyError: "not_ready",
    UnauthenticatedError: "unauthenticated",
    PermissionDeniedError: "forbidden",
    QueueFullError: "queue_full",
    LimitReachedError: "limit",
    DeadlineExpiredError: "expired",
    RequestCancelledError: "cancelled",
    SupersededError: "superseded",
    BackendError: "backend",
}
"""A short name for each type of error; "fault" stands for every other type. The set is fixed, because the name
becomes a label of a metric."""

OK = "OK"
GIVEN_UP = ("cancelled", "late")
"""The reasons of requests whose callers left before the answer."""

LATE_SLACK_S = 0.01
"""A caller gives up at its deadline by its own clock, which may be this much before the deadline by ours."""


@dataclass(frozen=True)
class Answered(Generic[Answer]):
    """An answer, and how long its request waited in the queue."""

    answer: Answer
    queue_us: float


@dataclass(slots=True, eq=False)
class Settled:
    """One request and how it ended. Made once, in the event loop; read by several; never changed."""

    service: str
    """Full name, such as "rsm.v1.PolicyService"."""
    method: str
    """Name of the call, such as "Act" or "ModelInfer"."""
    policy: str
    """Name of the policy; the name that was asked for if no policy was found."""
    version: str
    """Version of the policy; the version that was asked for if no policy was found."""
    client_id: str
    """Empty if the request has none."""
    arrived_unix_ns: int
    """When the request arrived, nanoseconds since 1970, UTC."""
    seconds: float
    """From the arrival to the end."""
    code: str
    """Name of the gRPC status."""
    reason: str
    """Of `REASONS`, "late" (the caller's deadline passed) or, for OK, ""."""
    rows: ActRows | None = None
    """The validated request; None if it was refused before it was queued."""
    sampled: Answered[ActResult] | None = None
    """What the policy computed; None if it computed nothing or failed."""
    given: Answered[ActResult] | None = None
    """What the caller got: `sampled`, or what the action guard made of it; None if the request failed."""
    metadata: Iterable[tuple[str, Any]] = ()
    """Of the call, if the intake keeps it."""


def status(error: BaseException) -> tuple[str, str]:
    """Return (name of the gRPC status, reason) of an error."""
    return wire_status(error)[0], REASONS.get(type(error), "fault")


def outcome(done: asyncio.Future[Any], seconds: float, timeout_s: float | None) -> tuple[str, str]:
    """Return (name of the gRPC status, reason) of a future that is done.

    Args:
        done: the future of an answer.
        seconds: from the arrival of the request.
        timeout_s: how long the caller waits at most; None for no limit.
    """
    if done.cancelled():
        late = timeout_s is not None and seconds > timeout_s - LATE_SLACK_S
        return ("DEADLINE_EXCEEDED", "late") if late else ("CANCELLED", "cancelled")
    error = done.exception()
    return (OK, "") if error is None else status(error)
