"""The counts and durations of a server and of each loaded version of a policy.

Prometheus, the status page and ModelStatistics read the same numbers. They are kept in plain lists, not in
`prometheus_client`'s own metrics: to count a value costs 0.1 us and no lock instead of 0.7 us and one, and the
numbers of a version leave with it. The event loop alone writes them. It counts a request once the answer is on
its way, so counting delays no answer; a reader in the event loop finds the request in all counts or in none.

No number is an observation, an action or a text that a caller chose. Labels are names of loaded policies and
members of fixed sets, so no request can add a time series.
"""

from __future__ import annotations

import contextlib
import threading
import time
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rsm_common.lazy import toolkit_version
from rsm_common.policy import Timing
from rsm_serve.observe.settled import GIVEN_UP, OK, Settled

LATENCY_BOUNDS_S = (
    *(50e-6, 75e-6, 100e-6, 150e-6, 200e-6, 300e-6, 500e-6, 750e-6),
    *(1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 7.5e-3, 10e-3, 15e-3, 20e-3, 30e-3, 50e-3, 75e-3),
    *(0.1, 0.2, 0.5, 1.0),
)
"""Upper ends of the latency buckets in seconds; the last bucket is open."""

ROWS_BOUNDS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
"""Upper ends of the buckets of rows per batch."""

RECENT_BATCHES = 16
"""Batches of which a further request is recognised: more than the batches between two answers of one stream."""

NotRecorded = Literal["behind", "disk", "too_large"]
"""Why a request has no record: the writer is behind, the disk refused it, or it is too large for a file."""


@dataclass
class RecordCounts:
    """How many records were written and dropped; each number has one writer."""

    written: int = 0
    dropped: dict[NotRecorded, int] = field(default_factory=lambda: {"behind": 0, "disk": 0, "too_large": 0})


