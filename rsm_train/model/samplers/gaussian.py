"""The sampler of a Gaussian policy, that of SAC.

Shape legend: B rows, T denoising steps, N particles, A action size; actions are in [-1, 1].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rsm_train.model.diffusion import SelectionName
from rsm_train.model.networks import Params, gaussian
from rsm_train.model.normalizer import ObservationScale, scaled
from rsm_train.model.samplers.common import (
    ActionScale,
    Mlp,
    Resampling,
    check_selection,
    frozen,
    in_float64,
    scale_in_float64,
    selected_values,
)


@dataclass(frozen=True)
class GaussianSampler:
    """A Gaussian squashed by tanh, the policy of SAC: a = tanh(mu + sigma z). z = 0 gives its mean action."""

    kind: ClassVar[str] = "gaussian"
    acting: ClassVar[str] = "policy"

    steps: int = 1
    particles: int = 1
    """N, of which the critics choose the best; 1 in training."""
    selection: SelectionName = "min"
    """How the values of the critics become the value that chooses."""
    selection_std: float = 0.0
    """For "mean_std": mean + selection_std * std."""

    @property
    def name(self) -> str:
        """ "gaussian"."""
        return self.kind

    @property
    def chain_length(self) -> int:
        """1."""
        return 1

    def record(self) -> dict[str, Any]:
        """See `Sampler.record`."""
        return {"distribution": "tanh of a normal law"}

    def check(self) -> None:
        """See `Sampler.check`."""
        if self.steps != 1 or type(self.particles) is not int or self.particles < 1:
            raise ValueError(
                "wanted steps 1 and particles >= 1 of a Gaussian policy, got "
                f"{self.steps!r} and {self.particles!r}"
            )
        check_selection(self.selection, self.selection_std)

    def networks(self, obs_size: int, action_size: int) -> list[Mlp]:
        """See `Sampler.networks`."""
        return [Mlp("", obs_size, 2 * action_size, at_least=2)]

    def prepare(
        self,
        policy: Mapping[str, Tensor],
        critics: Mapping[str, Tensor],
        scale: ActionScale,
        obs_scale: ObservationScale | None = None,
    ) -> GaussianWeights:
        """See `Sampler.prepare`."""
        return GaussianWeights(frozen(policy), frozen(critics), self, scale, obs_scale)

    def resampled(self, change: Resampling) -> GaussianSampler:
        """See `Sampler.resampled`."""
        given = {
            "--steps": change.steps,
            "--prior-std": change.prior_std,
            "--sampler": change.name,
            "--eta": change.eta,
        }
        refused = [option for option, value in given.items() if value is not None]
        if refused:
            raise ValueError(
                f"wanted no {', '.join(refused)} for a Gaussian policy, which samples in one step; leave it out"
            )
        return self if change.particles is None else dataclasses.replace(self, particles=change.particles)


@dataclass(frozen=True)
class GaussianWeights:
    """A Gaussian policy, ready to act."""

    policy: Params
    critics: Params
    sampler: GaussianSampler
    scale: ActionScale
    obs_scale: ObservationScale | None = None

    def particles(self, obs_BO: Tensor, noise_BTNA: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Weights.particles`; T is 1."""
        s, obs_BO = self.sampler, scaled(self.obs_scale, obs_BO)
        mean_BA, log_std_BA = gaussian(self.policy, obs_BO)
        action_BNA = torch.tanh(mean_BA.unsqueeze(1) + log_std_BA.exp().unsqueeze(1) * noise_BTNA[:, 0])
        return action_BNA, selected_values(self.critics, obs_BO, action_BNA, s.selection, s.selection_std)

    def without_critics(self) -> GaussianWeights:
        """See `Weights.without_critics`."""
        return dataclasses.replace(self, critics={})

    def double(self) -> GaussianWeights:
        """See `Weights.double`."""
        return dataclasses.replace(
            self,
            policy=in_float64(self.policy),
            critics=in_float64(self.critics),
            scale=scale_in_float64(self.scale),
            obs_scale=None if self.obs_scale is None else self.obs_scale.to(torch.float64),
        )
