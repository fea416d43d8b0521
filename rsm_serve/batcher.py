"""Dynamic batching: a pure queue that decides, and a thin driver that has the clock and the thread.

Work-conserving: an idle worker takes what is there at once, and what arrives meanwhile is the next batch.
Requests are never split; their order is first in, first out.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rsm_serve.errors import (
    BackendError,
    ConfigError,
    DeadlineExpiredError,
    InvalidRequestError,
    NotReadyError,
    QueueFullError,
    RequestError,
)

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Request = TypeVar("Request")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class BatchLimits:
    """How much is computed and kept at once."""

    max_batch_size: int = 64
    """Most rows of one inference, and of one request."""
    max_queue_rows: int = 1024
    """Most rows that wait; more are refused."""
    max_queue_delay_s: float = 0.0
    """How long an idle worker waits for a fuller batch. Measured: any delay costs a single client that
    delay and gains nothing, because the queue fills by itself while the worker is busy."""

    def __post_init__(self) -> None:
        if self.max_batch_size < 1 or self.max_queue_rows < self.max_batch_size or self.max_queue_delay_s < 0:
            raise ConfigError(
                "wanted max_batch_size >= 1, max_queue_rows >= max_batch_size and max_queue_delay >= 0, got "
                f"{self.max_batch_size}, {self.max_queue_rows} and {self.max_queue_delay_s} s"
            )


@dataclass(eq=False)
class Entry(Generic[Item]):
    """One waiting request; compared by identity."""

    item: Item
    rows: int
    arrived_s: float
    deadline_s: float | None


@dataclass(frozen=True)
class Batch(Generic[Item]):
    """What leaves the queue at one moment."""

    entries: list[Entry[Item]]
    """To be computed together, oldest first; may be empty."""
    expired: list[Entry[Item]]
    """Too late to be worth computing."""

    @property
    def rows(self) -> int:
        """Rows to be computed."""
        return sum(entry.rows for entry in self.entries)


class BatchQueue(Generic[Item]):
    """The decisions of the batcher as a pure state machine: no clock, no thread, no socket.

    All times are seconds of one monotonic clock that the caller reads.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._waiting: OrderedDict[Entry[Item], None] = OrderedDict()
        self._rows = 0
        self._closed = False

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return self._rows

    def put(self, item: Item, rows: int, now: float, deadline_s: float | None = None) -> Entry[Item]:
        """Append a request.

        Raises:
            NotReadyError: the queue was closed.
            InvalidRequestError: more rows than one batch holds, or none.
            DeadlineExpiredError: the deadline has passed already.
            QueueFullError: no room.
        """
        limits = self._limits
        if self._closed:
            raise NotReadyError("the policy is shutting down and takes no more requests; use another server")
        if not 1 <= rows <= limits.max_batch_size:
            raise InvalidRequestError(
                f"wanted 1 to {limits.max_batch_size} rows in one request, got {rows}; "
                "split it, or raise --max-batch-size of the server"
            )
        if deadline_s is not None and deadline_s <= now:
            raise _expired()
        if self._rows + rows > limits.max_queue_rows:
            raise QueueFullError(
                f"wanted room for {rows} rows, but {self._rows} of at most {limits.max_queue_rows} "
                "wait already; send less, or slow down"
            )
        entry = Entry(item, rows, now, deadline_s)
        self._waiting[entry] = None
        self._rows += rows
        return entry

    def cancel(self, entry: Entry[Item]) -> bool:
        """Remove a request; False if it has left the queue already."""
        if entry not in self._waiting:
            return False
        self._remove(entry)
        return True

    def ready_at(self) -> float | None:
        """When `take` will give something, None while nothing waits; may lie in the past."""
        if not self._waiting:
            return None
        oldest = next(iter(self._waiting))
        if self._closed or self._rows >= self._limits.max_batch_size:
            return oldest.arrived_s
        return oldest.arrived_s + self._limits.max_queue_delay_s

    def take(self, now: float) -> Batch[Item]:
        """Form a batch: the longest run of oldest unexpired requests that fits; empty before `ready_at`."""
        ready_at = self.ready_at()
        batch: Batch[Item] = Batch([], [])
        if ready_at is None or now < ready_at:
            return batch
        room = self._limits.max_batch_size
        while self._waiting:
            entry = next(iter(self._waiting))
            if entry.deadline_s is not None and entry.deadline_s <= now:
                batch.expired.append(entry)
            elif entry.rows <= room:
                room -= entry.rows
                batch.entries.append(entry)
            else:
                break
            self._remove(entry)
        return batch

    def close(self) -> None:
        """Refuse further requests; what waits can still be taken, without delay."""
        self._closed = True

    @property
    def finished(self) -> bool:
        """Closed and empty."""
        return self._closed and not self._waiting

    def _remove(self, entry: Entry[Item]) -> None:
        del self._waiting[entry]
        self._rows -= entry.rows


@dataclass(frozen=True)
class Answered(Generic[Answer]):
    """An answer and how long its request waited."""

    answer: Answer
    queue_us: float


