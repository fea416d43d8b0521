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
    leaves,
    load_params,
)
from rsm_train.algorithms.critic_config import CriticConfig
from rsm_train.algorithms.critics import Backup, Critics
from rsm_train.algorithms.optimizer import Adam, load_state, save_state
from rsm_train.model.critic import fold, q_values, select_value
from rsm_train.model.diffusion import SelectionName
from rsm_train.model.graphs import CapturedVariants
from rsm_train.model.kernels import DEFAULT_COMPUTE, Compute, compiled
from rsm_train.model.networks import Params, gaussian, init_gaussian
from rsm_train.model.samplers.gaussian import GaussianSampler


@dataclass(frozen=True)
class SACConfig(CriticConfig):
    """Settings of SAC; the defaults are those of its authors, with mish networks.

    How often it learns is the run's `updates_per_step`, 1 for its authors.
    """

    depth: int = field(
        default=2, metadata={"group": "Networks", "help": "Hidden layers of policy and critics."}
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
        self._require("temperature", self.temperature > 0, "> 0")

    def ineffective(self) -> Mapping[str, str]:
        """See `AlgorithmConfig.ineffective`."""
        needed = "an algorithm that samples particles, dpmd or sdac"
        return {**super().ineffective(), "precision=bf16": needed}


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
        compute: Compute,
    ) -> None:
        self.config = config
        self.action_size = action_size
        self.updates = 0
        hidden = [config.width] * config.depth
        self.policy = leaves(init_gaussian(obs_size, action_size, hidden, generator), device)
        self.critics = Critics(
            config, obs_size, action_size, generator=generator, device=device, compute=compute
        )
        self.alpha = leaves({"log": torch.tensor(math.log(config.temperature))}, device)
        self.policy_optimizer = Adam(self.policy, config.policy_lr)
        self.alpha_optimizer = Adam(self.alpha, config.policy_lr)
        self._optimizers = {
            "policy_optimizer": self.policy_optimizer,
            "critic_optimizer": self.critics.optimizer,
            "alpha_optimizer": self.alpha_optimizer,
        }
        self._kept = {"alpha.log": self.alpha["log"]}

    @property
    def sampler(self) -> GaussianSampler:
        """How the policy samples."""
        c = self.config
        return GaussianSampler(selection=c.critic_selection, selection_std=c.critic_std_factor)

    @property
    def temperature(self) -> float:
        """alpha now."""
        return float(self.alpha["log"].detach().exp())

    def begin_update(self) -> bool:
        """Count an update and set its learning rates; true if the policy is due."""
        c = self.config
        self.policy_optimizer.learning_rate.fill_(c.policy_lr_after(self.updates // c.policy_every))
        self.critics.begin_update(self.updates)
        self.updates += 1
        return self.updates % c.policy_every == 0

    @torch.no_grad()
    def act(self, obs_BO: Tensor, noise_BTNA: Tensor, exploration_BA: Tensor) -> Tensor:
        """A sample of the policy, [B, A]; its own noise explores, `exploration_BA` is not used."""
        return sample(self.policy, obs_BO, noise_BTNA[:, 0, 0])[0]

    def networks(self) -> dict[str, Params]:
        """Every network by name."""
        return {"policy": self.policy, **self.critics.networks()}

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
        self.config = config
        self.agent = SACAgent(
            config, obs_size, action_size, generator=generator, device=device, compute=compute
        )
        self._update_critics = compiled(self._update_critics_eagerly, compute.compile)
        self._update_policy = compiled(self._update_policy_eagerly, compute.compile)
        self._learn_captured = CapturedVariants(self._learn, torch.device(device))

    def update(self, batch: Batch, noise: SACNoise) -> Metrics:
        """One critic update and, every `policy_every`-th time, one of policy, temperature and targets."""
        return self._learn_captured(batch, noise, policy_due=self.agent.begin_update())

    def _learn(self, batch: Batch, noise: SACNoise, *, policy_due: bool) -> Metrics:
        metrics = self._update_critics(batch, noise.next_action)
        if policy_due:
            metrics |= self._update_policy(batch.obs, noise.action)
        return metrics

    def _update_critics_eagerly(self, batch: Batch, noise_BA: Tensor) -> Metrics:
        return self.agent.critics.update(batch, *self._soft_backup(batch, noise_BA))

    @torch.no_grad()
    def _soft_backup(self, batch: Batch, noise_BA: Tensor) -> tuple[Tensor, Backup]:
        """a' [B, A], and y = (r - discount alpha log pi(a'|s')) + discount min_i Q_i'(s', a')."""
        agent = self.agent
        next_action_BA, next_log_p_B = sample(agent.policy, batch.next_obs, noise_BA)
        reward_B, discount_B = agent.critics.backup(batch)
        return next_action_BA, (reward_B - discount_B * agent.alpha["log"].exp() * next_log_p_B, discount_B)

    def _update_policy_eagerly(self, obs_BO: Tensor, noise_BA: Tensor) -> Metrics:
        agent, c = self.agent, self.config
        critics = {name: value.detach() for name, value in agent.critics.params.items()}
        loss, entropy = policy_loss(
            *(agent.policy, critics, agent.alpha["log"].detach(), obs_BO, noise_BA),
            selection=c.critic_selection,
            std_factor=c.critic_std_factor,
        )
        agent.policy_optimizer.descend(loss)
        target = c.target_entropy * agent.action_size
        alpha_loss = -agent.alpha["log"].exp() * (target - entropy)
        agent.alpha_optimizer.descend(alpha_loss)
        agent.critics.move_target()
        return {"policy_loss": loss.detach(), "entropy": entropy}

    def draw_noise(self, batch_size: int, generator: torch.Generator) -> SACNoise:
        """Draw the randomness of one update on the generator's device."""
        shape = (2, batch_size, self.agent.action_size)
        next_action, action = torch.randn(shape, generator=generator, device=generator.device)
        return SACNoise(next_action, action)


def policy_loss(
    policy: Params,
    critics: Params,
    log_alpha: Tensor,
    obs_BO: Tensor,
    noise_BA: Tensor,
    *,
    selection: SelectionName = "min",
    std_factor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """E [alpha log pi(a|s) - Q(s, a)], and the entropy, without a gradient; 0-d each."""
    action_BA, log_p_B = sample(policy, obs_BO, noise_BA)
    q_EB = q_values(fold(critics), obs_BO, action_BA.unsqueeze(1)).squeeze(2)
    loss = (log_alpha.exp() * log_p_B - select_value(q_EB, selection, std_factor)).mean()
    return loss, -log_p_B.detach().mean()


def sample(policy: Mapping[str, Tensor], obs_BO: Tensor, noise_BA: Tensor) -> tuple[Tensor, Tensor]:
    """a = tanh(mu + sigma noise), [B, A], and log pi(a|s), [B]."""
    mean, log_std = gaussian(policy, obs_BO)
    u = mean + log_std.exp() * noise_BA
    log_normal = -0.5 * noise_BA.square() - log_std - 0.5 * math.log(2 * math.pi)
    # log(1 - tanh(u)^2), without the cancellation near |tanh(u)| = 1.
    log_slope = 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
    return torch.tanh(u), (log_normal - log_slope).sum(dim=1)
