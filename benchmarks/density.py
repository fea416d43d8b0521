"""Compare learnt policies with the exact densities of a problem with a known Q.

    python benchmarks/density.py [--out FILE] [--picture FILE]

One state, two action dimensions, one step. Q(a) = log sum_i m_i N(a; mu_i, 0.2^2 I) and a constant: four
separated modes of mass 0.4, 0.3, 0.2 and 0.1. The algorithms are those of rsm-train, whose critics are replaced
by this Q.

- SDAC must arrive at exp(Q / lambda) / Z. With lambda = 1 that is the mixture itself.
- DPMD's k-th policy must be pi_0 exp(k Q / lambda) / Z_k. With lambda = 2 and pi_0 uniform, the second is the
  mixture. pi_k is a copy, renewed at every step of mirror descent (`old_policy_every`).
- With the preset `kl` a step also widens the policy by its proposal noise, and reweights it with the
  temperature that it has tuned to KL = 2; on a grid that is exact as well.
- With the published program's deviations 1 (the slip in the scaling of Q) and 3 (the policy learns the best of
  32 of its own actions), DPMD must not arrive there; and SDAC not with deviation 5 and the best of 32 as a_t.
- Sampling in bf16 must stay within the same bounds.

A correct policy is not exact: denoising in T = 20 steps has an error of its own, 0.08 nats for the mixture even
with the exact denoiser (`floor` in the record), and each step of mirror descent learns from such samples.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import write_record
from torch import Tensor

from rsm_train.algorithms.common import Batch, load_params
from rsm_train.algorithms.dpmd import DPMD, DPMDConfig, policy_loss
from rsm_train.algorithms.sdac import SDAC, SDACConfig
from rsm_train.config import resolve
from rsm_train.model.diffusion import make_schedule, reverse_chain
from rsm_train.model.inference import Inference
from rsm_train.model.kernels import Compute, Precision

MODES = torch.tensor([[-0.5, 0.5], [0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]])
MASSES = torch.tensor([0.4, 0.3, 0.2, 0.1])
MODE_STD = 0.2
BINS = 20
SAMPLES = 20_000
MAX_KL = {"SDAC": 0.2, "DPMD": 0.5}
"""Nats between the histogram of a right policy and the exact density (about 0.01 of it is sampling error)."""
MAX_MASS_ERROR = 0.05

SMALL: dict[str, Any] = {
    "env": "density",
    "width": 64,
    "depth": 2,
    "policy_lr": 1e-2,
    "policy_every": 1,
    "prior_std": 1.0,
    "noisy_backup": False,
    "target_particles": 1,
}
"""Smaller settings: the problem is small and has neither TD targets nor exploration."""


def known_q(action: Tensor) -> Tensor:
    """Q of actions [..., 2]."""
    squares = (action.unsqueeze(-2) - MODES.to(action)).square().sum(-1)
    return torch.logsumexp(MASSES.log().to(action) - squares / (2 * MODE_STD**2), dim=-1)


class KnownQ(Inference):
    """The policy's sampler, with every critic replaced by the known Q."""

    def __init__(self, inner: Inference) -> None:
        vars(self).update(vars(inner))

    def values(self, critics: Mapping[str, Tensor], obs_BO: Tensor, action_BNA: Tensor) -> Tensor:
        """See `Inference.values`."""
        return known_q(action_BNA).expand(2, -1, -1)


# --- exact densities, on a grid of FINE x FINE cells -------------------------------------------------------

FINE = 10 * BINS
Grid = NDArray[np.float64]


def _centers() -> Grid:
    grid: Grid = (np.arange(FINE) + 0.5) * 2 / FINE - 1
    return grid


def uniform() -> Grid:
    """The uniform density over the box; every grid sums to 1."""
    return np.full((FINE, FINE), 1.0 / FINE**2)


def reweighted(density: Grid, temperature: float) -> Grid:
    """density exp(Q / temperature) / Z."""
    x, y = np.meshgrid(_centers(), _centers(), indexing="ij")
    q = known_q(torch.from_numpy(np.stack([x, y], -1))).numpy()
    weighted: Grid = density * np.exp((q - q.max()) / temperature)
    weighted /= weighted.sum()
    return weighted


