"""Dynamic batching: drives a `BatchQueue` with a clock, one worker thread and the futures of an event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

from rsm_common.errors import (
    BackendError,
    RequestError,
    SupersededError,
)
from rsm_serve.engine.queue import Batch, BatchLimits, BatchQueue, expired
from rsm_serve.observe.settled import Answered

logger = logging.getLogger(__name__)

Request = TypeVar("Request")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Job(Generic[Request, Answer]):
    request: Request
    future: asyncio.Future[Answered[Answer]]


class _Bell:
    """A `threading.Condition` for one waiting thread, at a third of the cost: it makes no lock for each wait.

    `ring` and `wait` are called with `lock` held; `wait` releases it while it sleeps.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._gate = threading.Lock()
        self._gate.acquire()
        self._asleep = False

    def ring(self) -> None:
        """Wake the waiting thread, if there is one."""
        if self._asleep:
            self._asleep = False
            self._gate.release()

    def wait(self, timeout_s: float = -1) -> None:
        """Sleep until `ring`, at most `timeout_s` seconds; negative: without limit."""
        self._asleep = True
        self._lock.release()
        try:
            rung = self._gate.acquire(timeout=timeout_s)
        finally:
            self._lock.acquire()
        if not rung and not self._asleep:  # `ring` came after the timeout
            self._gate.acquire()
        self._asleep = False


Compute = Callable[[Sequence[Request]], Sequence[Answer | RequestError]]
"""Returns one answer per request of a batch, in order; a RequestError if one request failed alone."""

Computed = Callable[[int, float, Sequence[Answer | RequestError] | None], object]
"""Told of each batch: its rows, the seconds of `Compute`, and the answers; None in their place if it raised."""

_Outcomes = list[tuple[asyncio.Future[Answered[Answer]], Answered[Answer] | RequestError]]
_Account = tuple[int, float, Sequence[Answer | RequestError] | None]
"""The arguments of `Computed`."""


