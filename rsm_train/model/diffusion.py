"""The diffusion process: noise schedules and pure functions over them.

Notation of Ho et al. 2020 (DDPM): beta_t, alpha_bar_t = prod_{i<=t} (1 - beta_i), t = 0 is the least noisy
index, T - 1 the noisiest. Actions live in [-1, 1]^A here; the environment's units are applied outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    """One reverse step from index t to the next; constants as Python numbers so that they fold into a graph.

    x0 = clip(inv_sqrt_alpha_bar * a_t - noise_scale * eps, -1, 1)
    a_next = x0_coef * x0 + action_coef * a_t + std * z
    """

    t: int
    inv_sqrt_alpha_bar: float  # 1 / sqrt(alpha_bar_t)
    noise_scale: float  # sqrt(1 / alpha_bar_t - 1)
    x0_coef: float
    action_coef: float
    std: float  # 0 in the last step

    @property
    def constants(self) -> tuple[float, float, float, float, float]:
        """The last arguments of `reverse_step`, in their order."""
        return (self.inv_sqrt_alpha_bar, self.noise_scale, self.x0_coef, self.action_coef, self.std)


@dataclass(frozen=True)
class NoiseSchedule:
    """A discrete noise schedule of T steps; every tensor is float32 [T], indexed by t."""

    betas: Tensor
    alpha_bars: Tensor
    sqrt_alpha_bars: Tensor
    sqrt_one_minus_alpha_bars: Tensor
    reverse_steps: tuple[ReverseStep, ...]
    """In the order they are taken: t = T - 1, T - 2, ..., 0, or every so manieth of them."""

    @property
    def steps(self) -> int:
        """T."""
        return len(self.betas)


def make_schedule(
    name: ScheduleName,
    steps: int,
    *,
    linear_scale: float = 0.8,
    chain_steps: int | None = None,
    eta: float = 1.0,
    device: torch.device | str = "cpu",
) -> NoiseSchedule:
    """Build a schedule of `steps` >= 1 steps, computed in float64 and cast once.

    cosine: alpha_bar(u) = cos^2((u + s) / (1 + s) * pi / 2) with s = 0.008, beta <= 0.999
    (Nichol & Dhariwal 2021). linear: beta = linear_scale * linspace(1e-4, 0.999, T).

    Args:
        name: "cosine" or "linear".
        steps: T.
        linear_scale: of the linear schedule.
        chain_steps: take so many of the T reverse steps (`timesteps`); None: all.
        eta: share of DDPM's noise, 0 to 1 (`reverse_steps`).
        device: of the tensors.

    Raises:
        ValueError: unknown name, fewer than one step, chain_steps not in 1 to T, or eta not in 0 to 1.
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
    alpha_bars = torch.cumprod(1 - betas, dim=0)

    def cast(values: Tensor) -> Tensor:
        return values.to(device=device, dtype=torch.float32)

    return NoiseSchedule(
        betas=cast(betas),
        alpha_bars=cast(alpha_bars),
        sqrt_alpha_bars=cast(alpha_bars.sqrt()),
        sqrt_one_minus_alpha_bars=cast((1 - alpha_bars).sqrt()),
        reverse_steps=reverse_steps(alpha_bars.tolist(), timesteps(steps, chain_steps), eta),
    )


def timesteps(steps: int, chain_steps: int | None = None) -> tuple[int, ...]:
    """The indices t that a chain of `chain_steps` visits, descending from T - 1; None: all T.

    Equal strides that start at the noisiest index ("trailing" in Lin et al. 2024, table 2): the chain begins
    at N(0, I), which is the law of a_t there and nowhere else.

    Raises:
        ValueError: chain_steps is not in 1 to T.
    """
    count = steps if chain_steps is None else chain_steps
    if not 1 <= count <= steps:
        raise ValueError(f"wanted 1 to {steps} of the {steps} denoising steps, got {count}")
    return tuple(steps - 1 - k * steps // count for k in range(count))


def reverse_steps(
    alpha_bars: Sequence[float], indices: Sequence[int], eta: float = 1.0
) -> tuple[ReverseStep, ...]:
    """The constants of the reverse steps through the given indices (Song et al. 2021, DDIM, eqs. 12 and 16).

    From t to the next index u (alpha_bar_u = 1 after the last): a_u = sqrt(alpha_bar_u) x0
    + sqrt(1 - alpha_bar_u - std^2) eps' + std z, where eps' is the noise between the clipped x0 and a_t, and
    std = eta sqrt((1 - alpha_bar_u) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_u).
    With eta = 1 and all T indices these are the posterior's c1, c2 and sd of DDPM.

    Raises:
        ValueError: eta is not in 0 to 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"wanted eta from 0 (DDIM) to 1 (DDPM), got {eta}")
    steps = []
    for t, after in zip(indices, [*indices[1:], None], strict=True):
        alpha_bar, following = alpha_bars[t], 1.0 if after is None else alpha_bars[after]
        variance = eta**2 * (1 - following) / (1 - alpha_bar) * (1 - alpha_bar / following)
        action_coef = ((1 - following - variance) / (1 - alpha_bar)) ** 0.5
        steps.append(
            ReverseStep(
                t=t,
                inv_sqrt_alpha_bar=alpha_bar**-0.5,
                noise_scale=(1 / alpha_bar - 1) ** 0.5,
                x0_coef=following**0.5 - action_coef * alpha_bar**0.5,
                action_coef=action_coef,
                std=variance**0.5,
            )
        )
    return tuple(steps)


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
        schedule: with the reverse steps to take.
        predict_noise: (a_t [B, N, A], t) -> eps [B, N, A].
        noise_BTNA: standard normal. Index 0 of the T axis is the initial latent, scaled by `prior_std`;
            index k >= 1 is the noise of the k-th reverse step. The last step takes none.
        prior_std: standard deviation of the initial latent. The forward marginal has 1; below 1 the chain
            samples at a lower temperature.

    Returns:
        [B, N, A] in [-1, 1].
    """
    action = prior_std * noise_BTNA[:, 0]
    *steps, last = schedule.reverse_steps
    for k, step in enumerate(steps, start=1):
        action = reverse_step(action, predict_noise(action, step.t), noise_BTNA[:, k], *step.constants)
    # x0_coef = 1, action_coef = 0, no noise
    return clean_action(action, predict_noise(action, last.t), last.inv_sqrt_alpha_bar, last.noise_scale)


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
