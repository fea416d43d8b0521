"""The part that DPMD and SDAC share: a diffusion policy, its critics and its temperature.

An algorithm owns an `ActorCritic` and adds the rule by which the policy learns. One update is

    a' = agent.backup_action(...)            an action of the policy at s'
    y  = agent.td_target(batch, a')          the TD target
    agent.update_critic(batch, y)            one step on the TD error
    agent.update_policy(loss)                when due: one step on the algorithm's loss, then all averages
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rsm_train.algorithms.common import (
    AlgorithmConfig,
    Batch,
    Metrics,
    adam,
    copy_params,
    descend,
    explore,
    leaves,
    load_params,
    load_state,
    move_average,
    save_state,
    set_learning_rate,
    td_target,
    update_critic,
)
from rsm_train.algorithms.temperature import TemperatureSchedule, open_loop_temperature
from rsm_train.model.critic import choose_best, init_critics, select_value
from rsm_train.model.diffusion import ScheduleName, SelectionName, make_schedule
from rsm_train.model.inference import Inference
from rsm_train.model.kernels import Compute
from rsm_train.model.networks import Params, init_denoiser
from rsm_train.model.samplers.diffusion import DiffusionSampler

QUICK_DIFFUSION: dict[str, Any] = {
    "diffusion_steps": 5,
    "particles": 8,
    "target_particles": 1,
    "prior_std": 0.5,
    "temperature_schedule": "constant",
    "temperature": 0.5,
    "exploration_noise": 1.0,
}
"""Settings of the preset "quick" that DPMD and SDAC share."""

KL_RATE = 0.01
"""Step of the dual ascent on log lambda, per nat of error and policy update."""


@dataclass(frozen=True)
class ActorCriticConfig(AlgorithmConfig):
    """Settings that DPMD and SDAC share; the defaults are the `paper` preset."""

    diffusion_steps: int = field(
        default=20, metadata={"group": "Diffusion policy", "help": "T, denoising steps."}
    )
    particles: int = field(
        default=32,
        metadata={
            "group": "Diffusion policy",
            "help": "N, candidate actions (particles); the critics choose the best.",
        },
    )
    target_particles: int = field(
        default=32,
        metadata={
            "group": "Diffusion policy",
            "help": "Particles for the action of the TD target; the critics choose the best.",
        },
    )
    schedule: ScheduleName = field(
        default="cosine", metadata={"group": "Diffusion policy", "help": "Noise schedule."}
    )
    prior_std: float = field(
        default=1.0,
        metadata={
            "group": "Diffusion policy",
            "help": "Standard deviation of the initial noise; a value below 1 is a lower temperature.",
        },
    )
    width: int = field(
        default=256, metadata={"group": "Networks", "help": "Hidden units per layer of policy and critics."}
    )
    depth: int = field(
        default=3, metadata={"group": "Networks", "help": "Hidden layers of policy and critics."}
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
    critic_selection: SelectionName = field(
        default="min",
        metadata={
            "group": "Networks",
            "help": "Value of the ensemble: min, mean, or mean + critic_std_factor * std (mean_std).",
        },
    )
    critic_std_factor: float = field(
        default=0.0,
        metadata={
            "group": "Networks",
            "help": "Factor of the standard deviation for critic_selection mean_std.",
        },
    )
    policy_lr: float = field(
        default=3e-4,
        metadata={
            "group": "Optimisation",
            "help": "Learning rate of the policy; in sac also of the temperature.",
        },
    )
    policy_lr_final: float | None = field(
        default=None,
        metadata={
            "group": "Optimisation",
            "help": "Final learning rate of the policy after a linear decay; default: no decay.",
        },
    )
    policy_lr_decay_start: int = field(
        default=25_000,
        metadata={
            "group": "Optimisation",
            "help": "Policy update at which the decay of the learning rate begins.",
        },
    )
    policy_lr_decay_updates: int = field(
        default=50_000, metadata={"group": "Optimisation", "help": "Number of policy updates of the decay."}
    )
    critic_lr: float = field(
        default=3e-4, metadata={"group": "Optimisation", "help": "Learning rate of the critics."}
    )
    critic_repeats: int = field(
        default=1,
        metadata={
            "group": "Optimisation",
            "help": "Number of times that each critic gradient is applied; the published program uses 2 "
            "(deviation 2).",
        },
    )
    gamma: float = field(default=0.99, metadata={"group": "Optimisation", "help": "Discount factor."})
    tau: float = field(
        default=0.005, metadata={"group": "Optimisation", "help": "Rate of the target and average networks."}
    )
    reward_scale: float = field(
        default=0.2, metadata={"group": "Optimisation", "help": "Factor on rewards in the TD target."}
    )
    policy_every: int = field(
        default=2,
        metadata={
            "group": "Optimisation",
            "help": "Number of critic updates per update of the policy, the target and the average.",
        },
    )
    temperature_schedule: TemperatureSchedule = field(
        default="entropy",
        metadata={
            "group": "Temperature",
            "help": "Schedule of the temperature alpha: constant, the published entropy schedule, or dual "
            "ascent "
            "that keeps KL(weights || uniform) at target_kl (kl).",
        },
    )
    temperature: float = field(
        default=5.0, metadata={"group": "Temperature", "help": "Temperature alpha at the start."}
    )
    temperature_scale: float = field(
        default=1.0,
        metadata={"group": "Temperature", "help": "Ratio lambda / alpha; the weights use Q / lambda."},
    )
    target_entropy: float = field(
        default=-1.5,
        metadata={
            "group": "Temperature",
            "help": "Target of the entropy schedule per action element; in sac the target of the entropy.",
        },
    )
    target_kl: float = field(
        default=2.0,
        metadata={
            "group": "Temperature",
            "help": "Target of the schedule kl in nats; it must be below log K.",
        },
    )
    exploration_noise: float = field(
        default=0.1,
        metadata={"group": "Exploration", "help": "Standard deviation of the exploration noise."},
    )
    exploration_units: Literal["temperature", "absolute"] = field(
        default="temperature",
        metadata={
            "group": "Exploration",
            "help": "Unit of exploration_noise: alpha (temperature) or 1 (absolute).",
        },
    )
    noisy_backup: bool = field(
        default=False,
        metadata={
            "group": "Exploration",
            "help": "Add unclipped exploration noise to the best-of-N actions in the updates (deviation 4).",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("diffusion_steps", "particles", "target_particles", "width", "depth", "critics")
        for name in (*counts, "critic_repeats", "policy_every", "policy_lr_decay_updates"):
            self._require(name, getattr(self, name) >= 1, ">= 1")
        for name in (
            *("policy_lr", "critic_lr", "temperature", "temperature_scale"),
            *("reward_scale", "prior_std", "target_kl"),
        ):
            self._require(name, getattr(self, name) > 0, "> 0")
        self._require("gamma", 0 <= self.gamma <= 1, "between 0 and 1")
        self._require("tau", 0 < self.tau <= 1, "> 0 and <= 1")
        for name in ("exploration_noise", "policy_lr_decay_start"):
            self._require(name, getattr(self, name) >= 0, ">= 0")
        if self.critic_std_factor and self.critic_selection != "mean_std":
            raise ValueError(
                f"wanted critic_selection mean_std with a critic_std_factor, got {self.critic_selection}"
            )
        self._require("policy_lr_final", self.policy_lr_final is None or self.policy_lr_final >= 0, ">= 0")

    def _require_reachable_kl(self, actions: int) -> None:
        """KL(weights || uniform) of K actions is at most log K."""
        reachable = self.temperature_schedule != "kl" or self.target_kl < math.log(actions)
        self._require("target_kl", reachable, f"< log {actions}, the most that {actions} actions can have")

    def ineffective(self) -> Mapping[str, str]:
        """See `AlgorithmConfig.ineffective`."""
        found = {}
        if self.temperature_schedule != "kl":
            found["target_kl"] = "temperature_schedule kl"
        if self.temperature_schedule != "entropy":
            found["target_entropy"] = "temperature_schedule entropy"
        if self.policy_lr_final is None:
            found["policy_lr_decay_start"] = found["policy_lr_decay_updates"] = "policy_lr_final"
        return found


class ActorCritic:
    """The networks, optimisers and temperature of a diffusion policy with critics."""

    def __init__(
        self,
        config: ActorCriticConfig,
        obs_size: int,
        action_size: int,
        *,
        generator: torch.Generator,
        device: torch.device | str,
        compute: Compute,
    ) -> None:
        self.config = config
        self.action_size = action_size
        self.device = torch.device(device)
        self.updates = 0
        self.schedule = make_schedule(config.schedule, config.diffusion_steps, device=device)
        self.inference = Inference(self.schedule, config.prior_std, compute)
        hidden = [config.width] * config.depth
        # Drawn on the CPU, so that a seed gives the same networks on every device.
        self.policy = leaves(init_denoiser(obs_size, action_size, hidden, generator), device)
        self.critic = leaves(
            init_critics(
                *(obs_size, action_size, hidden, generator),
                members=config.critics,
                layer_norm=config.critic_layer_norm,
            ),
            device,
        )
        self.policy_average = copy_params(self.policy)  # the policy that is evaluated and exported
        self.critic_target = copy_params(self.critic)
        self.policy_optimizer = adam(self.policy, config.policy_lr)
        self.critic_optimizer = adam(self.critic, config.critic_lr)
        self._optimizers = {
            "policy_optimizer": (self.policy_optimizer, self.policy),
            "critic_optimizer": (self.critic_optimizer, self.critic),
        }
        self._open_loop = open_loop_temperature(
            config.temperature_schedule, config.temperature, config.target_entropy
        )
        # On the device, so that an update that was captured as a graph reads what the host wrote.
        self.log_alpha = torch.full((), math.log(config.temperature), device=device)
        self._kept = {"log_alpha": self.log_alpha}

    # --- temperature and noise ------------------------------------------------------------------------------

    @property
    def alpha(self) -> Tensor:
        """The temperature, 0-d."""
        return self.log_alpha.exp()

    @property
    def temperature(self) -> float:
        """lambda now, on the host."""
        return float(self.lambda_)

    @property
    def lambda_(self) -> Tensor:
        """What divides Q in the weights, 0-d."""
        return self.config.temperature_scale * self.alpha

    @property
    def exploration_std(self) -> Tensor | float:
        """Standard deviation of the exploration noise now."""
        absolute = self.config.exploration_units == "absolute"
        return self.config.exploration_noise * (1.0 if absolute else self.alpha)

    # --- acting ---------------------------------------------------------------------------------------------

    @property
    def sampler(self) -> DiffusionSampler:
        """How the policy samples."""
        c = self.config
        return DiffusionSampler(
            *(c.schedule, c.diffusion_steps, c.particles, c.prior_std),
            selection=c.critic_selection,
            selection_std=c.critic_std_factor,
        )

    def act(self, obs_BO: Tensor, noise_BTNA: Tensor, exploration_BA: Tensor) -> Tensor:
        """Best of N from the current policy, with exploration noise; [B, A] in [-1, 1]."""
        action = self.best_action(obs_BO, noise_BTNA)
        return explore(action, exploration_BA, self.exploration_std).clamp(-1.0, 1.0)

    def best_action(self, obs_BO: Tensor, noise_BTNA: Tensor) -> Tensor:
        """Of N particles of the current policy, the one the current critics value most; [B, A]."""
        action_BNA = self.inference.sample(self.policy, obs_BO, noise_BTNA)
        if action_BNA.shape[1] == 1:
            return action_BNA[:, 0]
        return choose_best(action_BNA, self.values(self.critic, obs_BO, action_BNA))[0]

    def values(self, critics: Mapping[str, Tensor], obs_BO: Tensor, action_BNA: Tensor) -> Tensor:
        """Q(s, a), one value from the ensemble's, without a graph; [B, N]."""
        return self.select(self.inference.values(critics, obs_BO, action_BNA))

    def select(self, q_E: Tensor) -> Tensor:
        """One value from the ensemble's: [E, ...] -> [...]."""
        return select_value(q_E, self.config.critic_selection, self.config.critic_std_factor)

    # --- learning -------------------------------------------------------------------------------------------

    def begin_update(self) -> bool:
        """Move the counters, the temperature and the learning rate; returns True if the policy is due."""
        c = self.config
        if self._open_loop is not None:
            self.log_alpha.fill_(self._open_loop.log_at(self.updates))
        if c.policy_lr_final is not None:
            done = (self.updates // c.policy_every - c.policy_lr_decay_start) / c.policy_lr_decay_updates
            share = min(max(done, 0.0), 1.0)
            set_learning_rate(self.policy_optimizer, c.policy_lr + share * (c.policy_lr_final - c.policy_lr))
        self.updates += 1
        return self.updates % c.policy_every == 0

    def backup_action(self, obs_BO: Tensor, noise_BTNA: Tensor, exploration_BA: Tensor) -> Tensor:
        """The action [B, A] that learning takes for the policy's: the best of N, noisy with `noisy_backup`."""
        action = self.best_action(obs_BO, noise_BTNA)
        if self.config.noisy_backup:
            action = explore(action, exploration_BA, self.exploration_std)
        return action

    def td_target(self, batch: Batch, next_action_BA: Tensor) -> Tensor:
        """y = reward_scale r + gamma (1 - terminated) Q'(s', a'), [B]."""
        c = self.config
        next_q_B = self.values(self.critic_target, batch.next_obs, next_action_BA.unsqueeze(1)).squeeze(1)
        return td_target(batch, next_q_B, gamma=c.gamma, reward_scale=c.reward_scale)

    def update_critic(self, batch: Batch, y_B: Tensor) -> Metrics:
        """One step on sum_i E (Q_i(s, a) - y)^2."""
        repeats = self.config.critic_repeats
        return update_critic(self.critic, self.critic_optimizer, batch, y_B, repeats=repeats)

    def update_policy(self, loss: Tensor) -> None:
        """One step of the policy, then of the averaged policy and the target critics."""
        descend(self.policy_optimizer, loss)
        move_average(self.policy_average, self.policy, self.config.tau)
        move_average(self.critic_target, self.critic, self.config.tau)

    def update_temperature(self, kl: Tensor) -> None:
        """Dual ascent: warmer where the weights are sharper than target_kl; nothing with another schedule."""
        if self.config.temperature_schedule == "kl":
            self.log_alpha.add_(KL_RATE * (kl - self.config.target_kl))

    # --- keeping --------------------------------------------------------------------------------------------

    def networks(self) -> dict[str, Params]:
        """Every network by name."""
        return {
            "policy": self.policy,
            "policy_average": self.policy_average,
            "critic": self.critic,
            "critic_target": self.critic_target,
        }

    def keep(self, name: str, tensors: Params) -> Params:
        """Make an algorithm's own tensors part of `state()` and `restore()`; they must be changed in place."""
        self._kept |= {f"{name}.{key}": value for key, value in tensors.items()}
        return tensors

    def state(self) -> dict[str, Tensor]:
        """See `Agent.state`."""
        return save_state(self._optimizers, self._kept)

    def restore(self, networks: Mapping[str, Params], state: Mapping[str, Tensor], updates: int) -> None:
        """See `Agent.restore`."""
        for name, params in self.networks().items():
            load_params(params, networks[name])
        load_state(self._optimizers, self._kept, state)
        self.updates = updates
