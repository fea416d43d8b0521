"""The way of every request into the queue, whichever protocol it came by.

    with intake.receive(SERVICE, "Act", call, policy, version) as arrival:
        lane = arrival.find(caller)
        rows = decode(lane.spec, message)
        future = arrival.submit(rows)

The block is one step of the event loop. When the request is settled, answered or refused, it is counted, and
every listener is told once. An answer leaves first.

This module knows nothing of gRPC; a call is any object that has gRPC's `time_remaining`, `peer` and
`invocation_metadata`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Protocol

from rsm_common.errors import LimitReachedError
from rsm_common.policy import ActResult, ActRows
from rsm_serve.engine.guarded_answers import GuardedAnswers
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.rate_limit import RateLimiter
from rsm_serve.engine.registry import Registry
from rsm_serve.observe.counts import ServerCounts
from rsm_serve.observe.settled import OK, Answered, Settled, outcome, status
from rsm_serve.wire.caller import Caller

logger = logging.getLogger(__name__)

Future = asyncio.Future[Answered[ActResult]]

Listener = Callable[[Settled], object]
"""Told how each request ended; in the event loop, so it must be quick."""


class Call(Protocol):
    """The transport's side of a request."""

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None without one."""
        ...

    def peer(self) -> str:
        """Kind, host and port of the caller's address."""
        ...

    def invocation_metadata(self) -> Iterable[tuple[str, Any]] | None:
        """Metadata that the caller sent with the request."""
        ...


