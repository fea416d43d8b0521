"""Episodes that can be begun and continued from numbers alone; imports no torch, as workers import this file.

The seed of an episode is a function of (run seed, environment, episode), and a state inside an episode is
its seed and the actions since: stepping them again restores any deterministic environment, at any moment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import TrainingError
from rsm_eval.envs import BoxEnv, make_env

RESTORED = "rsm_restored"
"""In the info of a first reset: whether the open episode could be restored."""


@dataclass(frozen=True)
class OpenEpisode:
    """An episode that a checkpoint interrupted."""

    episode: int
    """Which one of its environment, from 0."""
    actions: NDArray[Any]
    """[L, A] since its reset, exactly as the environment got them."""
    obs: NDArray[Any]
    """[O] that they led to."""


def episode_seed(run_seed: int, index: int, episode: int) -> int:
    """The seed of episode `episode` of environment `index`, a hash of all three.

    32 bits, as environments with a numpy RandomState take no more.
    """
    return int(np.random.SeedSequence(run_seed, spawn_key=(index, episode)).generate_state(1, np.uint32)[0])


class Episodes(gym.Wrapper[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]):
    """Resets with the seed of the next episode; the first reset continues an open one, if there is one.

    Whatever the environment raises becomes a TrainingError that says which environment, where and why.
    """

    def __init__(self, env: BoxEnv, run_seed: int, index: int, opened: OpenEpisode | None = None) -> None:
        super().__init__(env)
        self._run_seed, self._index, self._opened = run_seed, index, opened
        self._episode = 0 if opened is None else opened.episode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Begin the next episode."""
        assert seed is None, "the seeds are the wrapper's own"
        opened, self._opened = self._opened, None
        with self._described("reset"):
            obs, info = self._begin(options)
            if opened is None:
                return obs, info
            obs, over = self._repeat(obs, opened.actions)
            restored = not over and np.array_equal(np.asarray(obs, dtype=opened.obs.dtype), opened.obs)
            if not restored:
                obs, info = self._begin(options)
        return obs, {**info, RESTORED: restored}

    def step(self, action: NDArray[Any]) -> tuple[NDArray[Any], Any, bool, bool, dict[str, Any]]:
        """One step of the environment."""
        with self._described("step"):
            return self.env.step(action)

    def _begin(self, options: dict[str, Any] | None) -> tuple[NDArray[Any], dict[str, Any]]:
        seed = episode_seed(self._run_seed, self._index, self._episode)
        self._episode += 1
        return self.env.reset(seed=seed, options=options)

    def _repeat(self, obs: NDArray[Any], actions: NDArray[Any]) -> tuple[NDArray[Any], bool]:
        for action in actions:
            obs, _, terminated, truncated, _ = self.env.step(action)
            if terminated or truncated:
                return obs, True
        return obs, False

    @contextlib.contextmanager
    def _described(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            words = str(error).strip().split("\n")[0].rstrip(".")
            reason = f"{type(error).__name__}: {words}" if words else type(error).__name__
            raise TrainingError(
                f"environment {self._index} failed in {what}: {reason} "
                f"({Path(frame.filename).name}, line {frame.lineno}); the last checkpoint is intact, correct "
                "the environment and go on with --resume"
            ) from error


def make_episodes(
    env_id: str, run_seed: int, index: int, opened: OpenEpisode | None, trainer_pid: int
) -> Episodes:
    """The environment with its wrapper, in the trainer's process or in a worker's.

    A worker ignores SIGINT, SIGTERM and SIGHUP, which may reach the whole process group: the trainer takes
    its last step and then ends the workers.
    """
    if os.getpid() != trainer_pid:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    return Episodes(make_env(env_id), run_seed, index, opened)
