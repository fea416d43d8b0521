"""Vector environments for learning: actions in [-1, 1], true final observations, correct termination."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsm_eval.envs import action_bounds, make_env
from rsm_train.algorithms.common import Batch


class TrainingEnvs:
    """Environments stepped together; each resets when, and only when, its own episode ends."""

    def __init__(self, env_id: str, count: int, seed: int) -> None:
        """Create and reset the environments; environment i is seeded with seed + i.

        Raises:
            UnsupportedEnvError: see `rsm_eval.envs.make_env`.
        """
        self._envs = gym.vector.SyncVectorEnv(
            [lambda: make_env(env_id)] * count, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP
        )
        self.count = count
        low, high = self.action_bounds = action_bounds(self._envs.envs[0])
        self._center, self._half_range = (high + low) / 2, (high - low) / 2
        self.obs_size = int(self._envs.single_observation_space.shape[0])  # type: ignore[index]
        self.action_size = len(low)
        observation, _ = self._envs.reset(seed=seed)
        self._obs = observation.astype(np.float32)
        self._running_return = np.zeros(count)

    @property
    def obs(self) -> Tensor:
        """The observations [count, O] that the next actions answer, float32."""
        return torch.from_numpy(self._obs)

    def step(self, action_BA: Tensor) -> tuple[Batch, list[float]]:
        """Apply actions [count, A] in [-1, 1].

        Returns:
            The transitions, whose next_obs is the final observation where an episode ended and not the
            first of the next episode; and the returns of the episodes that ended.
        """
        # Rounding may carry an action over its bounds, as in ActionScale.to_env.
        env_action = np.clip(self._center + self._half_range * action_BA.numpy(), *self.action_bounds)
        obs, reward, terminated, truncated, info = self._envs.step(
            env_action.astype(self._envs.action_space.dtype)
        )
        next_obs = obs.astype(np.float32)
        done: NDArray[np.bool_] = terminated | truncated
        for index in np.flatnonzero(done):
            next_obs[index] = info["final_obs"][index]
        batch = Batch(
            obs=self.obs,
            action=action_BA,
            reward=torch.from_numpy(reward.astype(np.float32)),
            next_obs=torch.from_numpy(next_obs),
            terminated=torch.from_numpy(terminated.astype(np.float32)),
        )
        self._obs = obs.astype(np.float32)
        self._running_return += reward
        returns = self._running_return[done].tolist()
        self._running_return[done] = 0.0
        return batch, returns

    def close(self) -> None:
        """Close every environment."""
        self._envs.close()
