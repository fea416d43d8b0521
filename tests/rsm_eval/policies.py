"""Hand-written policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsm_common.policy import ActResult, Seed, Timing, act_rows
from rsm_common.spec import PolicySpec
from rsm_eval.envs import env_boxes, make_env

Function = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[Any]]
BALANCING_GAINS = np.array([0.5, 10.0, 1.0, 2.0], np.float32)


class FunctionPolicy:
    """Acts by `function(obs [B, O], noise [B, A]) -> [B, A]`, and remembers what it was asked."""

    def __init__(self, env_id: str, function: Function, timing: Timing | None = None) -> None:
        env = make_env(env_id)
        observation, action = env_boxes(env)
        env.close()
        self.spec = PolicySpec("hand-written", "none", env_id, observation, action, steps=1, particles=1)
        self.calls: list[int] = []
        self.deterministic: list[bool] = []
        self._function, self._timing = function, timing or Timing()

    def act(
        self,
        obs: ArrayLike,
        *,
        seed: Seed = None,
        noise: NDArray[np.float32] | None = None,
        deterministic: bool = False,
    ) -> ActResult:
        rows = act_rows(self.spec, obs, seed=seed, noise=noise, deterministic=deterministic)
        noise_BA = rows.drawn_noise(self.spec)[:, 0, 0]
        self.calls.append(len(rows.obs_BO))
        self.deterministic.append(deterministic)
        action = np.clip(self._function(rows.obs_BO, noise_BA), self.spec.action_low, self.spec.action_high)
        return rows.result(action.astype(np.float32), None, version="0", timing=self._timing)


def constant(env_id: str, value: float) -> FunctionPolicy:
    return FunctionPolicy(env_id, lambda obs, noise: np.full_like(noise, value))


def balancer(noise_scale: float = 0.0) -> FunctionPolicy:
    """Keeps InvertedPendulum-v5 up for all of its 1000 steps."""

    def act(obs_BO: NDArray[np.float32], noise_BA: NDArray[np.float32]) -> NDArray[Any]:
        # Not a matrix product: BLAS sums in another order for another number of rows.
        force_B1: NDArray[np.float32] = np.asarray((obs_BO * BALANCING_GAINS).sum(axis=1, keepdims=True))
        return np.asarray(force_B1 + noise_scale * noise_BA)

    return FunctionPolicy("InvertedPendulum-v5", act)
