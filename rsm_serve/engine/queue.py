"""The decisions of batching, without a clock, a thread or a socket: which requests form the next batch.

An idle worker takes what waits at once; the requests that arrive meanwhile form the next batch. Requests are
never split. A request is queued as if it had come `PRIORITY_STEP_S` earlier for each step of its priority: the
order is by priority, then first in, first out, and every request's turn comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from rsm_common.errors import ConfigError, DeadlineExpiredError, NotReadyError, QueueFullError
from rsm_serve.wire.caller import MAX_PRIORITY, PRIORITY_STEP_S

Item = TypeVar("Item")


@dataclass(frozen=True)
class BatchLimits:
    """Limits of one batch and of the queue."""

    max_batch_size: int = 64
    """Most rows of one inference, and of one request."""
    max_queue_rows: int = 1024
    """Most rows that wait; requests beyond are refused."""
    max_queue_delay_s: float = 0.0
    """How long an idle worker waits for a fuller batch. Measured: a delay adds to the latency of a single
    client and gains nothing, because the queue fills while the worker is busy."""
    latest_wins: bool = False
    """Whether a request replaces the waiting request of the same client, and takes its place."""

    def __post_init__(self) -> None:
        sound = self.max_queue_delay_s >= 0  # nan is not
        if self.max_batch_size < 1 or self.max_queue_rows < self.max_batch_size or not sound:
            raise ConfigError(
                "wanted max_batch_size >= 1, max_queue_rows >= max_batch_size and max_queue_delay_s >= 0, got "
                f"{self.max_batch_size}, {self.max_queue_rows} and {self.max_queue_delay_s} s"
            )


@dataclass(eq=False, slots=True)
class Entry(Generic[Item]):
    """One request in the queue; compared by identity."""

    item: Item
    rows: int
    arrived_s: float
    deadline_s: float | None
    priority: int = 0
    client_id: str = ""
    since_s: float = 0.0
    """When its place was taken: `arrived_s`, or `since_s` of the request that it replaced."""
    place: int = 0
    """Number of its place; places are numbered in the order in which they are taken."""
    replaced: Entry[Item] | None = None
    """The request of the same client that this one replaced."""

    @property
    def order(self) -> tuple[float, int]:
        """Sorts the queue; the least leaves first."""
        return self.since_s - PRIORITY_STEP_S * self.priority, self.place


@dataclass(frozen=True)
class Batch(Generic[Item]):
    """The requests that leave the queue at one moment."""

    entries: list[Entry[Item]]
    """To be computed together, in the order of the queue; may be empty."""
    expired: list[Entry[Item]]
    """Requests whose deadline has passed."""

    @property
    def rows(self) -> int:
        """Rows to be computed."""
        return sum(entry.rows for entry in self.entries)


class BatchQueue(Generic[Item]):
    """The queue of one batcher, a pure state machine.

    All times are seconds of one monotonic clock that the caller reads.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        # By priority, then by place. An empty level is removed.
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
        """Add a request; with `latest_wins` it replaces the waiting request of its client (`Entry.replaced`).

        Raises:
            NotReadyError: the queue was closed.
            DeadlineExpiredError: the deadline has passed already.
            QueueFullError: no room.
        """
        limits = self._limits
        if self._closed:
            raise NotReadyError("the policy is shutting down and refuses new requests; use another server")
        # The decoder has refused other requests (wire.caller).
        assert 1 <= rows <= limits.max_batch_size, "a request fits into one batch"
        assert -MAX_PRIORITY <= priority <= MAX_PRIORITY, "there is such a priority"
        if deadline_s is not None and deadline_s <= now:
            raise expired()
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
        """Return the time from which `take` gives a batch; it may be in the past. None if no request waits."""
        if not self._levels:
            return None
        oldest_s = min([next(iter(level.values())).since_s for level in self._levels.values()])
        if self._closed or self._rows >= self._limits.max_batch_size:
            return oldest_s
        return oldest_s + self._limits.max_queue_delay_s

    def take(self, now: float) -> Batch[Item]:
        """Form a batch of the first requests, as many as fit; empty before `ready_at`."""
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
        """Note how long a batch took, for the advice when to try again."""
        self._rate.add(rows, seconds)

    def close(self) -> None:
        """Refuse further requests; `take` gives those that wait, without delay."""
        self._closed = True

    @property
    def finished(self) -> bool:
        """Closed and empty."""
        return self._closed and not self._levels

    def _place(self, entry: Entry[Item]) -> None:
        replaced = entry.replaced
        if replaced is not None:
            replaced.replaced = None  # a chain of replaced requests would keep all of them in memory
            if replaced.priority == entry.priority:
                # It takes the place. At the end of the queue, the request of a fast client would be replaced
                # again and again before its turn came.
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

    _MEMORY = 0.9  # weight of a batch after each further batch: about ten batches count

    def __init__(self) -> None:
        self._rows = 0.0
        self._seconds = 0.0

    def add(self, rows: int, seconds: float) -> None:
        self._rows = self._MEMORY * self._rows + rows
        self._seconds = self._MEMORY * self._seconds + seconds

    def seconds_for(self, rows: int) -> float | None:
        """Return how long so many rows will take; None before the first batch."""
        return self._seconds * rows / self._rows if self._rows and self._seconds else None


def expired() -> DeadlineExpiredError:
    """Make the error of a request whose deadline passed while it waited."""
    return DeadlineExpiredError(
        "the deadline passed before the request could be computed; allow more time or send less"
    )
