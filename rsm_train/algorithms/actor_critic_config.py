"""Settings of the part that DPMD and SDAC share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rsm_train.algorithms.critic_config import CriticConfig
from rsm_train.algorithms.temperature import TemperatureSchedule
from rsm_train.model.diffusion import ScheduleName

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
class ActorCriticConfig(CriticConfig):
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
    critic_repeats: int = field(
        default=1,
        metadata={
            "group": "Optimisation",
            "help": "Number of times that each critic gradient is applied; the published program uses 2 "
            "(deviation 2).",
        },
    )
    reward_scale: float = field(
        default=0.2, metadata={"group": "Optimisation", "help": "Factor on rewards in the TD target."}
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
        for name in ("diffusion_steps", "particles", "target_particles", "critic_repeats"):
            self._require(name, getattr(self, name) >= 1, ">= 1")
        for name in ("temperature", "temperature_scale", "prior_std", "target_kl"):
            self._require(name, getattr(self, name) > 0, "> 0")
        self._require("exploration_noise", self.exploration_noise >= 0, ">= 0")

    def _require_reachable_kl(self, actions: int) -> None:
        """KL(weights || uniform) of K actions is at most log K."""
        reachable = self.temperature_schedule != "kl" or self.target_kl < math.log(actions)
        self._require("target_kl", reachable, f"< log {actions}, the most that {actions} actions can have")

    def ineffective(self) -> Mapping[str, str]:
        """See `AlgorithmConfig.ineffective`."""
        found = dict(super().ineffective())
        if self.temperature_schedule != "kl":
            found["target_kl"] = "temperature_schedule kl"
        if self.temperature_schedule != "entropy":
            found["target_entropy"] = "temperature_schedule entropy"
        return found
