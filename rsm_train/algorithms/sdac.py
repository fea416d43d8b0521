"""SDAC: Soft Diffusion Actor-Critic.

Ma, Chen, Wang, Li, Dai, "Efficient Online Reinforcement Learning for Diffusion Policy", ICML 2025.
The policy of maximum entropy is pi(a|s) proportional to exp(Q(s, a) / lambda). It cannot be sampled
directly, but its denoising loss can: draw a_t from any law of full support and invert the noising kernel,

    a_0 = a_t / sqrt(alpha_bar_t) - sqrt(1 / alpha_bar_t - 1) eps_k,   eps_k ~ N(0, I),   k = 1..K
    L = E_s E_{a_t} [ sum_k w_k |eps_theta(s, a_t, t) - eps_k|^2 ],    w = softmax_k(Q(s, a_0k) / lambda)

Since the weights sum to 1, L is |eps_theta - sum_k w_k eps_k|^2 and a constant: the policy is evaluated once
per a_t and regresses on the weighted mean of the noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rsm_train.algorithms.actor_critic import ActorCritic
from rsm_train.algorithms.actor_critic_config import QUICK_DIFFUSION, ActorCriticConfig
from rsm_train.algorithms.common import AlgorithmConfig, Batch, Metrics, weight_health
from rsm_train.model.diffusion import NoiseSchedule, forward_noise
from rsm_train.model.graphs import CapturedVariants
from rsm_train.model.kernels import DEFAULT_COMPUTE, Compute, compiled
from rsm_train.model.networks import Params, observe, predict_noise, split_denoiser

_LAST_QUANTILE = -37.0  # float64 holds the lower tail of the normal law down to here
_SMALLEST_UNIFORM = 2.0**-25  # half of what float32 draws leave between 0 and the next


@dataclass(frozen=True)
class SDACConfig(ActorCriticConfig):
    """Settings of SDAC; the defaults are the `paper` preset."""

    temperature_scale: float = field(
        default=0.2,
        metadata={"group": "Temperature", "help": "Ratio lambda / alpha; the weights use Q / lambda."},
    )
    proposal_actions: Literal["policy", "replay"] = field(
        default="policy",
        metadata={
            "group": "Policy loss of sdac",
            "help": "Actions that are noised to a_t: the policy's at s, or those taken there (replay), which "
            "need no denoising chain.",
        },
    )
    proposal_particles: int = field(
        default=1,
        metadata={
            "group": "Policy loss of sdac",
            "help": "Particles for the action that is noised to a_t; the critics choose the best.",
        },
    )
    reverse_samples: int = field(
        default=64,
        metadata={
            "group": "Policy loss of sdac",
            "help": "K, number of clean actions that are drawn for each noisy action.",
        },
    )
    reverse_draws: Literal["truncated", "clipped"] = field(
        default="truncated",
        metadata={
            "group": "Policy loss of sdac",
            "help": "Clean actions: drawn inside the action bounds (truncated), or drawn without bounds and "
            "clipped only "
            "for Q (clipped, deviation 5).",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("proposal_particles", "reverse_samples"):
            self._require(name, getattr(self, name) >= 1, ">= 1")
        self._require_reachable_kl(self.reverse_samples)

    def ineffective(self) -> Mapping[str, str]:
        """See `AlgorithmConfig.ineffective`."""
        found = dict(super().ineffective())
        if self.proposal_actions == "replay":
            found["proposal_particles"] = "proposal_actions policy"
        return found


@dataclass(frozen=True)
class SDACNoise:
    """All randomness of one update, standard normal unless said otherwise."""

    next_action: Tensor  # [B, T, N', A] samples a' at s'
    exploration: Tensor  # [B, A] of a' with noisy_backup
    action: Tensor  # [B, T, N'', A] samples the action at s that is noised to a_t; N'' = 0 with replayed ones
    proposal: Tensor  # [B, A] of that action with noisy_backup
    t: Tensor  # [B, 1] int64, uniform over {0, ..., T - 1}
    eps: Tensor  # [B, 1, A] noises that action
    reverse: Tensor  # [B, K, A] uniform over [0, 1), inverts the noise


class SDAC:
    """The update of SDAC."""

    Config: ClassVar[type[AlgorithmConfig]] = SDACConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "reference": {
            "prior_std": 0.5,
            "policy_lr_final": 3e-5,
            "noisy_backup": True,
            "reverse_draws": "clipped",
            "proposal_particles": 32,
        },
        "quick": QUICK_DIFFUSION,
    }

    def __init__(
        self,
        config: SDACConfig,
        obs_size: int,
        action_size: int,
        *,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        compute: Compute = DEFAULT_COMPUTE,
    ) -> None:
        self.config = config
        self.agent = ActorCritic(
            config, obs_size, action_size, generator=generator, device=device, compute=compute
        )
        self._improve = compiled(self._improve_eagerly, compute.compile)
        self._learn_captured = CapturedVariants(self._learn, self.agent.device)

    def update(self, batch: Batch, noise: SDACNoise) -> Metrics:
        """One critic update and, every `policy_every`-th time, one policy update."""
        return self._learn_captured(batch, noise, policy_due=self.agent.begin_update())

    def _learn(self, batch: Batch, noise: SDACNoise, *, policy_due: bool) -> Metrics:
        next_action_BA = self.agent.backup_action(batch.next_obs, noise.next_action, noise.exploration)
        metrics = self.update_critic(batch, next_action_BA)
        if policy_due:
            metrics |= self._update_policy(batch, noise)
        return metrics

    def update_critic(self, batch: Batch, next_action_BA: Tensor) -> Metrics:
        """One step on y = reward_scale r + gamma (1 - terminated) Q'(s', a'); a variant may have another."""
        return self.agent.update_critic(batch, next_action_BA)

    def _update_policy(self, batch: Batch, noise: SDACNoise) -> Metrics:
        # The regression has the same minimum under any law of a_t that reaches everywhere.
        obs_BO, proposal_BA = batch.obs, batch.action
        if self.config.proposal_actions == "policy":
            proposal_BA = self.agent.backup_action(obs_BO, noise.action, noise.proposal)
        a_t = forward_noise(self.agent.schedule, proposal_BA.unsqueeze(1), noise.t, noise.eps)  # [B, 1, A]
        eps_BKA, action_BKA, health = self._invert(a_t, noise)
        q_BK = self.agent.values(obs_BO, action_BKA)
        return health | self._improve(obs_BO, a_t, noise.t, eps_BKA, q_BK)

    def _improve_eagerly(
        self, obs_BO: Tensor, a_t: Tensor, t_B1: Tensor, eps_BKA: Tensor, q_BK: Tensor
    ) -> Metrics:
        weight_BK = torch.softmax(q_BK / self.agent.lambda_, dim=1)
        target_B1A = (weight_BK.unsqueeze(2) * eps_BKA).sum(dim=1, keepdim=True)  # sum_k w_k eps_k
        loss = policy_loss(self.config.diffusion_steps, self.agent.policy, obs_BO, a_t, t_B1, target_B1A)
        self.agent.update_policy(loss)
        health = weight_health(weight_BK)
        self.agent.update_temperature(health["weight_kl_uniform"])
        return {
            "policy_loss": loss.detach(),
            "q_spread": q_BK.std(dim=1, correction=0).mean(),
            **health,
        }

    def _invert(self, a_t: Tensor, noise: SDACNoise) -> tuple[Tensor, Tensor, Metrics]:
        """K draws of (eps, a_0) behind each a_t: [B, K, A] each, a_0 in [-1, 1]."""
        if self.config.reverse_draws == "truncated":
            eps, action = truncated_reverse(self.agent.schedule, a_t, noise.t, noise.reverse)
            return eps, action, {}
        eps, action = untruncated_reverse(self.agent.schedule, a_t, noise.t, noise.reverse)
        clipped = action.clamp(-1.0, 1.0)
        return eps, clipped, {"reverse_clipped": (clipped != action).float().mean()}

    def draw_noise(self, batch_size: int, generator: torch.Generator) -> SDACNoise:
        """Draw the randomness of one update on the generator's device."""
        c, size, device = self.config, self.agent.action_size, generator.device
        proposed = c.proposal_particles if c.proposal_actions == "policy" else 0

        def normal(*shape: int) -> Tensor:
            return torch.randn(batch_size, *shape, generator=generator, device=device)

        return SDACNoise(
            next_action=normal(c.diffusion_steps, c.target_particles, size),
            exploration=normal(size),
            action=normal(c.diffusion_steps, proposed, size),
            proposal=normal(size),
            t=torch.randint(c.diffusion_steps, (batch_size, 1), generator=generator, device=device),
            eps=normal(1, size),
            reverse=torch.rand(batch_size, c.reverse_samples, size, generator=generator, device=device),
        )


