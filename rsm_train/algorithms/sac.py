"""SAC: Soft Actor-Critic, the baseline.

Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018 (arXiv 1812.05905). The policy is a
Gaussian squashed by tanh, a = tanh(u), u ~ N(mu(s), sigma(s)^2), whose density has the correction

    log pi(a|s) = log N(u; mu, sigma^2) - sum_i log(1 - tanh(u_i)^2)
    y        = r + gamma (1 - terminated) (min_i Q_i'(s', a') - alpha log pi(a'|s'))
    L_policy = E_s E_{a ~ pi} [ alpha log pi(a|s) - min_i Q_i(s, a) ]
    L_alpha  = -alpha E [ log pi(a|s) + H_target ]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rsm_train.algorithms.common import (
    AlgorithmConfig,
    Batch,
    Metrics,
    adam,
    copy_params,
    descend,
    leaves,
    load_params,
    load_state,
    move_average,
    save_state,
    td_target,
    update_critic,
)
from rsm_train.model.critic import init_critics, q_values, select_value
from rsm_train.model.graphs import CapturedVariants
from rsm_train.model.kernels import DEFAULT_COMPUTE, Compute
from rsm_train.model.networks import Params, gaussian, init_gaussian
from rsm_train.model.samplers.gaussian import GaussianSampler


@dataclass(frozen=True)
class SACConfig(AlgorithmConfig):
    """Settings of SAC; the defaults are those of its authors, with mish networks.

    How often it learns is the run's `updates_per_step`, 1 for its authors.
    """

    width: int = field(
        default=256, metadata={"group": "Networks", "help": "Hidden units per layer of policy and critics."}
    )
    depth: int = field(
        default=2, metadata={"group": "Networks", "help": "Hidden layers of policy and critics."}
    )
    critics: int = field(
        default=2, metadata={"group": "Networks", "help": "E, members of the ensemble of critics."}
    )
    critic_layer_norm: bool = field(
        default=False,
        metadata={
            "group": "Networks",
            "help": "Normalise the critics' hidden layers before their activations.",
        },
    )
    policy_lr: float = field(
        default=3e-4,
        metadata={
            "group": "Optimisation",
            "help": "Learning rate of the policy; in sac also of the temperature.",
        },
    )
    critic_lr: float = field(
        default=3e-4, metadata={"group": "Optimisation", "help": "Learning rate of the critics."}
    )
    gamma: float = field(default=0.99, metadata={"group": "Optimisation", "help": "Discount factor."})
    tau: float = field(
        default=0.005, metadata={"group": "Optimisation", "help": "Rate of the target and average networks."}
    )
    reward_scale: float = field(
        default=1.0, metadata={"group": "Optimisation", "help": "Factor on rewards in the TD target."}
    )
    policy_every: int = field(
        default=1,
        metadata={
            "group": "Optimisation",
            "help": "Number of critic updates per update of the policy, the target and the average.",
        },
    )
    temperature: float = field(
        default=1.0, metadata={"group": "Temperature", "help": "Temperature alpha at the start."}
    )
    target_entropy: float = field(
        default=-1.0,
        metadata={
            "group": "Temperature",
            "help": "Target of the entropy schedule per action element; in sac the target of the entropy.",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "depth", "critics", "policy_every"):
            self._require(name, getattr(self, name) >= 1, ">= 1")
        for name in ("policy_lr", "critic_lr", "temperature", "reward_scale"):
            self._require(name, getattr(self, name) > 0, "> 0")
        self._require("gamma", 0 <= self.gamma <= 1, "between 0 and 1")
        self._require("tau", 0 < self.tau <= 1, "> 0 and <= 1")

    def ineffective(self) -> Mapping[str, str]:
        """See `AlgorithmConfig.ineffective`."""
        needed = "an algorithm that samples particles, dpmd or sdac"
        return {"precision=bf16": needed, "compile=on": needed}


@dataclass(frozen=True)
class SACNoise:
    """All randomness of one update, standard normal."""

    next_action: Tensor  # [B, A]
    action: Tensor  # [B, A]


class SACAgent:
    """The networks, optimisers and temperature of SAC."""

    def __init__(
        self,
        config: SACConfig,
        obs_size: int,
        action_size: int,
        *,
        generator: torch.Generator,
        device: torch.device | str,
    ) -> None:
        self.config = config
        self.action_size = action_size
        self.updates = 0
        hidden = [config.width] * config.depth
        self.policy = leaves(init_gaussian(obs_size, action_size, hidden, generator), device)
        self.critic = leaves(
            init_critics(
                *(obs_size, action_size, hidden, generator),
                members=config.critics,
                layer_norm=config.critic_layer_norm,
            ),
            device,
        )
        self.critic_target = copy_params(self.critic)
        self.alpha = leaves({"log": torch.tensor(math.log(config.temperature))}, device)
        self.policy_optimizer = adam(self.policy, config.policy_lr)
        self.critic_optimizer = adam(self.critic, config.critic_lr)
        self.alpha_optimizer = adam(self.alpha, config.policy_lr)
        self._optimizers = {
            "policy_optimizer": (self.policy_optimizer, self.policy),
            "critic_optimizer": (self.critic_optimizer, self.critic),
            "alpha_optimizer": (self.alpha_optimizer, self.alpha),
        }
        self._kept = {"alpha.log": self.alpha["log"]}

    @property
    def sampler(self) -> GaussianSampler:
        """How the policy samples."""
        return GaussianSampler()

    @property
    def temperature(self) -> float:
        """alpha now."""
        return float(self.alpha["log"].detach().exp())

    @torch.no_grad()
    def act(self, obs_BO: Tensor, noise_BTNA: Tensor, exploration_BA: Tensor) -> Tensor:
        """A sample of the policy, [B, A]; its own noise explores, `exploration_BA` is not used."""
        return sample(self.policy, obs_BO, noise_BTNA[:, 0, 0])[0]

    def networks(self) -> dict[str, Params]:
        """Every network by name."""
        return {"policy": self.policy, "critic": self.critic, "critic_target": self.critic_target}

    def state(self) -> dict[str, Tensor]:
        """See `Agent.state`."""
        return save_state(self._optimizers, self._kept)

    def restore(self, networks: Mapping[str, Params], state: Mapping[str, Tensor], updates: int) -> None:
        """See `Agent.restore`."""
        for name, params in self.networks().items():
            load_params(params, networks[name])
        load_state(self._optimizers, self._kept, state)
        self.updates = updates


class SAC:
    """The update of SAC."""

    Config: ClassVar[type[AlgorithmConfig]] = SACConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "quick": {}}

    def __init__(
        self,
        config: SACConfig,
        obs_size: int,
        action_size: int,
        *,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        compute: Compute = DEFAULT_COMPUTE,
    ) -> None:
        """`compute` is for particles; there are none here."""
        self.config = config
        self.agent = SACAgent(config, obs_size, action_size, generator=generator, device=device)
        self._learn_captured = CapturedVariants(self._learn, torch.device(device))

    def update(self, batch: Batch, noise: SACNoise) -> Metrics:
        """One critic update and, every `policy_every`-th time, one of policy, temperature and targets."""
        self.agent.updates += 1
        policy_due = self.agent.updates % self.config.policy_every == 0
        return self._learn_captured(batch, noise, policy_due=policy_due)

    def _learn(self, batch: Batch, noise: SACNoise, *, policy_due: bool) -> Metrics:
        agent = self.agent
        y_B = self._td_target(batch, noise.next_action)
        metrics = update_critic(agent.critic, agent.critic_optimizer, batch, y_B)
        if policy_due:
            metrics |= self._update_policy(batch.obs, noise)
            move_average(agent.critic_target, agent.critic, self.config.tau)
        return metrics

    @torch.no_grad()
    def _td_target(self, batch: Batch, noise_BA: Tensor) -> Tensor:
        """y = r + gamma (1 - terminated) (min_i Q_i'(s', a') - alpha log pi(a'|s')), [B]."""
        agent, c = self.agent, self.config
        next_action_BA, next_log_p_B = sample(agent.policy, batch.next_obs, noise_BA)
        q_EB = q_values(agent.critic_target, batch.next_obs, next_action_BA.unsqueeze(1)).squeeze(2)
        soft_q_B = select_value(q_EB) - agent.alpha["log"].exp() * next_log_p_B
        return td_target(batch, soft_q_B, gamma=c.gamma, reward_scale=c.reward_scale)

    def _update_policy(self, obs_BO: Tensor, noise: SACNoise) -> Metrics:
        agent = self.agent
        action_BA, log_p_B = sample(agent.policy, obs_BO, noise.action)
        frozen = {name: value.detach() for name, value in agent.critic.items()}
        q_B = select_value(q_values(frozen, obs_BO, action_BA.unsqueeze(1)).squeeze(2))
        loss = (agent.alpha["log"].detach().exp() * log_p_B - q_B).mean()
        descend(agent.policy_optimizer, loss)
        target = self.config.target_entropy * agent.action_size
        alpha_loss = -agent.alpha["log"].exp() * (log_p_B.detach().mean() + target)
        descend(agent.alpha_optimizer, alpha_loss)
        return {"policy_loss": loss.detach(), "entropy": -log_p_B.detach().mean()}

    def draw_noise(self, batch_size: int, generator: torch.Generator) -> SACNoise:
        """Draw the randomness of one update on the generator's device."""
        shape = (2, batch_size, self.agent.action_size)
        next_action, action = torch.randn(shape, generator=generator, device=generator.device)
        return SACNoise(next_action, action)


def sample(policy: Mapping[str, Tensor], obs_BO: Tensor, noise_BA: Tensor) -> tuple[Tensor, Tensor]:
    """a = tanh(mu + sigma noise), [B, A], and log pi(a|s), [B]."""
    mean, log_std = gaussian(policy, obs_BO)
    u = mean + log_std.exp() * noise_BA
    log_normal = -0.5 * noise_BA.square() - log_std - 0.5 * math.log(2 * math.pi)
    # log(1 - tanh(u)^2), without the cancellation near |tanh(u)| = 1.
    log_slope = 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
    return torch.tanh(u), (log_normal - log_slope).sum(dim=1)
