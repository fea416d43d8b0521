"""Speed of learning: seconds per update and per action, and the share of the machine's own matrix rate.

    python benchmarks/learner.py [--setting dpmd] [--threads 2] [--precision bf16] [--peer FILE] [--out FILE]

Settings are B = 256, T = 20, N = 32, 3 x 256 networks. dpmd, sdac and humanoid do the work of the published
program (preset `reference`) and are compared with its published times and, with --peer, with the times that
benchmarks/jax_peer.py took on this machine; dpmd-paper and sdac-paper are the default presets.

The matrix rate is the best of the float32 (or bf16) products that torch and oneDNN do on this machine in the
same run. A program that only computed its matrix products at that rate would have a fraction of 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import write_record

from rsm_train.algorithms.common import Algorithm, Batch
from rsm_train.algorithms.critic_config import CriticConfig
from rsm_train.algorithms.dpmd import DPMDConfig
from rsm_train.algorithms.sac import SACConfig
from rsm_train.algorithms.sdac import SDACConfig
from rsm_train.config import find_algorithm, resolve
from rsm_train.model import kernels
from rsm_train.model.kernels import Compute
from rsm_train.model.networks import mish

HALF_CHEETAH, HUMANOID, PENDULUM = (17, 6), (348, 17), (4, 1)
# setting: (algorithm, preset, (observation size, action size))
SETTINGS = {
    "dpmd": ("dpmd", "reference", HALF_CHEETAH),
    "sdac": ("sdac", "reference", HALF_CHEETAH),
    "humanoid": ("dpmd", "reference", HUMANOID),
    "dpmd-paper": ("dpmd", "paper", HALF_CHEETAH),
    "sdac-paper": ("sdac", "paper", HALF_CHEETAH),
    "quick": ("dpmd", "quick", PENDULUM),
    "quick-sdac": ("sdac", "quick", PENDULUM),
    "quick-sac": ("sac", "quick", PENDULUM),
}
ACTING_ENVS = 5
PUBLISHED_S = {"dpmd": 0.52, "sdac": 1.48, "humanoid": 1.05, "acting": 0.017}
"""The authors' program, JAX 0.4.27 on two cores of a machine of this class (not measured here)."""


def update_flops(c: CriticConfig, obs: int, action: int, batch: int) -> float:
    """Floating-point operations of the matrix products of one update, the policy's share averaged."""
    body = (c.depth - 1) * c.width**2
    if isinstance(c, SACConfig):
        sample = 2 * (obs * c.width + body + 2 * action * c.width)
        values = 2 * c.critics * ((obs + action) * c.width + body + c.width)
        # The policy's loss takes the gradient of the values by the action only.
        return batch * (sample + 4 * values + (3 * sample + 2 * values) / c.policy_every)
    assert isinstance(c, DPMDConfig | SDACConfig)
    denoise = 2 * (2 * action * c.width + body)  # a particle's step
    value = 2 * c.critics * (action * c.width + body + c.width)  # a particle
    first = 2 * obs * c.width  # an observation, per network and use

    def best_of(particles: int) -> float:
        chain = first + particles * c.diffusion_steps * denoise
        return chain + (0 if particles == 1 else c.critics * first + particles * value)

    # The TD target, and the critics forward and backward.
    critic = best_of(c.target_particles) + 4 * (value + c.critics * first)
    if isinstance(c, SDACConfig):
        draws = c.critics * first + c.reverse_samples * value
        proposal = best_of(c.proposal_particles) if c.proposal_actions == "policy" else 0
        policy = proposal + draws + 3 * (first + denoise)
    elif c.policy_actions == "backup":
        policy = c.critics * first + value + 3 * (first + denoise)
    else:
        chains = first + (c.policy_chains or c.policy_samples) * c.diffusion_steps * denoise
        weighing = c.critics * first + c.policy_samples * value
        learnt = 1 if c.resample_actions else c.policy_samples
        policy = chains + weighing + 3 * (first + learnt * denoise)
    return batch * (critic + policy / c.policy_every)


def medians_s(calls: Sequence[Callable[[], object]], repeats: int, warm_up: int = 2) -> list[float]:
    """Median wall time of each call, after some that warm up; the calls take turns."""
    times: list[list[float]] = [[] for _ in calls]
    for i in range(warm_up + repeats):
        for call, taken in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            if i >= warm_up:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


def median_s(call: Callable[[], object], repeats: int, warm_up: int = 2) -> float:
    """Median wall time of a call, after some that warm up."""
    return medians_s([call], repeats, warm_up)[0]


