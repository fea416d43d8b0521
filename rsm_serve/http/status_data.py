"""The data of the status page: what is served, and the counts and histograms of each lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rsm_serve.engine.lane import Lane
from rsm_serve.engine.registry import Registry
from rsm_serve.observe.counts import LATENCY_BOUNDS_S, ROWS_BOUNDS, Histogram, ServerCounts


def status_data(
    state: str, addresses: Sequence[str], registry: Registry, counts: ServerCounts
) -> dict[str, Any]:
    """The status of a server, as data for JSON.

    Args:
        state: of the server.
        addresses: that gRPC listens on.
        registry: the loaded policies.
        counts: of the server.
    """
    return {
        "state": state,
        "toolkit": counts.toolkit,
        "uptime_s": round(counts.uptime_s, 3),
        "addresses": addresses,
        "streams": counts.open_streams,
        "latency_bounds_s": LATENCY_BOUNDS_S,
        "rows_bounds": ROWS_BOUNDS,
        "loads": [
            {"policy": policy, "result": result, "count": count}
            for (policy, result), count in counts.loads.items()
        ],
        "refused": _counts(counts.refusals),
        "policies": [_lane_status(lane, registry, state) for lane in registry.lanes],
    }


def _lane_status(lane: Lane, registry: Registry, state: str) -> dict[str, Any]:
    counts = lane.counts
    return {
        "name": lane.spec.name,
        "version": lane.spec.version,
        "default": registry.current_lane(lane.spec.name) is lane,
        "state": state,
        "runtime": lane.runtime,
        "max_batch_size": lane.limits.max_batch_size,
        "probe_rows": len(lane.probe_obs),
        "queued_rows": lane.batcher.queued_rows,
        "requests": _counts(counts.requests),
        "rows": counts.rows,
        "failed_executions": counts.failed_executions,
        "unsound": counts.unsound,
        "request_s": _histogram(counts.request_s),
        "queue_s": _histogram(counts.queue_s),
        "compute_s": _histogram(counts.compute_s),
        "batch_rows": _histogram(counts.batch_rows),
    }


def _counts(counts: Mapping[tuple[str, str, str], int]) -> list[dict[str, Any]]:
    return [
        {"method": method, "code": code, "reason": reason, "count": count}
        for (method, code, reason), count in counts.items()
    ]


def _histogram(histogram: Histogram) -> dict[str, Any]:
    return {"counts": histogram.counts, "sum": histogram.total}
