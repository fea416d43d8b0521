"""The latency of one client in a closed loop, by stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsm_common.policy import STAGES, ActResult, Timing


def measure(
    act: Callable[[NDArray[np.float32]], ActResult], obs: NDArray[np.float32], steps: int, warm_up: int
) -> dict[str, Any]:
    """Percentiles in microseconds of every stage, and steps per second."""
    for _ in range(warm_up):
        act(obs)
    started = time.perf_counter()
    stages = np.array([_stages(act(obs).timing) for _ in range(steps)])
    seconds = time.perf_counter() - started
    result: dict[str, Any] = {
        stage: {f"p{p}_us": round(float(np.percentile(column, p)), 1) for p in (50, 90, 99)}
        for stage, column in zip(STAGES, stages.T, strict=True)
    }
    return {**result, "steps_per_s": round(steps / seconds, 1)}


def _stages(timing: Timing) -> tuple[float, ...]:
    known = timing.queue_us + timing.batch_us + timing.compute_us
    # The rest is transport, encoding and the event loops of both processes.
    return timing.queue_us, timing.batch_us, timing.compute_us, timing.total_us - known, timing.total_us


def table(report: dict[str, Any]) -> str:
    """The measurements as text."""
    lines = [f"{report['policy']}, {report['steps']} steps of {report['rows']} row(s), microseconds"]
    for mode in ("act", "stream"):
        if mode in report:
            lines.append(
                f"{mode:8s} {'p50':>9s} {'p90':>9s} {'p99':>9s}   {report[mode]['steps_per_s']} steps/s"
            )
            for stage in STAGES:
                lines.append(f"  {stage:7s}" + "".join(f"{v:10.1f}" for v in report[mode][stage].values()))
    return "\n".join(lines)