def policy_loss(
    steps: int, policy: Params, obs_BO: Tensor, a_t: Tensor, t: Tensor, target_B1A: Tensor
) -> Tensor:
    """E_s |eps_theta(s, a_t, t) - sum_k w_k eps_k|^2, 0-d."""
    denoiser = split_denoiser(policy, steps)
    predicted = predict_noise(denoiser, observe(denoiser, obs_BO), a_t, t)
    return (predicted - target_B1A).square().mean()


def truncated_reverse(
    schedule: NoiseSchedule, a_t: Tensor, t: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """(eps, a_0) with a_0 = a_t / sqrt(alpha_bar_t) - sigma eps in [-1, 1], sigma = sqrt(1 / alpha_bar_t - 1).

    eps is N(0, I) truncated to the box that a_0 in [-1, 1] makes of it, drawn by the inverse of its
    distribution function: the law of the noise given a_t if a_0 is uniform over the box.

    Args:
        schedule: T steps.
        a_t: [B, 1, A], anything.
        t: [B, 1] int64.
        uniform: [B, K, A] in [0, 1).

    Returns:
        eps and a_0, [B, K, A] each.
    """
    # In float64: sigma is up to 406, by which every rounding of eps is multiplied in a_0.
    center, sigma = (value.double() for value in _inverse_kernel(schedule, a_t, t))
    low, high = (center - 1) / sigma, (center + 1) / sigma
    # The lower tail of the normal law has many more representable probabilities than the upper one.
    flip = torch.where(low + high > 0, -1.0, 1.0)
    low, high = torch.minimum(flip * low, flip * high), torch.maximum(flip * low, flip * high)
    low_p, high_p = _lower_tail(low), _lower_tail(high)
    eps = torch.special.ndtri(torch.lerp(low_p, high_p, uniform.double()))
    # Where even that tail has no probability left, all of the law is at the bound nearest 0.
    eps = torch.where(high < _LAST_QUANTILE, high, eps)
    eps = flip * torch.minimum(torch.maximum(eps, low), high)
    return eps.float(), (center - sigma * eps).clamp(-1.0, 1.0).float()


def _lower_tail(x: Tensor) -> Tensor:
    """P(N(0, 1) <= x); torch.special.ndtr is 0 below -8.3."""
    upper: Tensor = torch.special.erfc(-x / math.sqrt(2.0))
    return 0.5 * upper


def untruncated_reverse(
    schedule: NoiseSchedule, a_t: Tensor, t: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """(eps, a_0) with eps ~ N(0, I), so that a_0 may lie outside the box; arguments as `truncated_reverse`."""
    center, sigma = _inverse_kernel(schedule, a_t, t)
    eps = torch.special.ndtri(uniform.clamp(min=_SMALLEST_UNIFORM))
    return eps, center - sigma * eps


def _inverse_kernel(schedule: NoiseSchedule, a_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    signal = schedule.sqrt_alpha_bars[t].unsqueeze(-1)
    return a_t / signal, schedule.sqrt_one_minus_alpha_bars[t].unsqueeze(-1) / signal
