"""Where every request enters, whatever its protocol: to its lane, and under the eyes of whoever observes.

Nothing here knows of gRPC; a call is what has gRPC's `time_remaining`, `peer` and `invocation_metadata`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rsm_common.errors import LimitReachedError
from rsm_common.policy import ActResult, ActRows
from rsm_serve.engine.guarded_answers import GuardedAnswers
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.rate_limit import RateLimiter
from rsm_serve.engine.registry import Registry
from rsm_serve.observe.observer import Observer, refuse, watch
from rsm_serve.observe.settled import Answered
from rsm_serve.observe.tracing import Tracer
from rsm_serve.wire.caller import Caller

if TYPE_CHECKING:
    from rsm_serve.recording.recorder import Recorder

Future = asyncio.Future[Answered[ActResult]]


class Call(Protocol):
    """The transport's side of a request."""

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None without one."""
        ...

    def peer(self) -> str:
        """Where the caller is: kind, host and port."""
        ...

    def invocation_metadata(self) -> Iterable[tuple[str, Any]] | None:
        """What travelled with the request."""
        ...


class Decoded(Protocol):
    """A decoded request."""

    @property
    def rows(self) -> ActRows:
        """What is asked for."""
        ...

    @property
    def timeout_s(self) -> float | None:
        """What the request itself allows, beside the caller's deadline."""
        ...


Request = TypeVar("Request", bound=Decoded)


class Intake:
    """Finds lanes and queues requests there.

    Args:
        registry: what is served.
        observer: hears of every request; None: nobody does.
        tracer: traces every request; None: nothing is traced.
        recorder: writes every request and its answer to files; None: nothing is written.
        guard: stands between the answers and their callers; None: answers are the policies' own.
        max_streams: streams that may be open; None: any number.
        max_rate: requests a second of one client; None: any number.
    """

    def __init__(
        self,
        registry: Registry,
        observer: Observer | None = None,
        tracer: Tracer | None = None,
        recorder: Recorder | None = None,
        guard: GuardedAnswers | None = None,
        *,
        max_streams: int | None = None,
        max_rate: float | None = None,
    ) -> None:
        self.registry = registry
        self._observer = observer
        self._tracer = tracer
        self._recorder = recorder
        self._guard = guard
        self._open_streams = 0
        self._max_streams = max_streams
        self._limiter = None if max_rate is None else RateLimiter(max_rate)

    def streams(self, change: int) -> None:
        """+1: a stream is opened, -1: was closed.

        Raises:
            LimitReachedError: there are too many; this one does not count.
        """
        if change > 0 and self._max_streams is not None and self._open_streams >= self._max_streams:
            error = LimitReachedError(
                f"wanted at most {self._max_streams} open streams, got another; "
                "close some, or try again or elsewhere"
            )
            refuse(self._observer, None, "", error, started_s=time.perf_counter())
            raise error
        self._open_streams += change
        if self._observer is not None:
            self._observer.streams(change)

    def submit(
        self,
        method: str,
        call: Call,
        policy: str,
        version: str,
        caller: Callable[[], Caller],
        decode: Callable[[Lane], Request],
        stream: object | None = None,
    ) -> tuple[Lane, Request, Future]:
        """Queue a request: its lane, what was decoded, and the future of its answer.

        Args:
            method: full name, such as "rsm.v1.PolicyService/Act"; metrics show what is behind the slash.
            call: the transport's side.
            policy: name, may be empty if exactly one is loaded.
            version: a number, or empty for the current one.
            caller: reads who asks.
            decode: reads the rest, for the lane that was found.
            stream: an object of the request's stream alone; None outside of streams.

        Raises:
            RequestError: whatever is wrong with the request, or the queue.
        """
        started_s = time.perf_counter()
        label = method.rpartition("/")[2]
        lane: Lane | None = None
        who: Caller | None = None
        try:
            who = caller()
            if self._limiter is not None:
                self._limiter.take(who.client_id, call.peer(), started_s)
            lane = self.registry.find(policy, version, client_id=who.client_id, seed=who.seed, fixed=who.fixed)
            request = decode(lane)
            if self._guard is not None:
                self._guard.admit(who.client_id or stream)
            timeout_s = _shorter(call.time_remaining(), request.timeout_s)
            future = lane.submit(request.rows, timeout_s, priority=who.priority, client_id=who.client_id)
        except Exception as error:
            refuse(self._observer, lane.observer if lane else None, label, error, started_s=started_s)
            if self._recorder is not None:
                asked = (lane.spec.name, lane.spec.version) if lane else (policy, version)
                self._recorder.refused(label, *asked, who, error)
            raise
        rows = len(request.rows.obs_BO)
        sampled = future
        if self._guard is not None:
            client = who.client_id or stream
            future = self._guard.follow(sampled, lane.spec, client, request.rows, lane.observer, stream=stream)
        watch(future, lane.observer, label, rows=rows, started_s=started_s, timeout_s=timeout_s)
        if self._tracer is not None:
            self._tracer.follow(future, method, lane.spec, call.invocation_metadata(), started_s=started_s)
        if self._recorder is not None:
            self._recorder.follow(
                future, sampled, label, lane.spec, who, request.rows, started_s=started_s, timeout_s=timeout_s
            )
        return lane, request, future


def _shorter(one_s: float | None, other_s: float | None) -> float | None:
    return min((limit for limit in (one_s, other_s) if limit is not None), default=None)
