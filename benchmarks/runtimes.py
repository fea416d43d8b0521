"""Time of one inference in every installed CPU runtime, interleaved, against onnxruntime.

    python benchmarks/runtimes.py [--steps 20] [--particles 1 --particles 32] [--seconds 4] [--out FILE]

The graph is exported here: 17 observations, 6 actions, three layers of 256 units in policy and critics,
random weights. Each round runs every runtime once, so that all see the same machine; times are medians, and
ratios are medians of a round's ratios. OpenVINO is also timed with one graph for any batch size
(openvino-any-batch), to show why the session has one graph per power of two. Times include copying inputs and
outputs, as in serving.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from random_policy import make_bundle
from record import write_record

from rsm_common.seeds import draw_noise, expand_seed
from rsm_common.spec import PolicySpec
from rsm_serve.bundle.contract import Bundle
from rsm_serve.sessions.choice import open_session
from rsm_serve.sessions.openvino import OpenVINOSession

BATCH_SIZES = (1, 3, 5, 8, 33, 64)
"""3, 5 and 33 leave rows of OpenVINO's fixed batches idle, or take two of them."""
BACKENDS = ("onnxruntime", "openvino", "openvino-bf16")
BASE = "onnxruntime"
WARM_UP, FEWEST = 3, 20

Run = Callable[[NDArray[np.float32], NDArray[np.float32]], object]


def any_batch(bundle: Bundle) -> Run:
    """OpenVINO with the session's settings, and one graph for any batch size."""
    import openvino

    session = OpenVINOSession(bundle.model, bundle.spec)
    core = openvino.Core()
    graph = core.read_model(model=bundle.model, weights=b"")
    request = core.compile_model(graph, "CPU", session._settings).create_infer_request()

    def run(obs_BO: NDArray[np.float32], noise_BTNA: NDArray[np.float32]) -> object:
        request.infer({"obs": obs_BO, "noise": noise_BTNA}, share_inputs=True)
        return [tensor.data.copy() for tensor in request.output_tensors]

    return run


def time_us(runs: dict[str, Run], spec: PolicySpec, rows: int, seconds: float) -> dict[str, list[float]]:
    """Times of each runtime, round by round."""
    obs_BO = np.random.default_rng(0).normal(size=(rows, spec.observation.size)).astype(np.float32)
    noise_BTNA = draw_noise(expand_seed(0, rows), spec.noise_shape)
    found: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < WARM_UP + FEWEST or time.perf_counter() < end:
        for name, run in runs.items():
            started = time.perf_counter()
            run(obs_BO, noise_BTNA)
            if rounds >= WARM_UP:
                found[name].append(1e6 * (time.perf_counter() - started))
        rounds += 1
    return found


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    report: dict[str, Any] = {"rounds": len(times[BASE])}
    for name, values in times.items():
        ratio = np.median(np.array(values) / np.array(times[BASE]))
        report[name] = {
            "median_us": round(float(np.median(values)), 1),
            f"of_{BASE}": round(float(ratio), 2),
        }
    return report


def measure(steps: int, particles: int, seconds: float) -> dict[str, Any]:
    bundle = make_bundle(steps, particles)
    sessions = {name: open_session(bundle, name) for name in BACKENDS}
    runs: dict[str, Run] = {name: session.run for name, session in sessions.items()}
    runs["openvino-any-batch"] = any_batch(bundle)
    times = {str(rows): summary(time_us(runs, bundle.spec, rows, seconds)) for rows in BATCH_SIZES}
    return {"runtimes": {name: session.runtime for name, session in sessions.items()}, "batch": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="T")
    parser.add_argument("--particles", type=int, action="append", help="N; may be repeated  [1 and 32]")
    parser.add_argument("--seconds", type=float, default=4.0, help="per batch size")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"threads": 1, "steps": options.steps}
    for particles in options.particles or (1, 32):
        results[f"particles_{particles}"] = measure(options.steps, particles, options.seconds)
    write_record(results, options.out)


if __name__ == "__main__":
    main()
