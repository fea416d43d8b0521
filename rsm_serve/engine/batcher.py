"""Dynamic batching: a pure queue that decides, and a thin driver that has the clock and the thread.

Work-conserving: an idle worker takes what is there at once, and what arrives meanwhile is the next batch.
Requests are never split. Each is queued as if it had come `PRIORITY_STEP_S` earlier per step of its priority:
their order is priority, then first in, first out, and still everyone's turn comes.
"""

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
    ConfigError,
    DeadlineExpiredError,
    NotReadyError,
    QueueFullError,
    RequestError,
    SupersededError,
)
from rsm_serve.observe.settled import Answered
from rsm_serve.wire.caller import PRIORITY_STEP_S, check_priority, check_rows

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
    latest_wins: bool = False
    """Whether a request takes the place of the one of the same client that still waits."""

    def __post_init__(self) -> None:
        sound = self.max_queue_delay_s >= 0  # which nan is not
        if self.max_batch_size < 1 or self.max_queue_rows < self.max_batch_size or not sound:
            raise ConfigError(
                "wanted max_batch_size >= 1, max_queue_rows >= max_batch_size and max_queue_delay >= 0, got "
                f"{self.max_batch_size}, {self.max_queue_rows} and {self.max_queue_delay_s} s"
            )


@dataclass(eq=False, slots=True)
class Entry(Generic[Item]):
    """One waiting request; compared by identity."""

    item: Item
    rows: int
    arrived_s: float
    deadline_s: float | None
    priority: int = 0
    client_id: str = ""
    since_s: float = 0.0
    """When its place in the queue was taken: `arrived_s`, or that of the request whose place it has."""
    place: int = 0
    """Number of its place, ascending."""
    replaced: Entry[Item] | None = None
    """The waiting request of the same client whose place this one has."""

    @property
    def order(self) -> tuple[float, int]:
        """What leaves first is the least."""
        return self.since_s - PRIORITY_STEP_S * self.priority, self.place


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
        # By priority, then by place; a level is there while it has entries.
        self._levels: dict[int, dict[int, Entry[Item]]] = {}
        self._latest: dict[str, Entry[Item]] = {}
        self._places = 0
        self._rows = 0
        self._closed = False
        self._rate = _Rate()

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return self._rows

    def put(
        self,
        item: Item,
        rows: int,
        now: float,
        deadline_s: float | None = None,
        *,
        priority: int = 0,
        client_id: str = "",
    ) -> Entry[Item]:
        """Append a request; with `latest_wins`, it may take another's place, which is then `Entry.replaced`.

        Raises:
            NotReadyError: the queue was closed.
            InvalidRequestError: more rows than one batch holds, or none, or no such priority.
            DeadlineExpiredError: the deadline has passed already.
            QueueFullError: no room.
        """
        limits = self._limits
        if self._closed:
            raise NotReadyError("the policy is shutting down and takes no more requests; use another server")
        check_rows(rows, limits.max_batch_size)
        if priority:
            check_priority(priority)
        if deadline_s is not None and deadline_s <= now:
            raise _expired()
        replaced = self._latest.get(client_id) if client_id else None
        if self._rows + rows - (replaced.rows if replaced else 0) > limits.max_queue_rows:
            raise self._full(rows)
        entry = Entry(item, rows, now, deadline_s, priority, client_id, replaced=replaced)
        self._place(entry)
        return entry

    def cancel(self, entry: Entry[Item]) -> bool:
        """Remove a request; False if it has left the queue already."""
        if self._levels.get(entry.priority, {}).get(entry.place) is not entry:
            return False
        self._remove(entry)
        return True

    def ready_at(self) -> float | None:
        """When `take` will give something, None while nothing waits; may lie in the past."""
        if not self._levels:
            return None
        oldest_s = min([next(iter(level.values())).since_s for level in self._levels.values()])
        if self._closed or self._rows >= self._limits.max_batch_size:
            return oldest_s
        return oldest_s + self._limits.max_queue_delay_s

    def take(self, now: float) -> Batch[Item]:
        """Form a batch: the longest run of first unexpired requests that fits; empty before `ready_at`."""
        ready_at = self.ready_at()
        batch: Batch[Item] = Batch([], [])
        if ready_at is None or now < ready_at:
            return batch
        room = self._limits.max_batch_size
        while self._levels:
            heads = [next(iter(level.values())) for level in self._levels.values()]
            entry = heads[0] if len(heads) == 1 else min(heads, key=lambda head: head.order)
            if entry.deadline_s is not None and entry.deadline_s <= now:
                batch.expired.append(entry)
            elif entry.rows <= room:
                room -= entry.rows
                batch.entries.append(entry)
            else:
                break
            self._remove(entry)
        return batch

    def computed(self, rows: int, seconds: float) -> None:
        """Note how long a batch took, for the hint when to try again."""
        self._rate.add(rows, seconds)

    def close(self) -> None:
        """Refuse further requests; what waits can still be taken, without delay."""
        self._closed = True

    @property
    def finished(self) -> bool:
        """Closed and empty."""
        return self._closed and not self._levels

    def _place(self, entry: Entry[Item]) -> None:
        replaced = entry.replaced
        if replaced is not None:
            replaced.replaced = None  # a chain of them would keep them all
            if replaced.priority == entry.priority:
                # Its place too: at the end again and again, the fastest client would never be served.
                entry.since_s, entry.place = replaced.since_s, replaced.place
                self._levels[entry.priority][entry.place] = entry
                self._rows -= replaced.rows
            else:
                self._remove(replaced)
        if not entry.place:
            self._places += 1
            entry.since_s, entry.place = entry.arrived_s, self._places
            self._levels.setdefault(entry.priority, {})[entry.place] = entry
        self._rows += entry.rows
        if entry.client_id and self._limits.latest_wins:
            self._latest[entry.client_id] = entry

    def _remove(self, entry: Entry[Item]) -> None:
        level = self._levels[entry.priority]
        del level[entry.place]
        if not level:
            del self._levels[entry.priority]
        self._rows -= entry.rows
        if self._latest.get(entry.client_id) is entry:
            del self._latest[entry.client_id]

    def _full(self, rows: int) -> QueueFullError:
        retry_after_s = self._rate.seconds_for(self._rows)
        advice = (
            "" if retry_after_s is None else f"try again in about {max(1, round(1e3 * retry_after_s))} ms, "
        )
        return QueueFullError(
            f"wanted room for {rows} rows, but {self._rows} of at most {self._limits.max_queue_rows} "
            f"wait already; {advice}send less, or slow down",
            retry_after_s,
        )


