"""The diffusion process: noise schedules and pure functions over them.

Notation of Ho et al. 2020 (DDPM): beta_t, alpha_bar_t = prod_{i<=t} (1 - beta_i), t = 0 is the least noisy
index, T - 1 the noisiest. Actions live in [-1, 1]^A here; the environment's units are applied outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ScheduleName = Literal["cosine", "linear"]
SelectionName = Literal["min", "mean", "mean_std"]

COSINE_OFFSET = 0.008  # s of Nichol & Dhariwal 2021, eq. 17
MAX_BETA = 0.999
LINEAR_BETA_RANGE = (1e-4, 0.999)


@dataclass(frozen=True)
class ReverseStep:
    """The constants of one reverse step t, as Python numbers so that they fold into a graph.

    x0 = clip(inv_sqrt_alpha_bar * a_t - noise_scale * eps, -1, 1)
    a_{t-1} = x0_coef * x0 + action_coef * a_t + std * z
    """

    inv_sqrt_alpha_bar: float  # 1 / sqrt(alpha_bar_t)
    noise_scale: float  # sqrt(1 / alpha_bar_t - 1)
    x0_coef: float  # beta_t sqrt(alpha_bar_{t-1}) / (1 - alpha_bar_t)
    action_coef: float  # (1 - alpha_bar_{t-1}) sqrt(1 - beta_t) / (1 - alpha_bar_t)
    std: float  # sqrt(beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)); 0 at t = 0


@dataclass(frozen=True)
class NoiseSchedule:
    """A discrete noise schedule of T steps; every tensor is float32 [T], indexed by t."""

    betas: Tensor
    alpha_bars: Tensor
    sqrt_alpha_bars: Tensor
    sqrt_one_minus_alpha_bars: Tensor
    reverse_steps: tuple[ReverseStep, ...]
    """In the order they are taken: element k is the step t = T - 1 - k."""

    @property
    def steps(self) -> int:
        """T."""
        return len(self.reverse_steps)


@dataclass(frozen=True)
class SamplerSettings:
    """What, beside the weights, determines how a policy samples."""

    schedule: ScheduleName
    steps: int  # T
    particles: int  # N, of which the critics choose the best
    prior_std: float  # standard deviation of the initial latent
    selection: SelectionName = "min"  # how the values of the critics become the one that chooses
    selection_std: float = 0.0  # for "mean_std": mean + selection_std * std


@dataclass(frozen=True)
class GaussianSettings:
    """A Gaussian squashed by tanh, the policy of SAC: one step, one particle; the mean acts."""

    steps: int = 1
    particles: int = 1


PolicySettings = SamplerSettings | GaussianSettings


def make_schedule(
    name: ScheduleName, steps: int, *, linear_scale: float = 0.8, device: torch.device | str = "cpu"
) -> NoiseSchedule:
    """Build a schedule of `steps` >= 1 steps, computed in float64 and cast once.

    cosine: alpha_bar(u) = cos^2((u + s) / (1 + s) * pi / 2) with s = 0.008, beta <= 0.999
    (Nichol & Dhariwal 2021). linear: beta = linear_scale * linspace(1e-4, 0.999, T).

    Raises:
        ValueError: unknown name, or fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"wanted at least 1 diffusion step, got {steps}")
    if name == "cosine":
        u = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = torch.cos((u + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=MAX_BETA)
    elif name == "linear":
        betas = linear_scale * torch.linspace(*LINEAR_BETA_RANGE, steps, dtype=torch.float64)
    else:
        raise ValueError(f"wanted schedule 'cosine' or 'linear', got {name!r}")
    return _schedule_from_betas(betas, device)


def _schedule_from_betas(betas: Tensor, device: torch.device | str) -> NoiseSchedule:
    alpha_bars = torch.cumprod(1 - betas, dim=0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars[:-1]])
    steps = [
        ReverseStep(
            inv_sqrt_alpha_bar=alpha_bar**-0.5,
            noise_scale=(1 / alpha_bar - 1) ** 0.5,
            x0_coef=beta * before**0.5 / (1 - alpha_bar),
            action_coef=(1 - before) * (1 - beta) ** 0.5 / (1 - alpha_bar),
            std=(beta * (1 - before) / (1 - alpha_bar)) ** 0.5,
        )
        for beta, alpha_bar, before in zip(betas.tolist(), alpha_bars.tolist(), previous.tolist(), strict=True)
    ]

    def cast(values: Tensor) -> Tensor:
        return values.to(device=device, dtype=torch.float32)

    return NoiseSchedule(
        betas=cast(betas),
        alpha_bars=cast(alpha_bars),
        sqrt_alpha_bars=cast(alpha_bars.sqrt()),
        sqrt_one_minus_alpha_bars=cast((1 - alpha_bars).sqrt()),
        reverse_steps=tuple(reversed(steps)),
    )


def forward_noise(schedule: NoiseSchedule, action: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """a_t = sqrt(alpha_bar_t) a_0 + sqrt(1 - alpha_bar_t) eps, shapes [..., A], [...], [..., A]."""
    signal = schedule.sqrt_alpha_bars[t].unsqueeze(-1)
    return signal * action + schedule.sqrt_one_minus_alpha_bars[t].unsqueeze(-1) * eps


def reverse_chain(
    schedule: NoiseSchedule,
    predict_noise: Callable[[Tensor, int], Tensor],
    noise_BTNA: Tensor,
    *,
    prior_std: float,
) -> Tensor:
    """Denoise from the prior to an action; a pure function of its arguments.

    Args:
        schedule: T steps.
        predict_noise: (a_t [B, N, A], t) -> eps [B, N, A].
        noise_BTNA: standard normal. Index 0 of the T axis is the initial latent, scaled by `prior_std`;
            index k >= 1 is the noise of the k-th reverse step. The last step (t = 0) takes none.
        prior_std: standard deviation of the initial latent. The forward marginal has 1; below 1 the chain
            samples at a lower temperature.

    Returns:
        [B, N, A] in [-1, 1].
    """
    last = schedule.steps - 1
    action = prior_std * noise_BTNA[:, 0]
    for k, step in enumerate(schedule.reverse_steps):
        eps = predict_noise(action, last - k)
        if k == last:  # t = 0: x0_coef = 1, action_coef = 0, no noise
            return clean_action(action, eps, step.inv_sqrt_alpha_bar, step.noise_scale)
        action = reverse_step(action, eps, noise_BTNA[:, k + 1], *vars(step).values())
    raise AssertionError("a schedule has at least one step")


def clean_action(
    a_t: Tensor, eps: Tensor, inv_sqrt_alpha_bar: float | Tensor, noise_scale: float | Tensor
) -> Tensor:
    """x0 = clip(a_t / sqrt(alpha_bar_t) - sqrt(1 / alpha_bar_t - 1) eps, -1, 1)."""
    return (inv_sqrt_alpha_bar * a_t - noise_scale * eps).clamp(-1.0, 1.0)


def reverse_step(
    a_t: Tensor,
    eps: Tensor,
    z: Tensor,
    inv_sqrt_alpha_bar: float | Tensor,
    noise_scale: float | Tensor,
    x0_coef: float | Tensor,
    action_coef: float | Tensor,
    std: float | Tensor,
) -> Tensor:
    """a_{t-1} from a_t, the predicted noise and z, with the constants of a `ReverseStep`; all [..., A]."""
    x0 = clean_action(a_t, eps, inv_sqrt_alpha_bar, noise_scale)
    return x0_coef * x0 + action_coef * a_t + std * z
