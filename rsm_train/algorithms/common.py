"""Parts that the algorithms share: settings, the batch, parameters and their averages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from rsm_train.model.kernels import Compute
from rsm_train.model.networks import Params
from rsm_train.model.samplers.common import Sampler

Metrics = dict[str, Tensor]
"""Named 0-d detached tensors; they leave the device once per log interval."""


@dataclass(frozen=True)
class AlgorithmConfig:
    """Base of the settings of an algorithm.

    Every field with a "help" entry in its metadata becomes an option of rsm-train.

    Raises:
        ValueError: a number that is not finite, or out of range.
    """

    gamma: float = field(default=0.99, metadata={"group": "Optimisation", "help": "Discount factor."})
    reward_scale: float = field(
        default=1.0, metadata={"group": "Optimisation", "help": "Factor on rewards in the TD target."}
    )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"wanted a finite {name}, got {value}")
        self._require("gamma", 0 <= self.gamma <= 1, "between 0 and 1")
        self._require("reward_scale", self.reward_scale > 0, "> 0")

    def ineffective(self) -> Mapping[str, str]:
        """Settings that have no effect beside these values, and the setting that each of them needs.

        A key is the name of a setting, or "name=value" for one of its values.
        """
        return {}

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(f"wanted {name} {wanted}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Batch:
    """Transitions from the replay buffer, float32."""

    obs: Tensor  # [B, O]
    action: Tensor  # [B, A] in [-1, 1]
    reward: Tensor  # [B]
    next_obs: Tensor  # [B, O]; the true final observation where an episode ended
    terminated: Tensor  # [B], 1 where the episode ended in a terminal state; a time limit is not one


class Agent(Protocol):
    """What acts and is kept: the networks and the state of an algorithm."""

    updates: int
    """Updates done."""

    @property
    def sampler(self) -> Sampler:
        """How the policy samples."""
        ...

    @property
    def temperature(self) -> float:
        """What divides Q in the weights, now."""
        ...

    def act(self, obs_BO: Tensor, noise_BTNA: Tensor, exploration_BA: Tensor) -> Tensor:
        """Exploring actions [B, A] in [-1, 1]."""
        ...

    def networks(self) -> dict[str, Params]:
        """Every network by name; "policy_average" and "critic" make the exported policy."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Beside the networks, every tensor that learning continues from: moments, statistics, temperature."""
        ...

    def restore(self, networks: Mapping[str, Params], state: Mapping[str, Tensor], updates: int) -> None:
        """Continue from what `networks()`, `state()` and `updates` were.

        Raises:
            KeyError: a tensor is missing.
            ValueError: a tensor has another shape.
        """
        ...


class Algorithm(Protocol):
    """The interface between the training loop and an algorithm; see CONTRIBUTING.md for an example."""

    Config: ClassVar[type[AlgorithmConfig]]
    """The settings; their defaults are those of the preset "paper"."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]
    """Settings by the name of a preset. An algorithm has only the presets that are named here."""

    def __init__(
        self,
        config: Any,
        obs_size: int,
        action_size: int,
        *,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        compute: Compute = ...,
    ) -> None: ...

    @property
    def agent(self) -> Agent:
        """What acts and is kept."""
        ...

    def draw_noise(self, batch_size: int, generator: torch.Generator) -> Any:
        """All randomness of one update."""
        ...

    def update(self, batch: Batch, noise: Any) -> Metrics:
        """One update of critics and, when due, policy."""
        ...


def move_average(average: Mapping[str, Tensor], params: Mapping[str, Tensor], tau: float) -> None:
    """average <- average + tau (params - average), in place."""
    with torch.no_grad():
        torch._foreach_lerp_(list(average.values()), list(params.values()), tau)


def copy_params(params: Mapping[str, Tensor]) -> Params:
    """A detached copy."""
    return {name: value.detach().clone() for name, value in params.items()}


def load_params(params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into parameters, in place.

    Raises:
        KeyError: a value is missing.
        ValueError: a value has another shape.
    """
    with torch.no_grad():
        for name, param in params.items():
            if values[name].shape != param.shape:
                raise ValueError(f"{name}: wanted shape {list(param.shape)}, got {list(values[name].shape)}")
            param.copy_(values[name])


def leaves(params: Params, device: torch.device | str) -> Params:
    """Parameters on a device, ready for an optimiser."""
    return {name: value.to(device).requires_grad_() for name, value in params.items()}


def explore(action: Tensor, noise: Tensor, std: Tensor | float) -> Tensor:
    """a + std * N(0, I), not clipped."""
    return action + std * noise


def weight_health(weight_BK: Tensor) -> Metrics:
    """How evenly the weights of K actions are spread, averaged over states.

    effective sample size / K = 1 / (K sum w^2); the largest weight; KL(w || uniform) = sum w log(K w).
    """
    k = weight_BK.shape[1]
    kl = torch.special.xlogy(weight_BK, weight_BK * k).sum(dim=1)
    return {
        "weight_ess_fraction": (1 / (k * weight_BK.square().sum(dim=1))).mean(),
        "weight_max": weight_BK.amax(dim=1).mean(),
        "weight_kl_uniform": kl.mean(),
    }
