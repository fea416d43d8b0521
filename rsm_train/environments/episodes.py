"""Episodes that can be begun and continued from numbers alone; imports no torch, as workers import this file.

The seed of an episode is a function of (run seed, environment, episode), and a state inside an episode is
its seed and the actions since: stepping them again restores any deterministic environment, at any moment.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rsm_common.errors import UnsupportedEnvError
from rsm_eval.envs import BoxEnv, EnvArgs, Factory, make_env


@dataclass(frozen=True)
class EnvSource:
    """An environment id with its arguments, or a function; see `rsm_eval.envs.make_env`."""

    env_id: str
    args: EnvArgs = field(default_factory=dict)
    factory: Factory | None = None


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

    The environment's info is dropped: nothing reads it, and not every info can be stacked or sent.
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
        obs = self._begin(options)
        if opened is None:
            return obs, {}
        obs, over = self._repeat(obs, opened.actions)
        restored = not over and np.array_equal(np.asarray(obs, dtype=opened.obs.dtype), opened.obs)
        return (obs if restored else self._begin(options)), {RESTORED: restored}

    def step(self, action: NDArray[Any]) -> tuple[NDArray[Any], Any, bool, bool, dict[str, Any]]:
        """One step of the environment."""
        obs, reward, terminated, truncated, _ = self.env.step(action)
        return obs, reward, terminated, truncated, {}

    def _begin(self, options: dict[str, Any] | None) -> NDArray[Any]:
        seed = episode_seed(self._run_seed, self._index, self._episode)
        self._episode += 1
        return self.env.reset(seed=seed, options=options)[0]

    def _repeat(self, obs: NDArray[Any], actions: NDArray[Any]) -> tuple[NDArray[Any], bool]:
        for action in actions:
            obs, _, terminated, truncated, _ = self.env.step(action)
            if terminated or truncated:
                return obs, True
        return obs, False


class _OtherSpace(spaces.Box):
    """The space of an environment that could not be created; comparing it with another raises the error."""

    def __init__(self, error: UnsupportedEnvError) -> None:
        super().__init__(0.0, 1.0, (1,), dtype=np.float32)
        self._error = error

    def __eq__(self, other: object) -> bool:
        raise self._error


class _NotCreated(gym.Env[NDArray[Any], NDArray[Any]]):
    """Stands for an environment that a worker could not create.

    An error in a worker's constructor would end the worker without a word. The first command to a worker
    compares spaces, and its errors reach the trainer.
    """

    def __init__(self, error: UnsupportedEnvError) -> None:
        self.observation_space = self.action_space = _OtherSpace(error)


def make_episodes(
    source: EnvSource, run_seed: int, index: int, opened: OpenEpisode | None, trainer_pid: int
) -> gym.Env[NDArray[Any], NDArray[Any]]:
    """The environment with its wrapper, in the trainer's process or in a worker's.

    A worker ignores SIGINT, SIGTERM and SIGHUP, which may reach the whole process group: the trainer takes
    its last step and then ends the workers.

    Raises:
        UnsupportedEnvError: see `rsm_eval.envs.make_env`; in a worker when it is first asked for something.
    """
    in_worker = os.getpid() != trainer_pid
    if in_worker:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    try:
        name = f"environment {index} ({source.env_id})"
        env = make_env(source.env_id, source.args, name=name, factory=source.factory)
    except UnsupportedEnvError as error:
        if not in_worker:
            raise
        return _NotCreated(UnsupportedEnvError(str(error)))  # without its cause, which may not be picklable
    return Episodes(env, run_seed, index, opened)
