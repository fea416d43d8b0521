"""The counts of a server in the formats of Prometheus and OpenMetrics."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.utils import floatToGoString

from rsm_serve.observe.counts import Histogram, LaneCounts, ServerCounts

LANE_LABELS = ("policy", "version")

_go_string: Callable[[float], str] = floatToGoString  # untyped; writes a number as Prometheus does


def cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    """Return (upper end, number of values up to it) of every bucket, as Prometheus wants it."""
    counts, below = list(histogram.counts), 0
    result = []
    for bound, count in zip((*histogram.bounds, float("inf")), counts, strict=True):
        below += count
        result.append((_go_string(bound), float(below)))
    return result


class Exposition:
    """Shows the counts of a server to Prometheus; a collector of its own registry.

    Args:
        counts: what is shown.
    """

    def __init__(self, counts: ServerCounts) -> None:
        self._counts = counts
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return (text, content type): Prometheus' format, or OpenMetrics' if the Accept header asks for it."""
        try:
            encode, content_type = choose_encoder(accept)
        except Exception:  # the library raises various errors for a version such as 1.x
            encode, content_type = choose_encoder("")
        return encode(self._registry), content_type

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics; called by `prometheus_client`."""
        lanes = self._counts.lanes
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
                family.add_metric((lane.policy, lane.version), cumulative(histogram), histogram.total)
            yield family
        queued = GaugeMetricFamily("rsm_queue_rows", "Rows that wait.", labels=LANE_LABELS)
        info = GaugeMetricFamily("rsm_policy_info", "What computes.", labels=(*LANE_LABELS, "runtime"))
        for lane in lanes:
            queued.add_metric((lane.policy, lane.version), lane.queued_rows())
            info.add_metric((lane.policy, lane.version, lane.runtime), 1)
        yield from (queued, info)

    def _of_server(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("rsm_build_info", "What runs.", labels=("version", "python"))
        build.add_metric((self._counts.toolkit, platform.python_version()), 1)
        yield build
        yield GaugeMetricFamily("rsm_streams_open", "Streams that are open.", value=self._counts.open_streams)
        loads = CounterMetricFamily("rsm_loads", "Bundles loaded.", labels=("policy", "result"))
        seconds = GaugeMetricFamily("rsm_load_seconds", "Of the last successful load.", labels=("policy",))
        counts, last = self._counts.load_counts()
        for key, count in counts.items():
            loads.add_metric(key, count)
        for policy, last_s in last.items():
            seconds.add_metric((policy,), last_s)
        yield from (loads, seconds)
        recorded = self._counts.recorded
        if recorded is not None:
            yield CounterMetricFamily("rsm_records", "Requests recorded.", value=recorded.written)
            dropped = CounterMetricFamily("rsm_dropped_records", "Not recorded.", labels=("reason",))
            for reason, count in recorded.dropped.items():
                dropped.add_metric((reason,), count)
            yield dropped

    def _requests(self, lanes: Sequence[LaneCounts]) -> Metric:
        requests = CounterMetricFamily(
            "rsm_requests", "Requests, settled.", labels=(*LANE_LABELS, "method", "code", "reason")
        )
        for key, count in self._counts.refusals.items():
            requests.add_metric(("", "", *key), count)
        for lane in lanes:
            for key, count in lane.requests.items():
                requests.add_metric((lane.policy, lane.version, *key), count)
        return requests


_COUNTERS: tuple[tuple[str, str, Callable[[LaneCounts], int]], ...] = (
    ("rsm_rows", "Rows answered.", lambda lane: lane.rows),
    (
        "rsm_executions",
        "Batches computed, also those whose callers had left.",
        lambda lane: sum(lane.compute_s.counts),
    ),
    ("rsm_failed_executions", "Batches that failed as a whole.", lambda lane: lane.failed_executions),
    (
        "rsm_unsound_answers",
        "Requests refused because an action or value was not finite or out of bounds.",
        lambda lane: lane.unsound,
    ),
    ("rsm_limited_actions", "Actions clipped by --max-action-step.", lambda lane: lane.limited_rows),
    ("rsm_fallback_answers", "Requests answered by --fallback.", lambda lane: lane.fallbacks),
)

_HISTOGRAMS: tuple[tuple[str, str, Callable[[LaneCounts], Histogram]], ...] = (
    ("rsm_request_seconds", "From arrival to the answer.", lambda lane: lane.request_s),
    ("rsm_queue_seconds", "From arrival to the batch being formed.", lambda lane: lane.queue_s),
    ("rsm_compute_seconds", "Of one batch: stacking, noise and the graph.", lambda lane: lane.compute_s),
    ("rsm_batch_rows", "Rows computed together.", lambda lane: lane.batch_rows),
)
