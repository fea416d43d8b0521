"""Environments that can be known, crash or forget; registered as tests.rsm_train.training_envs:Rsm...-v0."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

MODULE = __name__


class CountingEnv(gym.Env[Any, Any]):
    """Observation [seed % 8, time]; terminal after 2 + seed % 3 steps; reward is the first action."""

    seeds: tuple[int | None, ...] = ()
    """Of every reset since a test cleared it, of all such environments in this process."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 4.0], np.float32))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        CountingEnv.seeds += (seed,)
        self.first_seed, self.time = seed or 0, 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.time += 1
        return self._obs(), float(action[0]), self.time >= 2 + self.first_seed % 3, False, {}

    def _obs(self) -> Any:
        return np.array([self.first_seed % 8, self.time], dtype=np.float64)


class OddBounds(CountingEnv):
    """Bounds of which hardly any survives (high + low) / 2 + (high - low) / 2 exactly."""

    def __init__(self) -> None:
        super().__init__()
        low, high = np.sort(np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32), axis=0)
        self.action_space = spaces.Box(low, high)


class LongEnv(CountingEnv):
    """Remembers its actions in its observation, has noise of its own, and ends at a limit of 7 steps only."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.total = 0.0
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.time += 1
        self.total += float(action[0]) + self._noise()
        return self._obs(), self.total, False, False, {}

    def _noise(self) -> float:
        return float(self.np_random.normal())

    def _obs(self) -> Any:
        return np.array([self.total, self.time])


class ForgetfulEnv(LongEnv):
    """Its noise is not a function of its seed."""

    def _noise(self) -> float:
        return random.SystemRandom().random()


class SteadyEnv(LongEnv):
    """A reward of 7 in each step, whatever is done, for ever: with gamma 0.5 every value is 14."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, *rest = super().step(action)
        return obs, 7.0, *rest


class FailingEnv(LongEnv):
    """Fails in the 33rd step of its process, as the environment variable RSM_FAIL says; well without it."""

    steps = 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        FailingEnv.steps += 1
        how = os.environ.get("RSM_FAIL") if FailingEnv.steps == 33 else None
        if how == "raise":
            raise ValueError("the motor\nis on fire.")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        obs, reward, *rest = super().step(action)
        return obs, float("nan") if how == "nan" else reward, *rest


for _name, _kind, _limit in (
    ("Counting", CountingEnv, 3),
    ("Odd", OddBounds, None),
    ("Long", LongEnv, 7),
    ("Steady", SteadyEnv, 7),
    ("Forgetful", ForgetfulEnv, 7),
    ("Failing", FailingEnv, 7),
):
    gym.register(f"Rsm{_name}-v0", f"{__name__}:{_kind.__name__}", max_episode_steps=_limit)
