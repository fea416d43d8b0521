"""The learnt policy as a `Policy`: best of N particles, in the environment's units."""

from __future__ import annotations

import time

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rsm_common.policy import ActResult, Seed, Timing, act_rows
from rsm_common.spec import PolicySpec
from rsm_train.model.critic import ATOMS, choose_best
from rsm_train.model.samplers.common import ActionScale, Weights


def action_scale(spec: PolicySpec) -> ActionScale:
    """The scale of a policy's action box."""
    return ActionScale.of(torch.from_numpy(spec.action_low), torch.from_numpy(spec.action_high))


def act_best_of_n(weights: Weights, obs_BO: Tensor, noise_BTNA: Tensor) -> tuple[Tensor, Tensor | None]:
    """The policy as a pure function: action [B, A] in environment units, and its value q [B], if it has one."""
    action_BNA, q_BN = weights.particles(obs_BO, noise_BTNA)
    if q_BN is None:
        return weights.scale.to_env(action_BNA[:, 0]), None
    action_BA, q_B = choose_best(action_BNA, q_BN)
    return weights.scale.to_env(action_BA), q_B


class TorchPolicy:
    """A `Policy` that runs in this process with torch on the CPU."""

    def __init__(self, spec: PolicySpec, weights: Weights) -> None:
        self.spec = spec
        self.weights = weights

    @property
    def value_size(self) -> float:
        """The magnitude that rounding of values is in proportion to: the largest atom of the critics, or 1."""
        atoms = self.weights.critics.get(ATOMS)
        return 1.0 if atoms is None else float(atoms.abs().max())

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