@torch.no_grad()
def matrix_rates(width: int, rows: int, dtype: torch.dtype) -> tuple[float, float]:
    """Operations per second of [rows, width] @ [width, width]: of torch, and the best of torch and oneDNN."""
    x, w, b = (torch.randn(*shape).to(dtype) for shape in ((rows, width), (width, width), (width,)))
    flops = 2 * rows * width * width
    own = flops / median_s(lambda: torch.nn.functional.linear(x, w, b), 50)
    ours = flops / median_s(lambda: kernels.linear(x, w, b), 50)
    return own, max(own, ours)


def measure(setting: str, updates: int, compute: Compute, peer: dict[str, float]) -> dict[str, Any]:
    """One setting's figures."""
    algo, preset, (obs, action) = SETTINGS[setting]
    run, config = resolve({"env": "benchmark", "algo": algo, "preset": preset})
    assert isinstance(config, CriticConfig)
    small = preset == "quick"
    generator = torch.Generator().manual_seed(0)
    kinds = [compute, replace(compute, compile=False)] if compute.compile else [compute]
    make = partial(find_algorithm(algo), config, obs, action, generator=generator, device="cpu")
    algorithms = [make(compute=kind) for kind in kinds]
    rows = run.batch_size
    batch = Batch(
        obs=torch.randn(rows, obs),
        action=torch.rand(rows, action) * 2 - 1,
        reward=torch.randn(rows),
        next_obs=torch.randn(rows, obs),
        terminated=torch.zeros(rows),
    )

    def period(algorithm: Algorithm) -> None:
        for _ in range(config.policy_every):
            algorithm.update(batch, algorithm.draw_noise(rows, generator))

    periods = [partial(period, algorithm) for algorithm in algorithms]
    agent = algorithms[0].agent
    shapes = ((obs,), (agent.sampler.chain_length, agent.sampler.particles, action), (action,))
    acting = [torch.randn(ACTING_ENVS, *shape) for shape in shapes]
    started = time.perf_counter()
    periods[0]()
    first_s = time.perf_counter() - started
    torch_rate, rate = matrix_rates(config.width, 1024, compute.dtype)
    # Small updates are short: many of them, or the median is that of the neighbours on the machine.
    medians = medians_s(periods, 200 if small else updates)
    seconds = medians[0] / config.policy_every
    act_s = median_s(lambda: agent.act(*acting), 50)
    flops = update_flops(config, obs, action, rows)
    result = {
        "setting": setting,
        "preset": preset,
        "precision": compute.precision,
        "compiled": compute.compile,
        "threads": torch.get_num_threads(),
        "update_s": round(seconds, 5),
        "act_ms": round(1e3 * act_s, 3),
        "first_updates_s": round(first_s, 1),
        "update_gflop": round(flops / 1e9, 3),
        "gflop_per_s": round(flops / seconds / 1e9, 1),
        "torch_matrix_gflop_per_s": round(torch_rate / 1e9, 1),
        "matrix_gflop_per_s": round(rate / 1e9, 1),
        "fraction_of_matrix_rate": round(flops / seconds / rate, 3),
    }
    if len(medians) == 2:
        result["eager_over_ours"] = round(medians[1] / medians[0], 2)
    for name, times in (("published", PUBLISHED_S), ("jax_peer", peer)):
        if setting in times:
            result[f"{name}_over_ours"] = round(times[setting] / seconds, 2)
            if setting == "dpmd":
                result[f"{name}_acting_over_ours"] = round(times["acting"] / act_s, 2)
    return result


@torch.no_grad()
def mish_ratio(*shape: int) -> float:
    """Time of torch's mish over that of ours, uncompiled."""
    x = torch.randn(shape)
    return round(median_s(lambda: torch.nn.functional.mish(x), 20) / median_s(lambda: mish(x), 20), 2)


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, action="append")
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--precision", choices=["fp32", "bf16"], action="append")
    parser.add_argument("--compile", choices=["on", "off"], default="on")
    parser.add_argument("--updates", type=int, default=7)
    parser.add_argument("--peer", type=Path, help="what benchmarks/jax_peer.py wrote, with as many threads")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    record = json.loads(options.peer.read_text()) if options.peer else {}
    results = []
    for threads in options.threads or [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        peer = record.get("seconds", {}) if record.get("threads") == threads else {}
        for precision in options.precision or ["fp32"]:
            compute = Compute(precision, options.compile == "on")
            for setting in options.setting or SETTINGS:
                results.append(measure(setting, options.updates, compute, peer))
    write_record(
        {
            "results": results,
            "published_s": PUBLISHED_S,
            "peer": record,
            "torch_mish_over_ours": {"1024 x 64": mish_ratio(1024, 64), "8192 x 256": mish_ratio(8192, 256)},
        },
        options.out,
    )


if __name__ == "__main__":
    main()
