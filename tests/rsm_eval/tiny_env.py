"""An environment whose returns can be computed by hand, registered as tests.rsm_eval.tiny_env:RsmTiny-v0.

The reward of a step is the first action. The episode reaches its terminal state after 3 + seed % 4 steps
and the time limit is 5, so seeds 0, 1, 2 terminate (2 exactly at the limit) and seed 3 is truncated.
The spaces are those of the bundles in tests/bundles.py.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

ENV_ID = "tests.rsm_eval.tiny_env:RsmTiny-v0"
TIME_LIMIT = 5
RESETS: list[int | None] = []
"""The seed of every reset since a test cleared it."""


class TinyEnv(gym.Env[Any, Any]):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    dt = 0.1

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float64)
        self.action_space = spaces.Box(np.array([-3, -3], np.float32), np.array([1, 1], np.float32))
        self._over = True

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        RESETS.append(seed)
        self._length = 3 + (seed or 0) % 4
        self._start = self.np_random.uniform(-1, 1)
        self._time, self._over = 0, False
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert not self._over, "a finished episode was stepped again"
        assert self.action_space.contains(action), action
        self._time += 1
        self._over = self._time >= self._length
        return self._obs(), float(action[0]), self._over, False, {}

    def render(self) -> Any:
        frame = np.zeros((40, 40, 3), np.uint8)
        frame[:, : 8 * (self._time + 1)] = (200, 120, 40)
        return frame

    def _obs(self) -> Any:
        return np.array([self._start, self._time, 0.0, 1.0])


def expected_length(seed: int) -> int:
    return min(3 + seed % 4, TIME_LIMIT)


gym.register("RsmTiny-v0", f"{__name__}:TinyEnv", max_episode_steps=TIME_LIMIT)
gym.register("RsmNoLimit-v0", f"{__name__}:TinyEnv")
