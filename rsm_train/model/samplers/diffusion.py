"""The sampler of a diffusion policy, that of DPMD and SDAC.

Shape legend: B rows, T denoising steps, N particles, A action size; actions are in [-1, 1].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rsm_train.model.diffusion import NoiseSchedule, ScheduleName, SelectionName, make_schedule, timesteps
from rsm_train.model.networks import (
    TIME_EMBEDDING_SIZE,
    Params,
    SplitDenoiser,
    sample_actions,
    split_denoiser,
)
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
class DiffusionSampler:
    """A denoising chain with the best of N particles by the critics: the policy of DPMD and SDAC."""

    kind: ClassVar[str] = "diffusion"
    acting: ClassVar[str] = "policy_average"

    schedule: ScheduleName
    steps: int
    """T, of the schedule and of training."""
    particles: int
    """N, of which the critics choose the best."""
    prior_std: float
    """Standard deviation of the initial latent."""
    selection: SelectionName = "min"
    """How the values of the critics become the value that chooses."""
    selection_std: float = 0.0
    """For "mean_std": mean + selection_std * std."""
    chain_steps: int | None = None
    """Number of the T steps that sampling takes; None: all."""
    eta: float = 1.0
    """Share of DDPM's noise that sampling adds: 1 is DDPM, 0 the deterministic DDIM."""

    @property
    def name(self) -> str:
        """ "ddpm", or "ddim" with less than DDPM's noise."""
        return "ddpm" if self.eta == 1.0 else "ddim"

    @property
    def chain_length(self) -> int:
        """Reverse steps that sampling takes."""
        return self.chain_steps or self.steps

    def make_schedule(self) -> NoiseSchedule:
        """The schedule, with the reverse steps that are taken.

        Raises:
            ValueError: see `make_schedule`.
        """
        return make_schedule(self.schedule, self.steps, chain_steps=self.chain_steps, eta=self.eta)

    def record(self) -> dict[str, Any]:
        """See `Sampler.record`."""
        return {
            "schedule": self.schedule,
            "train_steps": self.steps,
            "timesteps": list(timesteps(self.steps, self.chain_steps)),
            "eta": self.eta,
            "prior_std": self.prior_std,
        }

    def check(self) -> None:
        """See `Sampler.check`."""
        try:
            self.make_schedule()
        except TypeError as error:
            raise ValueError(str(error)) from None
        if not isinstance(self.prior_std, (float, int)) or not self.prior_std > 0:
            raise ValueError(f"wanted prior_std > 0, got {self.prior_std!r}")
        check_selection(self.selection, self.selection_std)

    def networks(self, obs_size: int, action_size: int) -> list[Mlp]:
        """See `Sampler.networks`."""
        inputs = obs_size + action_size + TIME_EMBEDDING_SIZE
        return [
            Mlp("time.", TIME_EMBEDDING_SIZE, TIME_EMBEDDING_SIZE),
            Mlp("", inputs, action_size, at_least=2),
        ]

    def prepare(
        self,
        policy: Mapping[str, Tensor],
        critics: Mapping[str, Tensor],
        scale: ActionScale,
        obs_scale: ObservationScale | None = None,
    ) -> DiffusionWeights:
        """See `Sampler.prepare`; all that does not depend on the observation is folded."""
        schedule = self.make_schedule()
        with torch.no_grad():
            denoiser = split_denoiser(frozen(policy), schedule.steps)
        return DiffusionWeights(denoiser, frozen(critics), schedule, self, scale, obs_scale)

    def resampled(self, change: Resampling) -> DiffusionSampler:
        """See `Sampler.resampled`."""
        steps = change.steps
        if steps is not None and steps > self.steps:
            raise ValueError(f"wanted --steps of at most {self.steps}, as many as were trained, got {steps}")
        changed: dict[str, Any] = {
            "chain_steps": None if steps == self.steps and self.chain_steps is None else steps,
            "particles": change.particles,
            "prior_std": change.prior_std,
            "eta": (change.eta or 0.0) if change.name == "ddim" else 1.0,
        }
        return dataclasses.replace(self, **{key: value for key, value in changed.items() if value is not None})


@dataclass(frozen=True)
class DiffusionWeights:
    """A denoising chain, ready to act."""

    denoiser: SplitDenoiser
    critics: Params
    schedule: NoiseSchedule
    sampler: DiffusionSampler
    scale: ActionScale
    obs_scale: ObservationScale | None = None

    def particles(self, obs_BO: Tensor, noise_BTNA: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Weights.particles`."""
        s, obs_BO = self.sampler, scaled(self.obs_scale, obs_BO)
        action_BNA = sample_actions(self.denoiser, self.schedule, obs_BO, noise_BTNA, prior_std=s.prior_std)
        return action_BNA, selected_values(self.critics, obs_BO, action_BNA, s.selection, s.selection_std)

    def without_critics(self) -> DiffusionWeights:
        """See `Weights.without_critics`."""
        return dataclasses.replace(self, critics={})

    def double(self) -> DiffusionWeights:
        """See `Weights.double`."""
        d = self.denoiser
        parts = (d.obs_weight.double(), d.action_weight.double(), d.step_bias.double())
        return dataclasses.replace(
            self,
            denoiser=SplitDenoiser(*parts, in_float64(d.tail)),
            critics=in_float64(self.critics),
            scale=scale_in_float64(self.scale),
            obs_scale=None if self.obs_scale is None else self.obs_scale.to(torch.float64),
        )
