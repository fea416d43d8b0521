"""What the server tells about itself: two protocols that lanes and services call, and the one place that does.

Nothing here knows of gRPC, Prometheus or arrays. Where there is None for an observer, nothing is observed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

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
"""A short name per error type; a fixed set, because it becomes a label. "fault" is whatever is not listed."""

OK = "OK"

LATE_SLACK_S = 0.01
"""A caller that gives up at its deadline does so by its own clock, a little before the deadline by ours."""


class LaneObserver(Protocol):
    """Hears of one version of one policy."""

    def request(
        self, method: str, code: str, reason: str, rows: int, seconds: float, queue_s: float | None
    ) -> None:
        """A request was answered, refused or given up; in the event loop.

        Args:
            method: of the call, such as "Act" or "ModelInfer".
            code: name of the gRPC status.
            reason: of `REASONS`, "late" (the caller's deadline) or, for OK, "".
            rows: as asked for; 0 where the request was refused.
            seconds: from its arrival.
            queue_s: how long it waited; None if it was not computed.
        """
        ...

    def executed(self, rows: int, seconds: float, unsound: int) -> None:
        """A batch was computed; in the worker thread.

        Args:
            rows: of the batch.
            seconds: of stacking, noise and the graph.
            unsound: requests refused because an action or value was not finite or out of bounds.
        """
        ...

    def execution_failed(self) -> None:
        """A batch failed as a whole; in the worker thread."""
        ...

    def adjusted(self, *, limited_rows: int, fallback: bool) -> None:
        """The action guard changed an answer; in the event loop.

        Args:
            limited_rows: actions that were clipped towards the ones before.
            fallback: the policy failed, and something else was given out.
        """
        ...

    def closed(self) -> None:
        """The version was unloaded; in the event loop."""
        ...


class Observer(Protocol):
    """Hears of a server; everything but `loaded`, which any thread may call, in the event loop."""

    def lane(self, policy: str, version: str, runtime: str, queued_rows: Callable[[], int]) -> LaneObserver:
        """A version was published; the observer of it. `queued_rows` says how many rows wait."""
        ...

    def refused(self, method: str, code: str, reason: str) -> None:
        """A request named no policy that is here, or was not looked at."""
        ...

    def loaded(self, policy: str, seconds: float, *, failed: bool) -> None:
        """A bundle was loaded, or was not."""
        ...

    def streams(self, change: int) -> None:
        """+1: a stream was opened, -1: closed."""
        ...


def watch(
    future: asyncio.Future[Any],
    observer: LaneObserver | None,
    method: str,
    *,
    rows: int,
    started_s: float,
    timeout_s: float | None = None,
) -> None:
    """Tell the observer how a queued request ends.

    Args:
        future: as `Lane.submit` gives it.
        observer: of the lane.
        method: see `LaneObserver.request`.
        rows: of the request.
        started_s: `time.perf_counter()` at its arrival.
        timeout_s: what the caller allowed, from then.
    """
    if observer is None:
        return

    def settled(done: asyncio.Future[Any]) -> None:
        seconds = time.perf_counter() - started_s
        code, reason = outcome(done, seconds, timeout_s)
        queue_s = 1e-6 * done.result().queue_us if code == OK else None
        observer.request(method, code, reason, rows, seconds, queue_s)

    future.add_done_callback(settled)


def outcome(done: asyncio.Future[Any], seconds: float, timeout_s: float | None) -> tuple[str, str]:
    """(name of the gRPC status, reason) of a settled request; see `LaneObserver.request`.

    Args:
        done: as `Lane.submit` gives it, settled.
        seconds: from its arrival.
        timeout_s: what the caller allowed, from then.
    """
    if done.cancelled():
        late = timeout_s is not None and seconds > timeout_s - LATE_SLACK_S
        return ("DEADLINE_EXCEEDED", "late") if late else ("CANCELLED", "cancelled")
    error = done.exception()
    return (OK, "") if error is None else status(error)


def refuse(
    observer: Observer | None,
    lane: LaneObserver | None,
    method: str,
    error: Exception,
    *,
    started_s: float,
) -> None:
    """Tell of a request that was refused before it was queued; `lane` is None if it named none that is here."""
    if lane is not None:
        lane.request(method, *status(error), 0, time.perf_counter() - started_s, None)
    elif observer is not None:
        observer.refused(method, *status(error))


@contextlib.contextmanager
def loading(observer: Observer | None, policy: str) -> Iterator[None]:
    """Tell of the load in the block: how long it took, and whether it failed."""
    started_s = time.perf_counter()
    try:
        yield
    except BaseException:
        if observer is not None:
            observer.loaded(policy, time.perf_counter() - started_s, failed=True)
        raise
    if observer is not None:
        observer.loaded(policy, time.perf_counter() - started_s, failed=False)


def status(error: BaseException) -> tuple[str, str]:
    """(name of the gRPC status, reason) of an error."""
    return wire_status(error)[0], REASONS.get(type(error), "fault")
