"""Where every request enters, whatever its protocol: to its lane, and under the eyes of whoever observes.

Nothing here knows of gRPC; a call is what has gRPC's `time_remaining` and `invocation_metadata`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from rsm_serve.batcher import Answered
from rsm_serve.observer import Observer, refuse, watch
from rsm_serve.policy import ActResult, ActRows
from rsm_serve.registry import Lane, Registry
from rsm_serve.scheduling import Caller
from rsm_serve.tracing import Tracer

Future = asyncio.Future[Answered[ActResult]]


class Call(Protocol):
    """The transport's side of a request."""

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None without one."""
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
        tracer: records every request; None: nothing is recorded.
    """

    def __init__(
        self, registry: Registry, observer: Observer | None = None, tracer: Tracer | None = None
    ) -> None:
        self.registry = registry
        self._observer = observer
        self._tracer = tracer

    def streams(self, change: int) -> None:
        """+1: a stream was opened, -1: closed."""
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
    ) -> tuple[Lane, Request, Future]:
        """Queue a request: its lane, what was decoded, and the future of its answer.

        Args:
            method: full name, such as "rsm.v1.PolicyService/Act"; metrics show what is behind the slash.
            call: the transport's side.
            policy: name, may be empty if exactly one is loaded.
            version: a number, or empty for the current one.
            caller: reads who asks.
            decode: reads the rest, for the lane that was found.

        Raises:
            RequestError: whatever is wrong with the request, or the queue.
        """
        started_s = time.perf_counter()
        label = method.rpartition("/")[2]
        lane: Lane | None = None
        try:
            who = caller()
            lane = self.registry.find(policy, version, client_id=who.client_id, seed=who.seed, fixed=who.fixed)
            request = decode(lane)
            timeout_s = _shorter(call.time_remaining(), request.timeout_s)
            future = lane.submit(request.rows, timeout_s, priority=who.priority, client_id=who.client_id)
        except Exception as error:
            refuse(self._observer, lane.observer if lane else None, label, error, started_s=started_s)
            raise
        rows = len(request.rows.obs_BO)
        watch(future, lane.observer, label, rows=rows, started_s=started_s, timeout_s=timeout_s)
        if self._tracer is not None:
            self._tracer.follow(future, method, lane.spec, call.invocation_metadata(), started_s=started_s)
        return lane, request, future


def _shorter(one_s: float | None, other_s: float | None) -> float | None:
    return min((limit for limit in (one_s, other_s) if limit is not None), default=None)
