"""Settings of the critics and of the optimisation, which all algorithms of the toolkit share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from rsm_train.algorithms.common import AlgorithmConfig
from rsm_train.model.critic import CriticNorm
from rsm_train.model.diffusion import SelectionName

CriticLoss = Literal["squared", "categorical"]
CriticTarget = Literal["average", "none"]


@dataclass(frozen=True)
class CriticConfig(AlgorithmConfig):
    """Settings of critics, which combine freely, and of the steps of critics and policy."""

    width: int = field(
        default=256, metadata={"group": "Networks", "help": "Hidden units per layer of policy and critics."}
    )
    depth: int = field(
        default=3, metadata={"group": "Networks", "help": "Hidden layers of policy and critics."}
    )
    critics: int = field(
        default=2, metadata={"group": "Critics", "help": "E, members of the ensemble of critics."}
    )
    critic_width: int | None = field(
        default=None,
        metadata={"group": "Critics", "help": "Hidden units per layer of the critics; default: width."},
    )
    critic_depth: int | None = field(
        default=None, metadata={"group": "Critics", "help": "Hidden layers of the critics; default: depth."}
    )
    critic_selection: SelectionName = field(
        default="min",
        metadata={
            "group": "Critics",
            "help": "Value of the ensemble: min, mean, or mean + critic_std_factor * std (mean_std).",
        },
    )
    critic_std_factor: float = field(
        default=0.0,
        metadata={
            "group": "Critics",
            "help": "Factor of the standard deviation for critic_selection mean_std.",
        },
    )
    critic_norm: CriticNorm = field(
        default="none",
        metadata={
            "group": "Critics",
            "help": "Normalisation of the critics' hidden layers before their activations: none, LayerNorm "
            "(layer), or BatchNorm over (s, a) and (s', a') together (batch).",
        },
    )
    critic_input_norm: bool = field(
        default=False,
        metadata={"group": "Critics", "help": "Normalise the critics' input [s, a] over the batch."},
    )
    critic_unit_weights: bool = field(
        default=False,
        metadata={
            "group": "Critics",
            "help": "Scale each row of the critics' weights to norm 1 after each update.",
        },
    )
    critic_loss: CriticLoss = field(
        default="squared",
        metadata={
            "group": "Critics",
            "help": "Loss of the critics: squared error, or cross-entropy of a distribution over value_atoms "
            "(categorical).",
        },
    )
    value_atoms: int = field(
        default=101, metadata={"group": "Critics", "help": "Number of atoms of a categorical value."}
    )
    value_limit: float = field(
        default=5.0,
        metadata={
            "group": "Critics",
            "help": "Largest atom of a categorical value, in scaled rewards; the smallest is its negative.",
        },
    )
    critic_target: CriticTarget = field(
        default="average",
        metadata={
            "group": "Critics",
            "help": "Critics of the TD target: their moving average, or the critics themselves (none).",
        },
    )
    critic_lr: float = field(
        default=3e-4, metadata={"group": "Optimisation", "help": "Learning rate of the critics."}
    )
    policy_lr: float = field(
        default=3e-4,
        metadata={
            "group": "Optimisation",
            "help": "Learning rate of the policy; in sac also of the temperature.",
        },
    )
    critic_lr_final: float | None = field(
        default=None,
        metadata={
            "group": "Optimisation",
            "help": "Final learning rate of the critics after a linear decay; default: no decay.",
        },
    )
    policy_lr_final: float | None = field(
        default=None,
        metadata={
            "group": "Optimisation",
            "help": "Final learning rate of the policy after a linear decay; default: no decay.",
        },
    )
    critic_lr_decay_start: int = field(
        default=0,
        metadata={
            "group": "Optimisation",
            "help": "Critic update at which the decay of the critics' learning rate begins.",
        },
    )
    critic_lr_decay_updates: int = field(
        default=100_000,
        metadata={"group": "Optimisation", "help": "Number of critic updates of the decay."},
    )
    policy_lr_decay_start: int = field(
        default=25_000,
        metadata={
            "group": "Optimisation",
            "help": "Policy update at which the decay of the policy's learning rate begins.",
        },
    )
    policy_lr_decay_updates: int = field(
        default=50_000, metadata={"group": "Optimisation", "help": "Number of policy updates of the decay."}
    )
    tau: float = field(
        default=0.005, metadata={"group": "Optimisation", "help": "Rate of the target and average networks."}
    )
    policy_every: int = field(
        default=2,
        metadata={
            "group": "Optimisation",
            "help": "Number of critic updates per update of the policy, the target and the average.",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "depth", "critics", "policy_every", "policy_lr_decay_updates"):
            self._require(name, getattr(self, name) >= 1, ">= 1")
        for name in ("critic_width", "critic_depth"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, ">= 1")
        self._require("critic_lr_decay_updates", self.critic_lr_decay_updates >= 1, ">= 1")
        for name in ("policy_lr", "critic_lr", "value_limit"):
            self._require(name, getattr(self, name) > 0, "> 0")
        for name in ("policy_lr_decay_start", "critic_lr_decay_start"):
            self._require(name, getattr(self, name) >= 0, ">= 0")
        for name in ("policy_lr_final", "critic_lr_final"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 0, ">= 0")
        self._require("tau", 0 < self.tau <= 1, "> 0 and <= 1")
        self._require("value_atoms", self.value_atoms >= 2, ">= 2")
        if self.critic_std_factor and self.critic_selection != "mean_std":
            raise ValueError(
                f"wanted critic_selection mean_std with a critic_std_factor, got {self.critic_selection}"
            )
        if self.critic_loss == "categorical" and self.critic_selection == "mean_std":
            raise ValueError(
                "wanted critic_selection min or mean with critic_loss categorical, got mean_std; that "
                "is no distribution"
            )

    @property
    def critic_hidden(self) -> list[int]:
        """Width of each hidden layer of the critics."""
        width, depth = self.critic_width or self.width, self.critic_depth or self.depth
        return [width] * depth

    def critic_lr_after(self, updates: int) -> float:
        """The critics' learning rate after a number of their updates."""
        share = (updates - self.critic_lr_decay_start) / self.critic_lr_decay_updates
        return _decayed(self.critic_lr, self.critic_lr_final, share)

    def policy_lr_after(self, updates: int) -> float:
        """The policy's learning rate after a number of its updates."""
        share = (updates - self.policy_lr_decay_start) / self.policy_lr_decay_updates
        return _decayed(self.policy_lr, self.policy_lr_final, share)

    def ineffective(self) -> Mapping[str, str]:
        """See `AlgorithmConfig.ineffective`."""
        found = {}
        if self.policy_lr_final is None:
            found["policy_lr_decay_start"] = found["policy_lr_decay_updates"] = "policy_lr_final"
        if self.critic_lr_final is None:
            found["critic_lr_decay_start"] = found["critic_lr_decay_updates"] = "critic_lr_final"
        if self.critic_loss != "categorical":
            found["value_atoms"] = found["value_limit"] = "critic_loss categorical"
        return found


def _decayed(first: float, final: float | None, share: float) -> float:
    """A line from `first` at share 0 to `final` at share 1, constant outside it; without `final`, `first`."""
    return first if final is None else first + min(max(share, 0.0), 1.0) * (final - first)
