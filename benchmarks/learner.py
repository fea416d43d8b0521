"""Speed of learning: seconds per update and per action, and the share of the machine's own matrix rate.

    python benchmarks/learner.py [--setting full] [--threads 1] [--updates 5] [--out FILE]

The matrix rate is that of a float32 product of the setting's shapes, measured in the same run: a program
that did nothing but its matrix products at that rate would have a fraction of 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import write_record

from rsm_train.algorithms.common import Batch
from rsm_train.algorithms.dpmd import DPMD, DPMDConfig
from rsm_train.config import PRESETS
from rsm_train.networks import mish

FULL = DPMDConfig()
QUICK_SETTINGS = PRESETS["quick"].of("dpmd")
QUICK = DPMDConfig(**{name: value for name, value in QUICK_SETTINGS.items() if hasattr(DPMDConfig, name)})
# setting: (configuration, observation size, action size, batch size)
SETTINGS = {
    "full": (FULL, 17, 6, 256),
    "humanoid": (FULL, 348, 17, 256),
    "quick": (QUICK, 4, 1, QUICK_SETTINGS["batch_size"]),
}
ACTING_ENVS = 5


def update_flops(c: DPMDConfig, obs: int, action: int, batch: int) -> float:
    """Floating-point operations of the matrix products of one update, the policy's share averaged."""
    body = (c.depth - 1) * c.width**2
    denoise = 2 * (action * c.width + body + c.width * action)  # a row of one step
    value = 2 * 2 * (action * c.width + body + c.width)  # a particle, both critics
    first = 2 * obs * c.width  # an observation, once per network
    target = c.target_particles * (c.diffusion_steps * denoise + value) + value + 5 * first
    critic = 3 * (value + 2 * first)
    policy = c.policy_samples * (c.diffusion_steps * denoise + value + 3 * denoise) + 6 * first
    return batch * (target + critic + policy / c.policy_every)


def median_s(call: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call, after one that warms up."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def matrix_rate(width: int, rows: int) -> float:
    """Floating-point operations per second of [rows, width] @ [width, width], float32."""
    x, w = torch.randn(rows, width), torch.randn(width, width)
    return 2 * rows * width * width / median_s(lambda: x @ w, 50)


def measure(setting: str, updates: int) -> dict[str, Any]:
    config, obs, action, batch_size = SETTINGS[setting]
    generator = torch.Generator().manual_seed(0)
    algorithm = DPMD(config, obs, action, generator=generator)
    batch = Batch(
        obs=torch.randn(batch_size, obs),
        action=torch.rand(batch_size, action) * 2 - 1,
        reward=torch.randn(batch_size),
        next_obs=torch.randn(batch_size, obs),
        terminated=torch.zeros(batch_size),
    )

    def period() -> None:
        for _ in range(config.policy_every):
            algorithm.update(batch, algorithm.draw_noise(batch_size, generator))

    acting = [
        torch.randn(ACTING_ENVS, *shape)
        for shape in ((obs,), (config.diffusion_steps, config.particles, action), (action,))
    ]
    rate = matrix_rate(config.width, batch_size * config.policy_samples)
    seconds = median_s(period, updates) / config.policy_every
    flops = update_flops(config, obs, action, batch_size)
    rows = torch.randn(batch_size * config.policy_samples, config.width)
    with torch.no_grad():
        mish_ratio = median_s(lambda: torch.nn.functional.mish(rows), 50) / median_s(lambda: mish(rows), 50)
    return {
        "setting": setting,
        "threads": torch.get_num_threads(),
        "update_s": round(seconds, 5),
        "act_ms": round(1e3 * median_s(lambda: algorithm.act(*acting), 20), 3),
        "update_gflop": round(flops / 1e9, 3),
        "gflop_per_s": round(flops / seconds / 1e9, 1),
        "matrix_gflop_per_s": round(rate / 1e9, 1),
        "fraction_of_matrix_rate": round(flops / seconds / rate, 3),
        "torch_mish_over_ours": round(mish_ratio, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, action="append")
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = []
    for threads in options.threads or [1]:
        torch.set_num_threads(threads)
        results += [measure(setting, options.updates) for setting in options.setting or SETTINGS]
    write_record({"results": results}, options.out)


if __name__ == "__main__":
    main()
