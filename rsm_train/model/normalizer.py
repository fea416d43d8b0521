"""Normalised observations: running mean and variance in learning, a fixed affine map with a clip in a policy.

    z = clip((s - mean) / sqrt(var + EPSILON), -LIMIT, LIMIT)

The statistics are those of the observations that were stored since the beginning of the run. They belong to
the policy: a checkpoint and an exported graph have them, and take raw observations.
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
        share = len(obs) / count
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


def _cpu(device: torch.device | None) -> torch.device:
    return torch.device("cpu") if device is None else device
