"""Termination, truncation and auto-reset, on an environment whose every observation is known."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from rsm_train.envs import TrainingEnvs


class CountingEnv(gym.Env[Any, Any]):
    """Observation [seed, time]; terminal after 2 + seed % 3 steps; reward is the first action."""

    first_seed = 0

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 4.0], np.float32))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.first_seed = self.first_seed if seed is None else seed
        self.time = 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.time += 1
        return self._obs(), float(action[0]), self.time >= 2 + self.first_seed % 3, False, {}

    def _obs(self) -> Any:
        return np.array([self.first_seed, self.time], dtype=np.float64)


class OddBounds(CountingEnv):
    """Bounds of which hardly any survives (high + low) / 2 + (high - low) / 2 exactly."""

    def __init__(self) -> None:
        super().__init__()
        low, high = np.sort(np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32), axis=0)
        self.action_space = spaces.Box(low, high)


gym.register("RsmCounting-v0", f"{__name__}:CountingEnv", max_episode_steps=3)
ENV_ID = f"{__name__}:RsmCounting-v0"


def test_final_observations_terminations_and_resets():
    envs = TrainingEnvs(ENV_ID, 3, seed=0)  # lengths 2, 3 and 4, of which the limit of 3 cuts the last
    assert envs.obs.tolist() == [[0, 0], [1, 0], [2, 0]]
    times, terminations, returns = [], [], []
    for _ in range(4):
        before = envs.obs.clone()
        batch, ended = envs.step(torch.full((3, 2), 0.5))
        assert torch.equal(batch.obs, before)
        times.append(batch.next_obs[:, 1].tolist())
        terminations.append(batch.terminated.tolist())
        returns.append(ended)
    # next_obs is the final observation where an episode ended, and never the first of the next one.
    assert times == [[1, 1, 1], [2, 2, 2], [1, 3, 3], [2, 1, 1]]
    # A time limit is not a termination: environment 2 never terminates.
    assert terminations == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert returns == [[], [2.0], [3.0, 3.0], [2.0]]
    assert envs.obs[:, 1].tolist() == [0, 1, 1]
    envs.close()


def test_actions_are_scaled_to_the_bounds():
    envs = TrainingEnvs(ENV_ID, 2, seed=0)
    batch, _ = envs.step(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    assert batch.reward.tolist() == [-2.0, 2.0]
    assert batch.action.tolist() == [[-1.0, -1.0], [1.0, 1.0]], "the buffer holds normalised actions"
    envs.close()


def test_stored_observations_are_not_overwritten_by_later_steps():
    envs = TrainingEnvs(ENV_ID, 2, seed=0)
    first, _ = envs.step(torch.zeros(2, 2))
    copy = first.next_obs.clone()
    envs.step(torch.zeros(2, 2))
    assert torch.equal(first.next_obs, copy)
    envs.close()


def test_rounding_does_not_carry_actions_over_odd_bounds():
    gym.register("RsmOdd-v0", f"{__name__}:OddBounds")
    envs = TrainingEnvs("RsmOdd-v0", 1, seed=0)
    low, high = envs.action_bounds
    for sign, bound in ((-1.0, low), (1.0, high)):
        batch, _ = envs.step(torch.full((1, 300), sign))  # the environment asserts that it contains the action
        assert batch.reward.item() == pytest.approx(bound[0], abs=1e-6)
    envs.close()


def test_real_mujoco_bounds():
    envs = TrainingEnvs("InvertedPendulum-v5", 1, seed=0)
    low, high = envs.action_bounds
    assert (low.tolist(), high.tolist()) == ([-3.0], [3.0])
    assert (envs.obs_size, envs.action_size) == (4, 1)
    batch, _ = envs.step(torch.ones(1, 1))
    assert batch.reward.tolist() == [1.0]
    envs.close()
