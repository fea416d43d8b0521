"""The data of the status page: what is served, and the counts and histograms of each lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rsm_serve.engine.lane import Lane
from rsm_serve.engine.registry import Registry
from rsm_serve.observe.prometheus import LATENCY_BOUNDS_S, ROWS_BOUNDS, Histogram, LaneMetrics, Telemetry


def status_data(
    state: str, addresses: Sequence[str], registry: Registry, telemetry: Telemetry
) -> dict[str, Any]:
    """The status of a server, as data for JSON.

    Args:
        state: of the server.
        addresses: that gRPC listens on.
        registry: the loaded policies.
        telemetry: the counts.
    """
    metrics = {(lane.policy, lane.version): lane for lane in telemetry.lanes()}
    return {
        "state": state,
        "toolkit": telemetry.toolkit,
        "uptime_s": round(telemetry.uptime_s, 3),
        "addresses": addresses,
        "streams": telemetry.open_streams,
        "latency_bounds_s": LATENCY_BOUNDS_S,
        "rows_bounds": ROWS_BOUNDS,
        "loads": [
            {"policy": policy, "result": result, "count": count}
            for (policy, result), count in telemetry.loads.items()
        ],
        "refused": _counts(telemetry.refusals),
        "policies": [
            _lane_status(lane, registry, state, metrics.get((lane.spec.name, lane.spec.version)))
            for lane in registry.lanes
        ],
    }


def _lane_status(lane: Lane, registry: Registry, state: str, metrics: LaneMetrics | None) -> dict[str, Any]:
    status: dict[str, Any] = {
        "name": lane.spec.name,
        "version": lane.spec.version,
        "default": registry.current_lane(lane.spec.name) is lane,
        "state": state,
        "runtime": lane.runtime,
        "max_batch_size": lane.limits.max_batch_size,
        "probe_rows": len(lane.probe_obs),
        "queued_rows": lane.batcher.queued_rows,
    }
    if metrics is not None:
        status |= {
            "requests": _counts(metrics.requests),
            "rows": metrics.rows,
            "failed_executions": metrics.failed_executions,
            "unsound": metrics.unsound,
            "request_s": _histogram(metrics.request_s),
            "queue_s": _histogram(metrics.queue_s),
            "compute_s": _histogram(metrics.compute_s),
            "batch_rows": _histogram(metrics.batch_rows),
        }
    return status


def _counts(counts: Mapping[tuple[str, str, str], int]) -> list[dict[str, Any]]:
    return [
        {"method": method, "code": code, "reason": reason, "count": count}
        for (method, code, reason), count in counts.items()
    ]


def _histogram(histogram: Histogram) -> dict[str, Any]:
    return {"counts": histogram.counts, "sum": histogram.total}
