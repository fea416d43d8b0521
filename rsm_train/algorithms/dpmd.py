"""DPMD: Diffusion Policy Mirror Descent.

Ma, Chen, Wang, Li, Dai, "Efficient Online Reinforcement Learning for Diffusion Policy", ICML 2025.
Mirror descent moves the policy towards pi_{k+1}(a|s) proportional to pi_k(a|s) exp(Q(s, a) / lambda). Score
matching keeps its minimiser when it is weighted by any positive function of (s, t), and with the weight
Z(s) p_t(a_t|s) its loss becomes an expectation over pi_k that can be sampled:

    L = E_s E_{a_0 ~ pi_k(.|s)} E_{t, eps} [ w(s, a_0) |eps_theta(s, a_t, t) - eps|^2 ],  w = exp(Q / lambda)
    a_t = sqrt(alpha_bar_t) a_0 + sqrt(1 - alpha_bar_t) eps

Here w is a softmax over K actions of the same state, which divides by an estimate of Z(s).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rsm_train.algorithms.common import (
    Batch,
    Metrics,
    adam_state,
    copy_params,
    explore,
    load_adam_state,
    load_params,
    move_average,
    td_target,
    weight_health,
)
from rsm_train.critic import best_of_n, init_critics, min_q, q_values
from rsm_train.diffusion import SamplerSettings, ScheduleName, forward_noise, make_schedule
from rsm_train.networks import (
    Params,
    init_denoiser,
    predict_noise,
    sample_actions,
    split_denoiser,
    subset,
)
from rsm_train.temperature import Temperature, TemperatureSchedule

_STD_FLOOR = 1e-6


@dataclass(frozen=True)
class DPMDConfig:
    """Settings of DPMD; the defaults are the `paper` preset."""

    diffusion_steps: int = field(default=20, metadata={"help": "T, denoising steps."})
    particles: int = field(
        default=32, metadata={"help": "N, particles per action; the critics choose the best."}
    )
    target_particles: int = field(
        default=32, metadata={"help": "Particles of which the critics choose the action of the TD target."}
    )
    policy_samples: int = field(
        default=32, metadata={"help": "K, actions per state that the policy loss weights."}
    )
    schedule: ScheduleName = field(default="cosine", metadata={"help": "Noise schedule."})
    prior_std: float = field(default=0.5, metadata={"help": "Standard deviation of the initial latent."})
    width: int = field(default=256, metadata={"help": "Hidden units per layer of policy and critics."})
    depth: int = field(default=3, metadata={"help": "Hidden layers of policy and critics."})
    policy_lr: float = field(default=3e-4, metadata={"help": "Learning rate of the policy."})
    critic_lr: float = field(default=3e-4, metadata={"help": "Learning rate of the critics."})
    gamma: float = field(default=0.99, metadata={"help": "Discount factor."})
    tau: float = field(default=0.005, metadata={"help": "Rate of the target and average networks."})
    reward_scale: float = field(default=0.2, metadata={"help": "Factor on rewards in the TD target."})
    policy_every: int = field(
        default=2, metadata={"help": "Critic updates per policy, target and average update."}
    )
    temperature_schedule: TemperatureSchedule = field(
        default="entropy", metadata={"help": "How lambda moves: constant, or the published entropy schedule."}
    )
    temperature: float = field(default=5.0, metadata={"help": "Lambda (its initial value with a schedule)."})
    target_entropy: float = field(
        default=-1.5, metadata={"help": "Target of the entropy schedule, per action dimension."}
    )
    q_scaling: Literal["raw", "state"] = field(
        default="raw",
        metadata={"help": "Q in the weights: raw, or standardised over the K actions of each state."},
    )
    proposal_noise: float = field(
        default=0.0,
        metadata={"help": "Std of the noise added to the K actions; keeps them apart."},
    )
    exploration_noise: float = field(
        default=0.1,
        metadata={"help": "Standard deviation of the noise added when exploring, in units of lambda."},
    )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"wanted a finite {name}, got {value}")
        counts = ("diffusion_steps", "particles", "target_particles", "policy_samples")
        for name in (*counts, "width", "depth", "policy_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"wanted {name} >= 1, got {getattr(self, name)}")
        for name in ("policy_lr", "critic_lr", "temperature", "reward_scale", "prior_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"wanted {name} > 0, got {getattr(self, name)}")
        for name in ("gamma", "tau"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"wanted {name} between 0 and 1, got {getattr(self, name)}")
        for name in ("exploration_noise", "proposal_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"wanted {name} >= 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class DPMDNoise:
    """All randomness of one update."""

    next_action: Tensor  # [B, T, N', A] standard normal, samples a' at s'
    action: Tensor  # [B, T, K, A] standard normal, samples a_0 at s
    proposal: Tensor  # [B, K, A] standard normal, widens a_0
    t: Tensor  # [B, K] int64, uniform over {0, ..., T - 1}
    eps: Tensor  # [B, K, A] standard normal


class DPMD:
    """Networks, optimisers and the update of DPMD."""

    def __init__(
        self,
        config: DPMDConfig,
        obs_size: int,
        action_size: int,
        *,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.action_size = action_size
        self.updates = 0
        self._temperature = Temperature(config.temperature_schedule, config.temperature, config.target_entropy)
        self.schedule = make_schedule(config.schedule, config.diffusion_steps, device=device)
        hidden = [config.width] * config.depth
        # Drawn on the CPU, so that a seed gives the same networks on every device.
        self.policy = _to_leaves(init_denoiser(obs_size, action_size, hidden, generator), device)
        self.critic = _to_leaves(init_critics(obs_size, action_size, hidden, generator), device)
        self.policy_average = copy_params(self.policy)  # pi_k; also the policy that is evaluated
        self.critic_target = copy_params(self.critic)
        self.policy_optimizer = _adam(self.policy, config.policy_lr)
        self.critic_optimizer = _adam(self.critic, config.critic_lr)

    @property
    def sampler(self) -> SamplerSettings:
        """How the policy samples."""
        c = self.config
        return SamplerSettings(c.schedule, c.diffusion_steps, c.particles, c.prior_std)

    @property
    def temperature(self) -> float:
        """lambda now."""
        return self._temperature.at(self.updates)

    def networks(self) -> dict[str, Params]:
        """Every network by name."""
        return {
            "policy": self.policy,
            "policy_average": self.policy_average,
            "critic": self.critic,
            "critic_target": self.critic_target,
        }

    def state(self) -> dict[str, Tensor]:
        """See `Algorithm.state`."""
        return {
            f"{name}.{key}": value
            for name, optimizer, params in self._optimizers()
            for key, value in adam_state(optimizer, params).items()
        }

    def restore(self, networks: Mapping[str, Params], state: Mapping[str, Tensor], updates: int) -> None:
        """See `Algorithm.restore`."""
        for name, params in self.networks().items():
            load_params(params, networks[name])
        for name, optimizer, params in self._optimizers():
            load_adam_state(optimizer, params, subset(state, f"{name}."))
        self.updates = updates

    def _optimizers(self) -> list[tuple[str, torch.optim.Optimizer, Params]]:
        return [
            ("policy_optimizer", self.policy_optimizer, self.policy),
            ("critic_optimizer", self.critic_optimizer, self.critic),
        ]

    @torch.no_grad()
    def act(self, obs_BO: Tensor, noise_BTNA: Tensor, exploration_BA: Tensor) -> Tensor:
        """Best of N by min-Q from the current policy, with exploration noise; [B, A]."""
        action_BA = self._best_action(obs_BO, noise_BTNA)
        return explore(action_BA, exploration_BA, self.config.exploration_noise * self.temperature)

    def draw_noise(self, batch_size: int, generator: torch.Generator) -> DPMDNoise:
        """Draw the randomness of one update on the generator's device."""
        c, size, device = self.config, self.action_size, generator.device

        def normal(*shape: int) -> Tensor:
            return torch.randn(batch_size, *shape, generator=generator, device=device)

        t_shape = (batch_size, c.policy_samples)
        return DPMDNoise(
            next_action=normal(c.diffusion_steps, c.target_particles, size),
            action=normal(c.diffusion_steps, c.policy_samples, size),
            proposal=normal(c.policy_samples, size),
            t=torch.randint(c.diffusion_steps, t_shape, generator=generator, device=device),
            eps=normal(c.policy_samples, size),
        )

    def update(self, batch: Batch, noise: DPMDNoise) -> Metrics:
        """One critic update and, every `policy_every`-th time, one policy update."""
        metrics = self._update_critic(batch, noise)
        self.updates += 1
        if self.updates % self.config.policy_every == 0:
            metrics |= self._update_policy(batch.obs, noise)
            move_average(self.policy_average, self.policy, self.config.tau)
            move_average(self.critic_target, self.critic, self.config.tau)
        return metrics

    def _update_critic(self, batch: Batch, noise: DPMDNoise) -> Metrics:
        with torch.no_grad():
            next_action = self._best_action(batch.next_obs, noise.next_action)
            next_q = min_q(self.critic_target, batch.next_obs, next_action.unsqueeze(1)).squeeze(1)
            y = td_target(batch, next_q, gamma=self.config.gamma, reward_scale=self.config.reward_scale)
        q_EB = q_values(self.critic, batch.obs, batch.action.unsqueeze(1)).squeeze(2)
        loss = (q_EB - y).square().mean(dim=1).sum()
        _step(self.critic_optimizer, loss)
        return {"critic_loss": loss.detach(), "q_mean": q_EB.detach().mean(), "target_mean": y.mean()}

    def _update_policy(self, obs_BO: Tensor, noise: DPMDNoise) -> Metrics:
        with torch.no_grad():
            denoiser = split_denoiser(self.policy_average, self.schedule.steps)
            action_BKA = sample_actions(  # a_0 ~ pi_k(. | s)
                denoiser, self.schedule, obs_BO, noise.action, prior_std=self.config.prior_std
            )
            action_BKA = explore(action_BKA, noise.proposal, self.config.proposal_noise)
            q_BK = min_q(self.critic, obs_BO, action_BKA)
            weight_BK = policy_weights(q_BK, self.temperature, self.config.q_scaling)
        loss = self._policy_loss(obs_BO, action_BKA, weight_BK, noise)
        _step(self.policy_optimizer, loss)
        return {"policy_loss": loss.detach(), "q_spread": q_BK.std(dim=1, correction=0).mean()} | weight_health(
            weight_BK
        )

    def _policy_loss(self, obs_BO: Tensor, action_BKA: Tensor, weight_BK: Tensor, noise: DPMDNoise) -> Tensor:
        """E_s sum_k w_k |eps_theta(s, a_t, t) - eps|^2."""
        denoiser = split_denoiser(self.policy, self.schedule.steps)
        obs_part = (obs_BO @ denoiser.obs_weight.T).unsqueeze(1)
        a_t = forward_noise(self.schedule, action_BKA, noise.t, noise.eps)
        predicted = predict_noise(denoiser, obs_part, a_t, noise.t)
        error_BK = (predicted - noise.eps).square().mean(dim=2)
        return (weight_BK * error_BK).sum(dim=1).mean()

    def _best_action(self, obs_BO: Tensor, noise_BTNA: Tensor) -> Tensor:
        denoiser = split_denoiser(self.policy, self.schedule.steps)
        action_BNA = sample_actions(
            denoiser, self.schedule, obs_BO, noise_BTNA, prior_std=self.config.prior_std
        )
        if action_BNA.shape[1] == 1:
            return action_BNA[:, 0]
        return best_of_n(self.critic, obs_BO, action_BNA)[0]


def policy_weights(q_BK: Tensor, temperature: float, scaling: Literal["raw", "state"]) -> Tensor:
    """w_k = softmax_k(Q(s, a_k) / lambda), [B, K]; any factor or offset per state is free."""
    if scaling == "state":
        std, mean = torch.std_mean(q_BK, dim=1, keepdim=True, correction=0)
        q_BK = (q_BK - mean) / (std + _STD_FLOOR)
    return torch.softmax(q_BK / temperature, dim=1)


def _to_leaves(params: Params, device: torch.device | str) -> Params:
    return {name: value.to(device).requires_grad_() for name, value in params.items()}


def _adam(params: Params, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(params.values(), lr=learning_rate, fused=True)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