class _Rate:
    """Rows per second of the recent batches."""

    _MEMORY = 0.9  # what a batch is worth after the next: about ten batches count

    def __init__(self) -> None:
        self._rows = 0.0
        self._seconds = 0.0

    def add(self, rows: int, seconds: float) -> None:
        self._rows = self._MEMORY * self._rows + rows
        self._seconds = self._MEMORY * self._seconds + seconds

    def seconds_for(self, rows: int) -> float | None:
        """How long so many rows will take; None before anything was computed."""
        return self._seconds * rows / self._rows if self._rows and self._seconds else None


@dataclass(frozen=True)
class _Job(Generic[Request, Answer]):
    request: Request
    future: asyncio.Future[Answered[Answer]]


class _Bell:
    """A `threading.Condition` for one waiting thread, at a third of its cost: one lock serves all waits.

    `ring` and `wait` are called with `lock` held; `wait` lets go of it while it sleeps.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._gate = threading.Lock()
        self._gate.acquire()
        self._asleep = False

    def ring(self) -> None:
        """Wake the thread that waits, if one does."""
        if self._asleep:
            self._asleep = False
            self._gate.release()

    def wait(self, timeout_s: float = -1) -> None:
        """Sleep until `ring`, at most so long; negative: without limit."""
        self._asleep = True
        self._lock.release()
        try:
            rung = self._gate.acquire(timeout=timeout_s)
        finally:
            self._lock.acquire()
        if not rung and not self._asleep:  # rung after the time was up
            self._gate.acquire()
        self._asleep = False


Compute = Callable[[Sequence[Request]], Sequence[Answer | RequestError]]
"""Answers a batch, in order; a request may fail alone by a RequestError in its place."""


class Batcher(Generic[Request, Answer]):
    """Batches requests of one event loop for one worker thread.

    Args:
        compute: runs in the worker thread. If it raises, the requests of that batch fail and the worker
            goes on.
        limits: sizes, delay and rules.
        name: of the thread, and in the log.
        clock: seconds, monotonic.
        turns: entered around every batch; bounds how many batchers compute at once.
    """

    def __init__(
        self,
        compute: Compute[Request, Answer],
        limits: BatchLimits,
        *,
        name: str = "batcher",
        clock: Callable[[], float] = time.monotonic,
        turns: AbstractContextManager[object] | None = None,
    ) -> None:
        self.limits = limits
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
        """Start the worker; to be called once, in the event loop that submits."""
        assert self._loop is None, "a batcher starts once"
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        # A daemon: a backend that hangs for ever must not keep a server from exiting.
        threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def submit(
        self,
        request: Request,
        rows: int,
        timeout_s: float | None = None,
        *,
        priority: int = 0,
        client_id: str = "",
    ) -> asyncio.Future[Answered[Answer]]:
        """Queue a request; cancelling the future takes it out again, if it still waits.

        The future raises DeadlineExpiredError if the time is up before the request is computed, SupersededError
        if a newer request of the client took its place, and BackendError if the computation fails.

        Args:
            request: for `compute`.
            rows: how many rows of a batch it takes.
            timeout_s: how long the answer is of use.
            priority: higher goes first; see `rsm_serve.wire.caller`.
            client_id: who asks; of use with `BatchLimits.latest_wins`.

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
        """Refuse further requests; what is queued is still answered."""
        with self._lock:
            self._queue.close()
            self._bell.ring()

    async def drained(self) -> None:
        """Wait, after `close`, until everything queued is answered."""
        assert self._stopped is not None, "start() comes first"
        await self._stopped.wait()

    def _work(self) -> None:
        while self._wait():
            waited_from_s = self._clock()
            with self._turns:
                # Taken only now: what came, expired or was cancelled while another lane computed counts.
                batch = self._take()
                outcomes = self._answer(batch)
            if outcomes and not self._deliver(self._settle, outcomes):
                return
            if batch.entries:  # after the answers are on their way
                with self._lock:
                    self._queue.computed(batch.rows, self._clock() - waited_from_s)
        assert self._stopped is not None
        self._deliver(self._stopped.set)

    def _wait(self) -> bool:
        """Block until there is work; False when closed and empty."""
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


def _superseded() -> SupersededError:
    return SupersededError(
        "a newer request of this client_id took the place of this one in the queue; use the newer one's answer"
    )