class Batcher(Generic[Request, Answer]):
    """Batches requests of one event loop for one worker thread.

    Args:
        compute: runs in the worker thread. If it raises, the requests of that batch fail and the worker
            goes on.
        limits: of the queue and of a batch.
        name: of the thread, and in the log.
        clock: seconds, monotonic.
        turns: entered around every batch; bounds how many batchers compute at once.
        computed: called in the event loop, after the callers of a batch have their answers.
    """

    def __init__(
        self,
        compute: Compute[Request, Answer],
        limits: BatchLimits,
        *,
        name: str = "batcher",
        clock: Callable[[], float] = time.monotonic,
        turns: AbstractContextManager[object] | None = None,
        computed: Computed[Answer] | None = None,
    ) -> None:
        self.limits = limits
        self._computed = computed
        self._turns = turns or nullcontext()
        self._compute = compute
        self._name = name
        self._clock = clock
        self._queue: BatchQueue[_Job[Request, Answer]] = BatchQueue(limits)
        self._lock = threading.Lock()
        self._bell = _Bell(self._lock)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped: asyncio.Event | None = None

    @property
    def queued_rows(self) -> int:
        """Rows that wait."""
        return self._queue.rows

    def start(self) -> None:
        """Start the worker; to be called once, in the event loop that calls `put`."""
        assert self._loop is None, "a batcher starts once"
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        # A daemon, so that a backend that hangs does not keep the server from exiting.
        threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def put(
        self,
        request: Request,
        rows: int,
        timeout_s: float | None = None,
        *,
        priority: int = 0,
        client_id: str = "",
    ) -> asyncio.Future[Answered[Answer]]:
        """Queue a request; cancelling the future removes the request, if it still waits.

        The future raises DeadlineExpiredError if the time is up before the request is computed, SupersededError
        if a newer request of the client replaced it, and BackendError if the computation fails.

        Args:
            request: for `compute`.
            rows: how many rows of a batch it takes.
            timeout_s: how long the answer is of use.
            priority: higher goes first; see `rsm_serve.wire.caller`.
            client_id: of the caller; used with `BatchLimits.latest_wins`.

        Raises:
            RequestError: see `BatchQueue.put`.
        """
        assert self._loop is not None, "start() comes first"
        future: asyncio.Future[Answered[Answer]] = self._loop.create_future()
        now = self._clock()
        deadline_s = None if timeout_s is None else now + timeout_s
        with self._lock:
            entry = self._queue.put(
                _Job(request, future), rows, now, deadline_s, priority=priority, client_id=client_id
            )
            self._bell.ring()
        if entry.replaced is not None:
            self._settle([(entry.replaced.item.future, _superseded())])
            entry.replaced = None

        def forget(done: asyncio.Future[Answered[Answer]]) -> None:
            if done.cancelled():
                with self._lock:
                    self._queue.cancel(entry)
                    self._bell.ring()

        future.add_done_callback(forget)
        return future

    def close(self) -> None:
        """Refuse further requests; those in the queue are answered."""
        with self._lock:
            self._queue.close()
            self._bell.ring()

    async def drained(self) -> None:
        """Wait, after `close`, until all requests in the queue are answered."""
        assert self._stopped is not None, "start() comes first"
        await self._stopped.wait()

    def _work(self) -> None:
        while self._wait():
            waited_from_s = self._clock()
            with self._turns:
                # Taken after the turn has come, so that requests that came, expired or were cancelled meanwhile
                # count.
                batch = self._take()
                outcomes, account = self._answer(batch)
            if outcomes and not self._deliver(self._settle, outcomes, account):
                return
            if batch.entries:  # after the answers were delivered
                with self._lock:
                    self._queue.computed(batch.rows, self._clock() - waited_from_s)
        assert self._stopped is not None
        self._deliver(self._stopped.set)

    def _wait(self) -> bool:
        """Block until there is work; return False when the queue is closed and empty."""
        with self._lock:
            while not self._queue.finished:
                ready_at = self._queue.ready_at()
                now = self._clock()
                if ready_at is None:
                    self._bell.wait()
                elif ready_at > now:
                    self._bell.wait(ready_at - now)
                else:
                    return True
            return False

    def _take(self) -> Batch[_Job[Request, Answer]]:
        with self._lock:
            return self._queue.take(self._clock())

    def _answer(self, batch: Batch[_Job[Request, Answer]]) -> tuple[_Outcomes[Answer], _Account[Answer] | None]:
        formed_s = self._clock()
        outcomes: _Outcomes[Answer] = [(entry.item.future, expired()) for entry in batch.expired]
        if not batch.entries:
            return outcomes, None
        requests = [entry.item.request for entry in batch.entries]
        answers: Sequence[Answer | RequestError]
        try:
            answers = self._compute(requests)
            assert len(answers) == len(requests), "compute answers every request"
            account: _Account[Answer] = (batch.rows, self._clock() - formed_s, answers)
        except Exception as error:
            account = (batch.rows, self._clock() - formed_s, None)
            fields = {"lane": self._name}
            logger.exception("%s: a batch of %d rows failed", self._name, batch.rows, extra=fields)
            # One exception object per request, because each gets a traceback of its own.
            answers = [BackendError(f"{self._name}: {error}") for _ in requests]
        for entry, answer in zip(batch.entries, answers, strict=True):
            if not isinstance(answer, RequestError):
                outcomes.append((entry.item.future, Answered(answer, 1e6 * (formed_s - entry.arrived_s))))
            else:
                outcomes.append((entry.item.future, answer))
        return outcomes, account

    def _deliver(self, callback: Callable[..., object], *args: object) -> bool:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop was closed, and all futures with it
            return False
        return True

    def _settle(self, outcomes: _Outcomes[Answer], account: _Account[Answer] | None = None) -> None:
        for future, outcome in outcomes:
            if future.done():  # cancelled while it was computed
                continue
            if isinstance(outcome, RequestError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
        if account is not None and self._computed is not None:
            # Behind the callbacks of the futures, which send the answers.
            assert self._loop is not None
            self._loop.call_soon(self._computed, *account)


def _superseded() -> SupersededError:
    return SupersededError(
        "a newer request of this client_id replaced this one in the queue; use the answer to the newer request"
    )
