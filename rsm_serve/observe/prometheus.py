"""Counters and histograms of a server, and their Prometheus exposition.

The numbers are kept in plain lists, not in `prometheus_client`'s own metrics: to count a value costs 0.1 us and
no lock instead of 0.7 us and one, a version's numbers leave with it, and the status page reads the same
histograms. Each number has one writer: the event loop, or the lane's worker thread.

Nothing here is an observation, an action or anything else that a caller chose: labels are names of loaded
policies and members of fixed sets, so that no request can add a time series.
"""

from __future__ import annotations

import platform
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.utils import floatToGoString

from rsm_serve.observe.counts import RecordCounts

LATENCY_BOUNDS_S = (
    *(50e-6, 75e-6, 100e-6, 150e-6, 200e-6, 300e-6, 500e-6, 750e-6),
    *(1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 7.5e-3, 10e-3, 15e-3, 20e-3, 30e-3, 50e-3, 75e-3),
    *(0.1, 0.2, 0.5, 1.0),
)
"""Upper ends of the latency buckets in seconds; the last bucket is open."""

ROWS_BOUNDS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
"""Upper ends of the buckets of rows per batch."""

LANE_LABELS = ("policy", "version")

_go_string: Callable[[float], str] = floatToGoString  # untyped; how Prometheus writes a number


