"""What one loaded version of a policy has done: counts and durations, as ModelStatistics tells them.

Everything is counted in the event loop, when an answer is there, so that a reader in that loop never finds a
request in one count and not yet in another.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

from rsm_common.policy import ActResult, Timing
from rsm_serve.observe.settled import Answered

NotRecorded = Literal["behind", "disk", "too_large"]
"""Why a request has no record: the writer is behind, the disk refused it, or it is too large for a file."""


@dataclass
class RecordCounts:
    """What became of the records; each number has one writer."""

    written: int = 0
    dropped: dict[NotRecorded, int] = field(default_factory=lambda: {"behind": 0, "disk": 0, "too_large": 0})


@dataclass
class Durations:
    """How often something happened, and how long it took in all."""

    count: int = 0
    ns: int = 0
    """Sum, nanoseconds."""

    def add(self, us: float) -> None:
        """One more, of `us` microseconds."""
        self.count += 1
        self.ns += round(1000 * us)


@dataclass
class Executions:
    """Batches of one size."""

    stacking: Durations = field(default_factory=Durations)
    """Stacking rows and drawing noise."""
    network: Durations = field(default_factory=Durations)


class LaneStatistics:
    """Counts the requests of one lane; to be used in one event loop."""

    def __init__(self) -> None:
        self.success = Durations()
        """Answered requests, from arrival to the answer being there."""
        self.fail = Durations()
        """Requests that were refused, expired or could not be computed; cancelled ones are in neither."""
        self.queue = Durations()
        """Of answered requests, as `stacking` and `network`; the last two are those of the whole batch."""
        self.stacking = Durations()
        self.network = Durations()
        self.rows = 0
        """Rows that were answered."""
        self.by_batch_rows: defaultdict[int, Executions] = defaultdict(Executions)
        """Batches of which at least one request was answered, by their size in rows."""
        self.last_request_ms = 0
        """When the last request came, milliseconds since 1970; 0 before the first."""
        self._last_batch: Timing | None = None

    @property
    def executions(self) -> int:
        """Batches that were computed."""
        return sum(batches.network.count for batches in self.by_batch_rows.values())

    def follow(self, future: asyncio.Future[Answered[ActResult]], arrived_s: float) -> None:
        """Count a request that was queued, once it is answered or has failed.

        Args:
            future: its answer.
            arrived_s: when it came, of `time.perf_counter`.
        """
        self.last_request_ms = time.time_ns() // 1_000_000

        def count(done: asyncio.Future[Answered[ActResult]]) -> None:
            if done.cancelled():
                return
            us = 1e6 * (time.perf_counter() - arrived_s)
            if done.exception() is None:
                self._succeeded(done.result(), us)
            else:
                self.fail.add(us)

        future.add_done_callback(count)

    def refused(self) -> None:
        """Count a request that did not get into the queue."""
        self.last_request_ms = time.time_ns() // 1_000_000
        self.fail.add(0)

    def _succeeded(self, answered: Answered[ActResult], us: float) -> None:
        timing = answered.answer.timing
        self.success.add(us)
        self.queue.add(answered.queue_us)
        self.stacking.add(timing.batch_us)
        self.network.add(timing.compute_us)
        self.rows += len(answered.answer.action)
        # The requests of a batch share one Timing, and are answered one directly after the other.
        if timing is not self._last_batch:
            self._last_batch = timing
            batches = self.by_batch_rows[timing.batch_rows]
            batches.stacking.add(timing.batch_us)
            batches.network.add(timing.compute_us)
