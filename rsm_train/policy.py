"""The learnt policy as a `Policy`: best of N particles, in the environment's units."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rsm_common.policy import ActResult, Seed, Timing, act_rows
from rsm_common.spec import PolicySpec
from rsm_train.model.critic import choose_best, q_values, select_value
from rsm_train.model.diffusion import NoiseSchedule, SamplerSettings
from rsm_train.model.networks import Params, SplitDenoiser, gaussian, sample_actions, split_denoiser


@dataclass(frozen=True)
class ActionScale:
    """The affine map from [-1, 1] to the environment's action box, float32 [A] each."""

    center: Tensor
    half_range: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, spec: PolicySpec) -> ActionScale:
        """The scale of a policy's action box."""
        low, high = torch.from_numpy(spec.action_low), torch.from_numpy(spec.action_high)
        return cls((high + low) / 2, (high - low) / 2, low, high)

    def to_env(self, action: Tensor) -> Tensor:
        """[-1, 1] -> environment units, inside the bounds in spite of rounding."""
        scaled = self.center + self.half_range * action
        return torch.minimum(torch.maximum(scaled, self.low), self.high)


@dataclass(frozen=True)
class PolicyWeights:
    """All that acting needs, prepared once."""

    denoiser: SplitDenoiser
    critics: Params
    """Empty where one particle needs no choice; there is then no value."""
    schedule: NoiseSchedule
    sampler: SamplerSettings
    scale: ActionScale

    @classmethod
    def prepare(
        cls,
        policy: Mapping[str, Tensor],
        critics: Mapping[str, Tensor],
        sampler: SamplerSettings,
        spec: PolicySpec,
    ) -> PolicyWeights:
        """Detached copies of the parameters, with all that does not depend on the observation folded."""
        schedule = sampler.make_schedule()
        with torch.no_grad():
            frozen = {name: value.detach().clone().cpu() for name, value in policy.items()}
            denoiser = split_denoiser(frozen, schedule.steps)
        fixed_critics = {name: value.detach().clone().cpu() for name, value in critics.items()}
        return cls(denoiser, fixed_critics, schedule, sampler, ActionScale.of(spec))

    def double(self) -> PolicyWeights:
        """The same in float64, to tell rounding from error."""

        def cast(params: Mapping[str, Tensor]) -> Params:
            return {name: value.double() for name, value in params.items()}

        d = self.denoiser
        parts = (d.obs_weight.double(), d.action_weight.double(), d.step_bias.double())
        return dataclasses.replace(
            self,
            denoiser=SplitDenoiser(*parts, cast(d.tail)),
            critics=cast(self.critics),
            scale=ActionScale(**cast(vars(self.scale))),
        )

    def particles(self, obs_BO: Tensor, noise_BTNA: Tensor) -> tuple[Tensor, Tensor | None]:
        """All N particles [B, N, A] in [-1, 1] and their values [B, N], None without critics."""
        s = self.sampler
        action_BNA = sample_actions(self.denoiser, self.schedule, obs_BO, noise_BTNA, prior_std=s.prior_std)
        if not self.critics:
            return action_BNA, None
        q_EBN = q_values(self.critics, obs_BO, action_BNA)
        return action_BNA, select_value(q_EBN, s.selection, s.selection_std)


@dataclass(frozen=True)
class GaussianWeights:
    """The same for a Gaussian squashed by tanh, which acts by its mean: its one particle."""

    policy: Params
    critics: Params
    scale: ActionScale

    @classmethod
    def prepare(
        cls, policy: Mapping[str, Tensor], critics: Mapping[str, Tensor], spec: PolicySpec
    ) -> GaussianWeights:
        """Detached copies of the parameters."""
        copies = [
            {name: value.detach().clone().cpu() for name, value in params.items()}
            for params in (policy, critics)
        ]
        return cls(copies[0], copies[1], ActionScale.of(spec))

    def particles(self, obs_BO: Tensor, noise_BTNA: Tensor) -> tuple[Tensor, Tensor]:
        """The mean's action [B, 1, A] in [-1, 1], whatever the noise, and its value [B, 1]."""
        action_B1A = torch.tanh(gaussian(self.policy, obs_BO)[0]).unsqueeze(1)
        return action_B1A, select_value(q_values(self.critics, obs_BO, action_B1A))


def act_best_of_n(
    weights: PolicyWeights | GaussianWeights, obs_BO: Tensor, noise_BTNA: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The policy as a pure function: action [B, A] in environment units, and its value q [B], if it has one."""
    action_BNA, q_BN = weights.particles(obs_BO, noise_BTNA)
    if q_BN is None:
        return weights.scale.to_env(action_BNA[:, 0]), None
    action_BA, q_B = choose_best(action_BNA, q_BN)
    return weights.scale.to_env(action_BA), q_B


class TorchPolicy:
    """A `Policy` that runs in this process with torch on the CPU."""

    def __init__(self, spec: PolicySpec, weights: PolicyWeights | GaussianWeights) -> None:
        self.spec = spec
        self.weights = weights

    def particles(
        self, obs_BO: NDArray[np.float32], noise_BTNA: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """All N particles [B, N, A] in environment units, and their values [B, N], None without critics."""
        with torch.inference_mode():
            action, q = self.weights.particles(torch.from_numpy(obs_BO), torch.from_numpy(noise_BTNA))
            return self.weights.scale.to_env(action).numpy(), None if q is None else q.numpy()

    def act(
        self,
        obs: ArrayLike,
        *,
        seed: Seed = None,
        noise: NDArray[np.float32] | None = None,
        deterministic: bool = False,
    ) -> ActResult:
        """See `rsm_common.policy.Policy.act`."""
        start = time.perf_counter()
        rows = act_rows(self.spec, obs, seed=seed, noise=noise, deterministic=deterministic)
        noise_BTNA = rows.drawn_noise(self.spec)
        prepared = time.perf_counter()
        with torch.inference_mode():
            action, q = act_best_of_n(self.weights, torch.from_numpy(rows.obs_BO), torch.from_numpy(noise_BTNA))
        end = time.perf_counter()
        timing = Timing(
            batch_us=(prepared - start) * 1e6,
            compute_us=(end - prepared) * 1e6,
            batch_rows=len(rows.obs_BO),
            total_us=(end - start) * 1e6,
        )
        return rows.result(
            action.numpy(), None if q is None else q.numpy(), version=self.spec.version, timing=timing
        )