class Histogram:
    """Counts of values per bucket; one thread writes, any thread may read."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        """Upper ends, each inside its bucket."""
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)


@dataclass(slots=True)
class Durations:
    """How often something happened, and how long it took in all."""

    count: int = 0
    total: float = 0.0
    """Sum, seconds."""

    def add(self, seconds: float) -> None:
        """Count one more."""
        self.count += 1
        self.total += seconds


@dataclass
class Executions:
    """Batches of one size."""

    stacking: Durations = field(default_factory=Durations)
    """Stacking rows and drawing noise."""
    network: Durations = field(default_factory=Durations)


class LaneCounts:
    """The numbers of one version of one policy.

    Args:
        policy: its name.
        version: its number.
        runtime: what computes, such as "onnxruntime 1.31.1, CPU".
        queued_rows: returns how many rows wait.
    """

    def __init__(self, policy: str, version: str, runtime: str, queued_rows: Callable[[], int]) -> None:
        self.policy, self.version, self.runtime = policy, version, runtime
        self.queued_rows = queued_rows
        self.requests: dict[tuple[str, str, str], int] = {}
        """By (method, code, reason)."""
        self.rows = 0
        """Rows of answered requests."""
        self.request_s = Histogram(LATENCY_BOUNDS_S)
        """Of answered requests alone, from arrival to answer: refusals are quick and would lower it."""
        self.queue_s = Histogram(LATENCY_BOUNDS_S)
        """Of answered requests that were computed, as are `stacking` and `network`."""
        self.stacking = Durations()
        """Stacking rows and drawing noise, of the whole batch."""
        self.network = Durations()
        """The graph, of the whole batch."""
        self.failed = Durations()
        """Requests that were refused, expired or could not be computed; cancelled ones are not counted."""
        self.by_batch_rows: defaultdict[int, Executions] = defaultdict(Executions)
        """Batches of which at least one request was answered, by their rows."""
        self.last_arrival_ns = 0
        """The latest arrival of a settled request, nanoseconds since 1970; 0 before the first."""
        self.limited_rows = 0
        self.fallbacks = 0
        self._recent_batches: deque[Timing] = deque(maxlen=RECENT_BATCHES)
        self.compute_s = Histogram(LATENCY_BOUNDS_S)
        self.batch_rows = Histogram(ROWS_BOUNDS)
        self.failed_executions = 0
        self.unsound = 0

    def settled(self, event: Settled) -> None:
        """Count a request; in the event loop."""
        key = (event.method, event.code, event.reason)
        self.requests[key] = self.requests.get(key, 0) + 1
        if event.arrived_unix_ns > self.last_arrival_ns:
            self.last_arrival_ns = event.arrived_unix_ns
        if event.code != OK:
            if event.reason not in GIVEN_UP:
                self.failed.add(event.seconds)
            return
        self.request_s.add(event.seconds)
        if event.given is not None:
            self.rows += len(event.given.answer.action)
        if event.sampled is not None:
            self._computed(event.sampled.answer.timing, event.sampled.queue_us)

    def executed(self, rows: int, seconds: float, unsound: int) -> None:
        """Count a batch that was computed; in the event loop.

        Args:
            rows: of the batch.
            seconds: of stacking, noise and the graph.
            unsound: requests refused because an action or value was not finite or out of bounds.
        """
        self.compute_s.add(seconds)
        self.batch_rows.add(rows)
        self.unsound += unsound

    def execution_failed(self) -> None:
        """Count a batch that failed as a whole; in the event loop."""
        self.failed_executions += 1

    def adjusted(self, *, limited_rows: int, fallback: bool) -> None:
        """Count an answer that the action guard changed; in the event loop.

        Args:
            limited_rows: actions that were clipped towards the ones before.
            fallback: the policy failed, and the guard gave another action.
        """
        self.limited_rows += limited_rows
        self.fallbacks += fallback

    @property
    def executions(self) -> int:
        """Batches of which at least one request was answered."""
        return sum(batches.network.count for batches in self.by_batch_rows.values())

    def _computed(self, timing: Timing, queue_us: float) -> None:
        stacking_s, network_s = 1e-6 * timing.batch_us, 1e-6 * timing.compute_us
        self.queue_s.add(1e-6 * queue_us)
        self.stacking.add(stacking_s)
        self.network.add(network_s)
        # The requests of a batch share one Timing. Requests of other batches may be settled between them, where
        # the action guard keeps the order of a stream.
        for batch in self._recent_batches:
            if batch is timing:
                return
        self._recent_batches.appendleft(timing)
        batches = self.by_batch_rows[timing.batch_rows]
        batches.stacking.add(stacking_s)
        batches.network.add(network_s)


class ServerCounts:
    """The numbers of a server; changed in its event loop, except by `loading`, which any thread may use."""

    def __init__(self) -> None:
        self.toolkit = toolkit_version()
        """Version of the toolkit that counts."""
        self._started_s = time.monotonic()
        self._lanes: dict[tuple[str, str], LaneCounts] = {}
        self._load_lock = threading.Lock()
        self.refusals: dict[tuple[str, str, str], int] = {}
        """Requests for no policy that is loaded, by (method, code, reason)."""
        self.loads: dict[tuple[str, str], int] = {}
        """By (policy, "ok" or "failed")."""
        self.load_s: dict[str, float] = {}
        """How long a policy's last successful load took."""
        self.open_streams = 0
        self.recorded: RecordCounts | None = None
        """How many records were written and dropped; None if nothing is recorded."""

    @property
    def uptime_s(self) -> float:
        """Seconds since the process began to serve, or to load."""
        return time.monotonic() - self._started_s

    @property
    def lanes(self) -> list[LaneCounts]:
        """The numbers of the loaded versions, by name and version."""
        return sorted(self._lanes.values(), key=lambda lane: (lane.policy, int(lane.version)))

    def add(self, lane: LaneCounts) -> None:
        """Show the numbers of a version from now on, instead of those of an earlier load of it."""
        self._lanes[lane.policy, lane.version] = lane

    def remove(self, lane: LaneCounts) -> None:
        """Forget the numbers of a version, but not those of a later load of it."""
        if self._lanes.get((lane.policy, lane.version)) is lane:
            del self._lanes[lane.policy, lane.version]

    def refused(self, method: str, code: str, reason: str) -> None:
        """Count a request for no policy that is loaded, or one that was refused before it was read."""
        key = (method, code, reason)
        self.refusals[key] = self.refusals.get(key, 0) + 1

    @contextlib.contextmanager
    def loading(self, policy: str) -> Iterator[None]:
        """Count the load in the block: how long it took, and whether it failed."""
        started_s = time.perf_counter()
        result = "failed"
        try:
            yield
            result = "ok"
        finally:
            with self._load_lock:
                self.loads[policy, result] = self.loads.get((policy, result), 0) + 1
                if result == "ok":
                    self.load_s[policy] = time.perf_counter() - started_s

    def load_counts(self) -> tuple[dict[tuple[str, str], int], dict[str, float]]:
        """Return copies of (`loads`, `load_s`) of one moment."""
        with self._load_lock:
            return dict(self.loads), dict(self.load_s)