@dataclass(frozen=True)
class _Job(Generic[Request, Answer]):
    request: Request
    future: asyncio.Future[Answered[Answer]]


Compute = Callable[[Sequence[Request]], Sequence[Answer | RequestError]]
"""Answers a batch, in order; a request may fail alone by a RequestError in its place."""


class Batcher(Generic[Request, Answer]):
    """Batches requests of one event loop for one worker thread.

    Args:
        compute: runs in the worker thread. If it raises, the requests of that batch fail and the worker
            goes on.
        limits: sizes and delay.
        name: of the thread, and in the log.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        compute: Compute[Request, Answer],
        limits: BatchLimits,
        *,
        name: str = "batcher",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self._compute = compute
        self._name = name
        self._clock = clock
        self._queue: BatchQueue[_Job[Request, Answer]] = BatchQueue(limits)
        self._changed = threading.Condition(threading.Lock())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped: asyncio.Event | None = None

    @property
    def queued_rows(self) -> int:
        """Rows that wait."""
        return self._queue.rows

    def start(self) -> None:
        """Start the worker; to be called once, in the event loop that submits."""
        assert self._loop is None, "a batcher starts once"
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        # A daemon: a backend that hangs for ever must not keep a server from exiting.
        threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def submit(
        self, request: Request, rows: int, timeout_s: float | None = None
    ) -> asyncio.Future[Answered[Answer]]:
        """Queue a request; cancelling the future takes it out again, if it still waits.

        The future raises DeadlineExpiredError if the time is up before the request is computed, and
        BackendError if the computation fails.

        Args:
            request: for `compute`.
            rows: how many rows of a batch it takes.
            timeout_s: how long the answer is of use.

        Raises:
            RequestError: see `BatchQueue.put`.
        """
        assert self._loop is not None, "start() comes first"
        future: asyncio.Future[Answered[Answer]] = self._loop.create_future()
        now = self._clock()
        deadline_s = None if timeout_s is None else now + timeout_s
        with self._changed:
            entry = self._queue.put(_Job(request, future), rows, now, deadline_s)
            self._changed.notify()

        def forget(done: asyncio.Future[Answered[Answer]]) -> None:
            if done.cancelled():
                with self._changed:
                    self._queue.cancel(entry)
                    self._changed.notify()

        future.add_done_callback(forget)
        return future

    def close(self) -> None:
        """Refuse further requests; what is queued is still answered."""
        with self._changed:
            self._queue.close()
            self._changed.notify()

    async def drained(self) -> None:
        """Wait, after `close`, until everything queued is answered."""
        assert self._stopped is not None, "start() comes first"
        await self._stopped.wait()

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            outcomes = self._answer(batch)
            if not self._deliver(self._settle, outcomes):
                return
        assert self._stopped is not None
        self._deliver(self._stopped.set)

    def _next_batch(self) -> Batch[_Job[Request, Answer]] | None:
        """Block until there is work; None when closed and empty."""
        with self._changed:
            while not self._queue.finished:
                ready_at = self._queue.ready_at()
                now = self._clock()
                if ready_at is None:
                    self._changed.wait()
                elif ready_at > now:
                    self._changed.wait(ready_at - now)
                else:
                    return self._queue.take(now)
            return None

    def _answer(
        self, batch: Batch[_Job[Request, Answer]]
    ) -> list[tuple[asyncio.Future[Answered[Answer]], Answered[Answer] | RequestError]]:
        formed_s = self._clock()
        outcomes: list[tuple[asyncio.Future[Answered[Answer]], Answered[Answer] | RequestError]] = [
            (entry.item.future, _expired()) for entry in batch.expired
        ]
        if not batch.entries:
            return outcomes
        requests = [entry.item.request for entry in batch.entries]
        answers: Sequence[Answer | RequestError]
        try:
            answers = self._compute(requests)
            assert len(answers) == len(requests), "compute answers every request"
        except Exception as error:
            fields = {"lane": self._name}
            logger.exception("%s: a batch of %d rows failed", self._name, batch.rows, extra=fields)
            # One exception object per request: each is raised, and given a traceback, on its own.
            answers = [BackendError(f"{self._name}: {error}") for _ in requests]
        for entry, answer in zip(batch.entries, answers, strict=True):
            if not isinstance(answer, RequestError):
                outcomes.append((entry.item.future, Answered(answer, 1e6 * (formed_s - entry.arrived_s))))
            else:
                outcomes.append((entry.item.future, answer))
        return outcomes

    def _deliver(self, callback: Callable[..., object], *args: object) -> bool:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop was closed: nobody waits any more
            return False
        return True

    @staticmethod
    def _settle(
        outcomes: list[tuple[asyncio.Future[Answered[Answer]], Answered[Answer] | RequestError]],
    ) -> None:
        for future, outcome in outcomes:
            if future.done():  # cancelled while it was computed
                continue
            if isinstance(outcome, RequestError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)


def _expired() -> DeadlineExpiredError:
    return DeadlineExpiredError(
        "the deadline passed before the request could be computed; allow more time or send less"
    )
