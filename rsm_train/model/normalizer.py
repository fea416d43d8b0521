"""Normalised observations and rewards: running statistics in learning, a fixed map in a policy.

    z = clip((s - mean) / sqrt(var + EPSILON), -LIMIT, LIMIT)

The statistics are those of the observations that were stored since the beginning of the run. They belong to
the policy: a checkpoint and an exported graph have them, and take raw observations.

Rewards are divided by a unit, which follows the discounted return; values that were learnt from them are
multiplied by it where they leave learning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LIMIT = 10.0
"""Normalised observations are clipped to [-LIMIT, LIMIT]."""
EPSILON = 1e-8
"""Added to the variance: an element that never changes becomes 0."""


@dataclass(frozen=True)
class ObservationScale:
    """The map of a policy, [O] float32 each."""

    mean: Tensor
    inv_std: Tensor

    def normalize(self, obs_BO: Tensor) -> Tensor:
        """Observations [B, O] in [-LIMIT, LIMIT], of the dtype and on the device of the scale."""
        return ((obs_BO - self.mean) * self.inv_std).clamp(-LIMIT, LIMIT)

    def to(self, target: torch.device | torch.dtype) -> ObservationScale:
        """The same on another device or in another dtype."""
        return ObservationScale(self.mean.to(target), self.inv_std.to(target))


def scaled(scale: ObservationScale | None, obs_BO: Tensor) -> Tensor:
    """Observations as the networks take them; without a scale as they are."""
    return obs_BO if scale is None else scale.normalize(obs_BO)


class RunningStatistics:
    """Count, mean and sum of squared deviations of all observations so far, float64 on the CPU."""

    def __init__(self, size: int) -> None:
        """Begin without an observation; `scale()` then has mean 0 and standard deviation 1."""
        self.count = torch.zeros((), dtype=torch.int64)
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.squares = torch.zeros(size, dtype=torch.float64)

    def add(self, obs_BO: Tensor) -> None:
        """Take in observations [B, O] (Chan et al. 1979, of two samples the joint mean and variance)."""
        obs = obs_BO.double().cpu()
        count = self.count + len(obs)
        shift = obs.mean(dim=0) - self.mean
        share = len(obs) / count.double()  # of an integer tensor, torch would divide in float32
        self.squares += obs.sub(obs.mean(dim=0)).square().sum(dim=0) + shift.square() * self.count * share
        self.mean += shift * share
        self.count = count

    def scale(self, device: torch.device | None = None) -> ObservationScale:
        """The map that the statistics mean now."""
        if not self.count:
            return ObservationScale(self.mean.float(), torch.ones_like(self.mean).float()).to(_cpu(device))
        inv_std = (self.squares / self.count + EPSILON).rsqrt()
        return ObservationScale(self.mean.float(), inv_std.float()).to(_cpu(device))

    def state(self) -> dict[str, Tensor]:
        """The tensors that `restore` continues from."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state()` was.

        Raises:
            KeyError: a tensor is missing.
            ValueError: a tensor has another shape or is not finite.
        """
        for name, own in self.state().items():
            value = state[name]
            if value.shape != own.shape or not torch.isfinite(value).all():
                raise ValueError(f"normalizer.{name}: wanted finite {list(own.shape)}, got {list(value.shape)}")
            setattr(self, name, value.to(own.dtype).clone())


RETURN_LIMIT = 5.0
"""The largest discounted return seen so far is at most this many units of reward."""


class ReturnStatistics:
    """The unit of rewards: max(std of the discounted return, largest |discounted return| / RETURN_LIMIT).

    The discounted return at a step is that of the rewards up to it, G <- gamma G + r, from the beginning of
    its episode. Float64 on the CPU.
    """

    def __init__(self, envs: int, gamma: float) -> None:
        """Begin without a reward; the unit is then 1.

        Args:
            envs: number of environments.
            gamma: discount factor.
        """
        self._gamma = gamma
        self._statistics = RunningStatistics(1)
        self._returns = torch.zeros(envs, dtype=torch.float64)
        self._largest = torch.zeros((), dtype=torch.float64)

    def add(self, reward_B: Tensor, ended_B: Tensor) -> None:
        """Take in one step of every environment.

        Args:
            reward_B: rewards, [B].
            ended_B: whether the episode ended with this step, [B] bool.
        """
        self._returns = self._gamma * self._returns + reward_B.double().cpu()
        self._statistics.add(self._returns.unsqueeze(1))
        self._largest = torch.maximum(self._largest, self._returns.abs().max())
        self.end_episodes(ended_B)

    def end_episodes(self, ended_B: Tensor) -> None:
        """Begin the discounted return of some environments anew, [B] bool."""
        self._returns = torch.where(ended_B.cpu(), torch.zeros_like(self._returns), self._returns)

    @property
    def unit(self) -> float:
        """What rewards are divided by, in the environment's rewards; above 0."""
        if not self._statistics.count:
            return 1.0
        variance = float(self._statistics.squares) / float(self._statistics.count)
        unit = max(variance**0.5, float(self._largest) / RETURN_LIMIT)
        return unit if unit > EPSILON else 1.0

    def state(self) -> dict[str, Tensor]:
        """The tensors that `restore` continues from."""
        return {**self._statistics.state(), "returns": self._returns, "largest": self._largest}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state()` was. Raises what `RunningStatistics.restore` does."""
        self._statistics.restore(state)
        for name, own in (("returns", self._returns), ("largest", self._largest)):
            if state[name].shape != own.shape or not torch.isfinite(state[name]).all():
                raise ValueError(f"{name}: wanted finite {list(own.shape)}, got {list(state[name].shape)}")
        self._returns = state["returns"].to(torch.float64).clone()
        self._largest = state["largest"].to(torch.float64).clone()


def _cpu(device: torch.device | None) -> torch.device:
    return torch.device("cpu") if device is None else device