def widened(density: Grid, std: float) -> Grid:
    """The density of clip(a + std N(0, I), -1, 1); clipped mass lies in the outermost cells."""
    edges = np.linspace(-1, 1, FINE + 1)
    edges[0], edges[-1] = -np.inf, np.inf
    normal = np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)))
    kernel = np.diff(normal((edges[None, :] - _centers()[:, None]) / std), axis=1)  # from a cell to a cell
    wide: Grid = kernel.T @ density @ kernel
    return wide


def coarse(density: Grid) -> Grid:
    """The mass of each of BINS x BINS cells."""
    cells: Grid = density.reshape(BINS, FINE // BINS, BINS, FINE // BINS).sum((1, 3))
    return cells


# --- learning ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """A learnt policy beside the exact density."""

    algorithm: str
    case: str
    histogram: Grid  # [BINS, BINS], sums to 1
    exact: Grid  # [BINS, BINS], sums to 1
    seconds: float

    @property
    def kl(self) -> float:
        """KL(learnt || exact) of the histograms, nats."""
        seen = self.histogram > 0
        return float((self.histogram[seen] * np.log(self.histogram[seen] / self.exact[seen])).sum())

    @property
    def masses(self) -> list[tuple[float, float]]:
        """Learnt and exact mass of each mode's quadrant."""
        return list(zip(_quadrants(self.histogram), _quadrants(self.exact), strict=True))

    @property
    def right(self) -> bool:
        """True if the policy has the exact density, to the stated bounds."""
        errors = [abs(learnt - exact) for learnt, exact in self.masses]
        return self.kl <= MAX_KL[self.algorithm] and max(errors) <= MAX_MASS_ERROR


def _quadrants(cells: Grid) -> list[float]:
    half = BINS // 2
    low, high = slice(0, half), slice(half, BINS)
    return [float(cells[part].sum()) for part in ((low, high), (high, high), (low, low), (high, low))]


def _state(rows: int) -> Batch:
    zeros = torch.zeros(rows, 1)
    return Batch(zeros, torch.zeros(rows, 2), torch.zeros(rows), zeros, torch.ones(rows))


CONSTANT: dict[str, Any] = {"temperature_schedule": "constant", "temperature": 2.0}
"""Settings of a constant temperature, at which two mirror steps give the exact density of temperature 1."""


def learn_sdac(
    preset: str, updates: int, *, seed: int = 0, precision: Precision = "fp32", **changes: Any
) -> Outcome:
    """Learn SDAC's policy with a number of updates at lambda = 1."""
    started = time.perf_counter()
    fixed = {"temperature_schedule": "constant", "temperature": 1.0, "temperature_scale": 1.0}
    _, config = resolve({**SMALL, "algo": "sdac", "preset": preset, **fixed, **changes})
    assert isinstance(config, SDACConfig)
    compute = Compute(precision)
    algorithm = SDAC(config, 1, 2, generator=torch.Generator().manual_seed(seed), compute=compute)
    algorithm.agent.inference = KnownQ(algorithm.agent.inference)
    _leave_out_critics(algorithm)
    generator = torch.Generator().manual_seed(seed + 1)
    for update in range(updates):
        _anneal(algorithm, update / updates, config.policy_lr)
        algorithm.update(_state(256), algorithm.draw_noise(256, generator))
    exact = coarse(reweighted(uniform(), 1.0))
    histogram = _histogram(algorithm, generator)
    case = preset if precision == "fp32" else f"{preset}, {precision}"
    return Outcome("SDAC", case, histogram, exact, time.perf_counter() - started)


def learn_dpmd(
    preset: str,
    iterations: int,
    updates: int,
    *,
    seed: int = 0,
    rows: int = 16,
    precision: Precision = "fp32",
    **changes: Any,
) -> Outcome:
    """Learn DPMD's policy: mirror descent steps from the uniform policy, each a number of updates."""
    started = time.perf_counter()
    # With the reference preset the policy learns from the TD target's actions: there is no pi_k to copy.
    copies = {} if preset == "reference" else {"old_policy_every": updates}
    _, config = resolve({**SMALL, "algo": "dpmd", "preset": preset, **copies, **changes})
    assert isinstance(config, DPMDConfig)
    compute = Compute(precision)
    algorithm = DPMD(config, 1, 2, generator=torch.Generator().manual_seed(seed), compute=compute)
    agent = algorithm.agent
    generator = torch.Generator().manual_seed(seed + 1)
    _make_uniform(algorithm, generator)
    agent.inference = KnownQ(agent.inference)
    _leave_out_critics(algorithm)
    exact = uniform()
    for _ in range(iterations):
        log_alphas = []
        for update in range(updates):
            _anneal(algorithm, update / updates, config.policy_lr)
            log_alphas.append(float(agent.log_alpha))
            algorithm.update(_state(rows), algorithm.draw_noise(rows, generator))
        load_params(agent.policy, agent.policy_average)
        temperature = math.exp(float(np.mean(log_alphas[updates // 2 :])))
        exact = reweighted(
            widened(exact, config.proposal_noise) if config.proposal_noise else exact,
            temperature * config.temperature_scale,
        )
    histogram = _histogram(algorithm, generator)
    case = preset if precision == "fp32" else f"{preset}, {precision}"
    return Outcome("DPMD", case, histogram, coarse(exact), time.perf_counter() - started)


def _leave_out_critics(algorithm: DPMD | SDAC) -> None:
    """Keep the policy's part of each update: the known Q takes nothing from critics, and they cost time.

    The learnt policy is the same, bit for bit. DPMD's preset `reference` needs the TD target's actions, so all
    of its update stays.
    """

    def learn(batch: Batch, noise: Any, *, policy_due: bool) -> Any:
        if isinstance(algorithm, SDAC):
            return algorithm._update_policy(batch, noise)
        return algorithm._update_policy(batch, batch.action, noise)

    if isinstance(algorithm, SDAC) or algorithm.config.policy_actions != "backup":
        vars(algorithm)["_learn_captured"] = learn


def _anneal(algorithm: DPMD | SDAC, share: float, learning_rate: float) -> None:
    """Lower the learning rate to a fiftieth, so that the fit is measured and not its noise."""
    algorithm.agent.policy_optimizer.learning_rate.fill_(learning_rate * 0.02**share)


def _make_uniform(algorithm: DPMD, generator: torch.Generator, updates: int = 1500) -> None:
    """Fit pi_0 to the uniform density, by the algorithm's own loss with equal weights."""
    for update in range(updates):
        _anneal(algorithm, update / updates, algorithm.config.policy_lr)
        action = torch.rand(512, 1, 2, generator=generator) * 2 - 1
        t = torch.randint(algorithm.config.diffusion_steps, (512, 1), generator=generator)
        eps = torch.randn(512, 1, 2, generator=generator)
        agent = algorithm.agent
        agent.update_policy(
            policy_loss(agent.schedule, agent.policy, torch.zeros(512, 1), action, torch.ones(512, 1), t, eps)
        )
    load_params(algorithm.agent.policy, algorithm.agent.policy_average)


def _histogram(algorithm: DPMD | SDAC, generator: torch.Generator) -> Grid:
    agent = algorithm.agent
    noise = torch.randn(SAMPLES // 100, agent.config.diffusion_steps, 100, 2, generator=generator)
    return _cells(agent.inference.sample(agent.policy_average, torch.zeros(len(noise), 1), noise))


def _cells(action: Tensor) -> Grid:
    x, y = action.reshape(-1, 2).double().T.numpy()
    counts, _, _ = np.histogram2d(x, y, bins=BINS, range=[[-1, 1], [-1, 1]])
    cells: Grid = counts / counts.sum()
    return cells


def floor_kl(steps: int = 20) -> float:
    """KL of samples of the mixture's exact denoiser: the error of the denoising steps alone."""
    schedule = make_schedule("cosine", steps)
    x = torch.linspace(-1, 1, 41)[:-1] + 1 / 40
    clean = torch.stack(torch.meshgrid(x, x, indexing="ij"), -1).reshape(-1, 2)
    q = known_q(clean)

    def exact_noise(action: Tensor, t: int) -> Tensor:
        signal, noise = schedule.sqrt_alpha_bars[t], schedule.sqrt_one_minus_alpha_bars[t]
        flat = action.reshape(-1, 2)
        squares = (flat.unsqueeze(1) - signal * clean).square().sum(-1)
        mean = torch.softmax(q - squares / (2 * noise**2), 1) @ clean
        return ((flat - signal * mean) / noise).view_as(action)

    generator = torch.Generator().manual_seed(0)
    action = [
        reverse_chain(schedule, exact_noise, torch.randn(20, steps, 100, 2, generator=generator), prior_std=1.0)
        for _ in range(SAMPLES // 2000)
    ]
    return Outcome("SDAC", "exact", _cells(torch.cat(action)), coarse(reweighted(uniform(), 1.0)), 0.0).kl


CASES: dict[str, Callable[[], Outcome]] = {
    "sdac_paper": lambda: learn_sdac("paper", 1500),
    "dpmd_paper": lambda: learn_dpmd("paper", 2, 1500, **CONSTANT),
    "sdac_paper_bf16": lambda: learn_sdac("paper", 1500, precision="bf16"),
    "dpmd_paper_bf16": lambda: learn_dpmd("paper", 2, 1500, precision="bf16", **CONSTANT),
    "dpmd_kl": lambda: learn_dpmd("kl", 1, 2500),
    "dpmd_reference": lambda: learn_dpmd("reference", 2, 500, rows=32, target_particles=32, **CONSTANT),
    "sdac_reference": lambda: learn_sdac("reference", 1500),
}
"""Every case of the docstring; up to a minute each."""


def draw(results: Mapping[str, Outcome], path: Path) -> None:
    """Draw the exact density above the learnt density, one column per case."""
    from matplotlib.figure import Figure

    shown = [outcome for outcome in results.values() if "bf16" not in outcome.case]
    figure = Figure(figsize=(2.5 * len(shown), 5.6), layout="constrained")
    axes = figure.subplots(2, len(shown), squeeze=False)
    for column, outcome in zip(axes.T, shown, strict=True):
        top = max(outcome.exact.max(), 1e-9)
        for axis, cells, word in (
            (column[0], outcome.exact, "exact"),
            (column[1], outcome.histogram, "learnt"),
        ):
            axis.imshow(cells.T, origin="lower", extent=(-1, 1, -1, 1), vmin=0, vmax=top, cmap="viridis")
            title = f"{outcome.algorithm}, {outcome.case}\n{word}" if word == "exact" else word
            axis.set(title=title, xticks=[-1, 0, 1], yticks=[-1, 0, 1])
            for (x, y), mass in zip(MODES.tolist(), _quadrants(cells), strict=True):
                axis.text(x, y + 0.33, f"{mass:.2f}", color="white", ha="center", va="center", fontsize=9)
        verdict = "right" if outcome.right else "wrong"
        column[1].set_xlabel(f"KL {outcome.kl:.2f}: {verdict}")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Learn every case, write the record and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    results = {key: learn() for key, learn in CASES.items()}
    rows = {
        key: {
            "kl": round(outcome.kl, 4),
            "masses_learnt": [round(learnt, 3) for learnt, _ in outcome.masses],
            "masses_exact": [round(exact, 3) for _, exact in outcome.masses],
            "right": outcome.right,
            "seconds": round(outcome.seconds, 1),
        }
        for key, outcome in results.items()
    }
    bounds = {"kl": MAX_KL, "mass": MAX_MASS_ERROR}
    write_record({"bounds": bounds, "floor": round(floor_kl(), 4), "results": rows}, options.out)
    if options.picture:
        draw(results, options.picture)


if __name__ == "__main__":
    main()