class Histogram:
    """Counts per bucket; one thread writes, any may read."""

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

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper end, values up to it), as Prometheus wants it."""
        counts, below = list(self.counts), 0
        result = []
        for bound, count in zip((*self.bounds, float("inf")), counts, strict=True):
            below += count
            result.append((_go_string(bound), float(below)))
        return result


class LaneMetrics:
    """The numbers of one version of one policy; a `LaneObserver`."""

    def __init__(
        self,
        policy: str,
        version: str,
        runtime: str,
        queued_rows: Callable[[], int],
        forget: Callable[[LaneMetrics], None],
    ) -> None:
        self.policy, self.version, self.runtime = policy, version, runtime
        self.queued_rows = queued_rows
        self._forget = forget
        # Written by the event loop:
        self.requests: dict[tuple[str, str, str], int] = {}
        """By (method, code, reason)."""
        self.rows = 0
        self.request_s = Histogram(LATENCY_BOUNDS_S)
        self.queue_s = Histogram(LATENCY_BOUNDS_S)
        self.limited_rows = 0
        self.fallbacks = 0
        # Written by the worker thread:
        self.compute_s = Histogram(LATENCY_BOUNDS_S)
        self.batch_rows = Histogram(ROWS_BOUNDS)
        self.failed_executions = 0
        self.unsound = 0

    def request(
        self, method: str, code: str, reason: str, rows: int, seconds: float, queue_s: float | None
    ) -> None:
        """See `LaneObserver`."""
        key = (method, code, reason)
        self.requests[key] = self.requests.get(key, 0) + 1
        if queue_s is not None:  # only what was computed: refusals are quick, and would flatter the latency
            self.rows += rows
            self.request_s.add(seconds)
            self.queue_s.add(queue_s)

    def executed(self, rows: int, seconds: float, unsound: int) -> None:
        """See `LaneObserver`."""
        self.compute_s.add(seconds)
        self.batch_rows.add(rows)
        self.unsound += unsound

    def execution_failed(self) -> None:
        """See `LaneObserver`."""
        self.failed_executions += 1

    def adjusted(self, *, limited_rows: int, fallback: bool) -> None:
        """See `LaneObserver`."""
        self.limited_rows += limited_rows
        self.fallbacks += fallback

    def closed(self) -> None:
        """See `LaneObserver`."""
        self._forget(self)


class Telemetry:
    """The numbers of a server; an `Observer`, and a collector of its own Prometheus registry."""

    def __init__(self) -> None:
        self._lanes: dict[tuple[str, str], LaneMetrics] = {}
        self._started_s = time.monotonic()
        self.toolkit = metadata.version("rsm-toolkit")
        self._load_lock = threading.Lock()
        self.refusals: dict[tuple[str, str, str], int] = {}
        """Requests for no policy that is here, by (method, code, reason)."""
        self.loads: dict[tuple[str, str], int] = {}
        """By (policy, "ok" or "failed")."""
        self.load_s: dict[str, float] = {}
        """How long a policy's last successful load took."""
        self.open_streams = 0
        self.recorded: RecordCounts | None = None
        """What became of the records of `--record`; None without it."""
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def lane(self, policy: str, version: str, runtime: str, queued_rows: Callable[[], int]) -> LaneMetrics:
        """See `Observer`."""
        metrics = LaneMetrics(policy, version, runtime, queued_rows, self._forget)
        self._lanes[policy, version] = metrics
        return metrics

    def refused(self, method: str, code: str, reason: str) -> None:
        """See `Observer`."""
        key = (method, code, reason)
        self.refusals[key] = self.refusals.get(key, 0) + 1

    def loaded(self, policy: str, seconds: float, *, failed: bool) -> None:
        """See `Observer`."""
        key = (policy, "failed" if failed else "ok")
        with self._load_lock:
            self.loads[key] = self.loads.get(key, 0) + 1
            if not failed:
                self.load_s[policy] = seconds

    def streams(self, change: int) -> None:
        """See `Observer`."""
        self.open_streams += change

    @property
    def uptime_s(self) -> float:
        """Seconds since the process began to serve, or to load."""
        return time.monotonic() - self._started_s

    def lanes(self) -> list[LaneMetrics]:
        """By name and version."""
        return sorted(self._lanes.values(), key=lambda lane: (lane.policy, int(lane.version)))

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """(text, content type): Prometheus' format, or OpenMetrics' where an Accept header asks for it."""
        try:
            encode, content_type = choose_encoder(accept)
        except Exception:  # a version such as 1.x, for which the library raises what comes
            encode, content_type = choose_encoder("")
        return encode(self._registry), content_type

    def collect(self) -> Iterator[Metric]:
        """What `prometheus_client` calls."""
        lanes = self.lanes()
        yield from self._of_server()
        yield self._requests(lanes)
        for name, text, count in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=LANE_LABELS)
            for lane in lanes:
                counter.add_metric((lane.policy, lane.version), count(lane))
            yield counter
        for name, text, pick in _HISTOGRAMS:
            family = HistogramMetricFamily(name, text, labels=LANE_LABELS)
            for lane in lanes:
                histogram = pick(lane)
                family.add_metric((lane.policy, lane.version), histogram.cumulative(), histogram.total)
            yield family
        queued = GaugeMetricFamily("rsm_queue_rows", "Rows that wait.", labels=LANE_LABELS)
        info = GaugeMetricFamily("rsm_policy_info", "What computes.", labels=(*LANE_LABELS, "runtime"))
        for lane in lanes:
            queued.add_metric((lane.policy, lane.version), lane.queued_rows())
            info.add_metric((lane.policy, lane.version, lane.runtime), 1)
        yield from (queued, info)

    def _of_server(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("rsm_build_info", "What runs.", labels=("version", "python"))
        build.add_metric((self.toolkit, platform.python_version()), 1)
        yield build
        yield GaugeMetricFamily("rsm_streams_open", "Streams that are open.", value=self.open_streams)
        loads = CounterMetricFamily("rsm_loads", "Bundles loaded.", labels=("policy", "result"))
        seconds = GaugeMetricFamily("rsm_load_seconds", "Of the last successful load.", labels=("policy",))
        with self._load_lock:
            for key, count in self.loads.items():
                loads.add_metric(key, count)
            for policy, last_s in self.load_s.items():
                seconds.add_metric((policy,), last_s)
        yield from (loads, seconds)
        if self.recorded is not None:
            yield CounterMetricFamily("rsm_records", "Requests recorded.", value=self.recorded.written)
            dropped = CounterMetricFamily("rsm_dropped_records", "Not recorded.", labels=("reason",))
            for reason, count in self.recorded.dropped.items():
                dropped.add_metric((reason,), count)
            yield dropped

    def _requests(self, lanes: Sequence[LaneMetrics]) -> Metric:
        requests = CounterMetricFamily(
            "rsm_requests", "Requests, settled.", labels=(*LANE_LABELS, "method", "code", "reason")
        )
        for key, count in self.refusals.items():
            requests.add_metric(("", "", *key), count)
        for lane in lanes:
            for key, count in lane.requests.items():
                requests.add_metric((lane.policy, lane.version, *key), count)
        return requests

    def _forget(self, lane: LaneMetrics) -> None:
        if self._lanes.get((lane.policy, lane.version)) is lane:  # not of one that was loaded again since
            del self._lanes[lane.policy, lane.version]


_COUNTERS: tuple[tuple[str, str, Callable[[LaneMetrics], int]], ...] = (
    ("rsm_rows", "Rows answered.", lambda lane: lane.rows),
    ("rsm_executions", "Batches computed.", lambda lane: sum(lane.compute_s.counts)),
    ("rsm_failed_executions", "Batches that failed as a whole.", lambda lane: lane.failed_executions),
    (
        "rsm_unsound_answers",
        "Requests refused because an action or value was not finite or out of bounds.",
        lambda lane: lane.unsound,
    ),
    ("rsm_limited_actions", "Actions clipped by --max-action-step.", lambda lane: lane.limited_rows),
    ("rsm_fallback_answers", "Requests answered by --fallback.", lambda lane: lane.fallbacks),
)

_HISTOGRAMS: tuple[tuple[str, str, Callable[[LaneMetrics], Histogram]], ...] = (
    ("rsm_request_seconds", "From arrival to the answer, of what was computed.", lambda lane: lane.request_s),
    ("rsm_queue_seconds", "From arrival to the batch being formed.", lambda lane: lane.queue_s),
    ("rsm_compute_seconds", "Of one batch: stacking, noise and the graph.", lambda lane: lane.compute_s),
    ("rsm_batch_rows", "Rows computed together.", lambda lane: lane.batch_rows),
)
