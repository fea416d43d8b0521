"""Settings of the part that DPMD and SDAC share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rsm_train.algorithms.common import AlgorithmConfig
from rsm_train.algorithms.temperature import TemperatureSchedule
from rsm_train.model.diffusion import ScheduleName, SelectionName

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
