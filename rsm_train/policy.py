"""The learnt policy as a `Policy`: best of N particles, in the environment's units."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rsm_serve.policy import ActResult, PolicySpec, Seed, Timing, act_rows
from rsm_train.critic import best_of_n, min_q
from rsm_train.diffusion import NoiseSchedule
from rsm_train.networks import Params, SplitDenoiser, sample_actions, split_denoiser


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
    schedule: NoiseSchedule
    prior_std: float
    scale: ActionScale

    @classmethod
    def prepare(
        cls,
        policy: Mapping[str, Tensor],
        critics: Mapping[str, Tensor],
        schedule: NoiseSchedule,
        prior_std: float,
        spec: PolicySpec,
    ) -> PolicyWeights:
        """Detached copies of the parameters, with all that does not depend on the observation folded."""
        with torch.no_grad():
            frozen = {name: value.detach().clone().cpu() for name, value in policy.items()}
            denoiser = split_denoiser(frozen, schedule.steps)
        fixed_critics = {name: value.detach().clone().cpu() for name, value in critics.items()}
        return cls(denoiser, fixed_critics, schedule, prior_std, ActionScale.of(spec))


def act_best_of_n(weights: PolicyWeights, obs_BO: Tensor, noise_BTNA: Tensor) -> tuple[Tensor, Tensor]:
    """The policy as a pure function: action [B, A] in environment units, and its value q [B]."""
    action_BNA = sample_actions(
        weights.denoiser, weights.schedule, obs_BO, noise_BTNA, prior_std=weights.prior_std
    )
    action_BA, q_B = best_of_n(weights.critics, obs_BO, action_BNA)
    return weights.scale.to_env(action_BA), q_B


class TorchPolicy:
    """A `Policy` that runs in this process with torch on the CPU."""

    def __init__(self, spec: PolicySpec, weights: PolicyWeights) -> None:
        self.spec = spec
        self.weights = weights

    def particles(
        self, obs_BO: NDArray[np.float32], noise_BTNA: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """All N particles [B, N, A] in environment units, and their values [B, N]."""
        w = self.weights
        with torch.inference_mode():
            obs, noise = torch.from_numpy(obs_BO), torch.from_numpy(noise_BTNA)
            action_BNA = sample_actions(w.denoiser, w.schedule, obs, noise, prior_std=w.prior_std)
            return w.scale.to_env(action_BNA).numpy(), min_q(w.critics, obs, action_BNA).numpy()

    def act(
        self,
        obs: ArrayLike,
        *,
        seed: Seed = None,
        noise: NDArray[np.float32] | None = None,
        deterministic: bool = False,
    ) -> ActResult:
        """See `rsm_serve.policy.Policy.act`."""
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
        return rows.result(action.numpy(), q.numpy(), version=self.spec.version, timing=timing)