class Intake:
    """Takes requests and queues them.

    Args:
        registry: the versions that are loaded.
        counts: of the server.
        listeners: see `Listener`.
        guard: changes answers before their callers get them; None: answers are the policies' own.
        metadata_keys: the keys of a call's metadata that listeners read; others are not kept.
        max_streams: streams that may be open; None: any number.
        max_rate: requests a second of one client; None: any number.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        registry: Registry,
        counts: ServerCounts | None = None,
        listeners: Sequence[Listener] = (),
        guard: GuardedAnswers | None = None,
        *,
        metadata_keys: frozenset[str] = frozenset(),
        max_streams: int | None = None,
        max_rate: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.registry = registry
        self.counts = counts or ServerCounts()
        self.listeners = tuple(listeners)
        self.guard = guard
        self.metadata_keys = metadata_keys
        self.limiter = None if max_rate is None else RateLimiter(max_rate)
        self.clock = clock
        self._max_streams = max_streams

    def streams(self, change: int) -> None:
        """Count a stream that opens (+1) or closes (-1).

        Raises:
            LimitReachedError: too many are open; this one is not counted.
        """
        counts = self.counts
        if change > 0 and self._max_streams is not None and counts.open_streams >= self._max_streams:
            error = LimitReachedError(
                f"wanted at most {self._max_streams} open streams, got another; "
                "close a stream, try again later, or connect to another server"
            )
            counts.refused("", *status(error))
            raise error
        counts.open_streams += change

    def receive(
        self, service: str, method: str, call: Call, policy: str, version: str, stream: object | None = None
    ) -> Arrival:
        """Begin to account for a request that has just arrived.

        Args:
            service: full name, such as "rsm.v1.PolicyService".
            method: name of the call, such as "Act".
            call: the transport's side.
            policy: name that the request gives; may be empty if exactly one policy is loaded.
            version: number that the request gives, or empty for the current version.
            stream: an object of the request's stream alone; None outside of streams.
        """
        return Arrival(self, service, method, call, policy, version, stream)


class Arrival:
    """One request from its arrival to its end: a context in which it is decoded and queued, or refused."""

    __slots__ = (
        *("_arrived_unix_ns", "_call", "_caller", "_intake", "_lane", "_method"),
        *("_policy", "_rows", "_sampled", "_service", "_started_s", "_stream", "_timeout_s", "_version"),
    )

    def __init__(
        self,
        intake: Intake,
        service: str,
        method: str,
        call: Call,
        policy: str,
        version: str,
        stream: object | None,
    ) -> None:
        self._intake = intake
        self._started_s = intake.clock()
        self._arrived_unix_ns = time.time_ns()
        self._service, self._method = service, method
        self._call = call
        self._policy, self._version = policy, version
        self._stream = stream
        self._caller: Caller | None = None
        self._lane: Lane | None = None
        self._rows: ActRows | None = None
        self._sampled: Future | None = None
        self._timeout_s: float | None = None

    def __enter__(self) -> Arrival:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and self._sampled is None:
            self._tell(*status(error), self._intake.clock() - self._started_s)

    def find(self, caller: Caller) -> Lane:
        """Return the lane that the request goes to.

        Raises:
            LimitReachedError: the caller sends more requests a second than it may.
            PolicyNotFoundError, NotReadyError: see `Registry.find`.
        """
        intake = self._intake
        self._caller = caller
        if intake.limiter is not None:
            intake.limiter.take(caller.client_id, self._call.peer(), self._started_s)
        lane = intake.registry.find(
            self._policy, self._version, client_id=caller.client_id, seed=caller.seed, fixed=caller.fixed
        )
        self._lane = lane
        self._policy, self._version = lane.spec.name, lane.spec.version
        return lane

    def submit(self, rows: ActRows, timeout_s: float | None = None) -> Future:
        """Queue the request in the lane that was found; return the future of its answer.

        Cancelling the future takes the request out of the queue, if it still waits there.

        Args:
            rows: the request, decoded.
            timeout_s: how long the request itself says that its answer is of use; the caller's deadline counts
                too.

        Raises:
            InvalidRequestError: the action guard needs a client_id, and there is none.
            RequestError: see `Lane.sample`.
        """
        lane, caller, guard = self._lane, self._caller, self._intake.guard
        assert lane is not None, "find comes first"
        assert caller is not None
        client = caller.client_id or self._stream
        if guard is not None:
            guard.admit(client)
        timeout_s = _shorter(self._call.time_remaining(), timeout_s)
        sampled = lane.sample(rows, timeout_s, priority=caller.priority, client_id=caller.client_id)
        self._rows, self._sampled, self._timeout_s = rows, sampled, timeout_s
        future = sampled
        if guard is not None:
            future = guard.follow(sampled, lane.spec, client, rows, lane.counts, stream=self._stream)
        future.add_done_callback(self._settled)
        return future

    def _settled(self, done: Future) -> None:
        # What waits for the answer is called in this turn of the event loop, the account in the next one.
        seconds = self._intake.clock() - self._started_s
        done.get_loop().call_soon(self._account, done, seconds)

    def _account(self, done: Future, seconds: float) -> None:
        code, reason = outcome(done, seconds, self._timeout_s)
        given = done.result() if code == OK else None
        self._tell(code, reason, seconds, given if done is self._sampled else _result(self._sampled), given)

    def _tell(
        self,
        code: str,
        reason: str,
        seconds: float,
        sampled: Answered[ActResult] | None = None,
        given: Answered[ActResult] | None = None,
    ) -> None:
        intake = self._intake
        event = Settled(
            self._service,
            self._method,
            self._policy,
            self._version,
            "" if self._caller is None else self._caller.client_id,
            self._arrived_unix_ns,
            seconds,
            code,
            reason,
            self._rows,
            sampled,
            given,
            self._metadata() if intake.metadata_keys else (),
        )
        if self._lane is None:
            intake.counts.refused(event.method, code, reason)
        else:
            self._lane.counts.settled(event)
        for listener in intake.listeners:
            try:
                listener(event)
            except Exception:  # the caller's own error must reach the caller
                logger.exception("a listener of requests failed; the request is not affected")

    def _metadata(self) -> list[tuple[str, Any]]:
        """The kept part of the call's metadata, which may also hold a token."""
        keys = self._intake.metadata_keys
        return [(key, value) for key, value in self._call.invocation_metadata() or () if key in keys]


def _result(future: Future | None) -> Answered[ActResult] | None:
    """Return the result of a future; None if it has none, because it failed, was cancelled or is not done."""
    if future is None or not future.done() or future.cancelled() or future.exception() is not None:
        return None
    return future.result()


def _shorter(one_s: float | None, other_s: float | None) -> float | None:
    if one_s is None or other_s is None:
        return other_s if one_s is None else one_s
    return min(one_s, other_s)
