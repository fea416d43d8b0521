"""Vector environments for learning: actions in [-1, 1], true final observations, correct termination."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray
from torch import Tensor

from rsm_common.errors import TrainingError
from rsm_train.algorithms.common import Batch
from rsm_train.config import VectorName
from rsm_train.environments.episodes import RESTORED, OpenEpisode, make_episodes


class VectorEnv(Protocol):
    """What is used of a vector environment; where an episode ends, its next one begins in the same step."""

    single_observation_space: spaces.Box
    single_action_space: spaces.Box

    def reset(self) -> tuple[NDArray[Any], dict[str, Any]]:
        """First observations [N, O]; info[RESTORED] says which open episodes were restored."""
        ...

    def step(
        self, actions: NDArray[Any], /
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One step of each; info["final_obs"] has the last observation where an episode ended."""
        ...

    def close(self) -> None:
        """End every environment."""
        ...


def check_state(state: Mapping[str, Tensor], count: int) -> None:
    """Check that `TrainingEnvs` can be restored from a state that was read from a file.

    Raises:
        ValueError: something is missing, or is not of so many environments.
    """
    per_env = ("obs", "episode", "running_return")
    for name in (*per_env, *(f"actions.{index}" for index in range(count))):
        if name not in state:
            raise ValueError(f"envs.{name} is missing")
        if name in per_env and state[name].shape[:1] != (count,):
            raise ValueError(f"envs.{name}: wanted {count} rows, got shape {list(state[name].shape)}")


class TrainingEnvs:
    """Environments stepped together; each resets when, and only when, its own episode ends."""

    def __init__(
        self,
        env_id: str,
        count: int,
        seed: int,
        *,
        vector: VectorName = "sync",
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Create and reset the environments, or put them where they were when `state()` was taken.

        Raises:
            UnsupportedEnvError: see `rsm_eval.envs.make_env`; or envpool does not have the environment.
            MissingExtraError: envpool is not installed.
            TrainingError: an environment fails.
        """
        self.count = count
        self._episode = np.zeros(count, dtype=np.int64)
        self._running_return = np.zeros(count)
        self._recorded = vector != "envpool"  # which restores no open episode
        self._actions: list[list[NDArray[Any]]] = [[] for _ in range(count)]
        opened: list[OpenEpisode | None] = [None] * count
        if state is not None:
            self._episode = state["episode"].numpy().copy()
            self._running_return = state["running_return"].numpy().copy()
            if self._recorded:
                self._actions = [list(state[f"actions.{i}"].numpy()) for i in range(count)]
            opened = [
                OpenEpisode(int(self._episode[i]), state[f"actions.{i}"].numpy(), state["obs"][i].numpy())
                for i in range(count)
            ]
        self._failed = False
        self._envs = _make_vector(vector, env_id, seed, opened)
        # Workers ignore SIGTERM, with which multiprocessing would end them.
        weakref.finalize(self, _kill_workers, self._envs)
        space = self._envs.single_action_space
        low, high = self.action_bounds = space.low.astype(np.float32), space.high.astype(np.float32)
        self._action_dtype = space.dtype
        self._center, self._half_range = (high + low) / 2, (high - low) / 2
        self.obs_size = self._envs.single_observation_space.shape[0]
        self.action_size = len(low)
        try:
            with self._described():
                observation, info = self._envs.reset()
            self._take(observation)
        except BaseException:
            self.close()
            raise
        self.restarted = self._restart(info[RESTORED]) if state is not None else []
        """Environments whose open episode could not be restored, and began anew."""

    @property
    def obs(self) -> Tensor:
        """The observations [count, O] that the next actions answer, float32."""
        return torch.from_numpy(self._obs)

    def state(self) -> dict[str, Tensor]:
        """What the environments are restored from."""
        empty = np.empty((0, self.action_size), dtype=self._action_dtype)
        actions = (np.stack(taken) if taken else empty for taken in self._actions)
        return {
            "obs": torch.from_numpy(self._raw_obs.copy()),
            "episode": torch.from_numpy(self._episode.copy()),
            "running_return": torch.from_numpy(self._running_return.copy()),
            **{f"actions.{i}": torch.from_numpy(taken) for i, taken in enumerate(actions)},
        }

    def step(self, action_BA: Tensor) -> tuple[Batch, list[float]]:
        """Apply actions [count, A] in [-1, 1].

        Returns:
            The transitions, whose next_obs is the final observation where an episode ended and not the
            first of the next episode; and the returns of the episodes that ended.

        Raises:
            TrainingError: an environment fails, or returns NaN or Inf.
        """
        # Rounding may carry an action over its bounds, as in ActionScale.to_env.
        env_action = np.clip(self._center + self._half_range * action_BA.numpy(), *self.action_bounds)
        env_action = env_action.astype(self._action_dtype)
        with self._described():
            obs, reward, terminated, truncated, info = self._envs.step(env_action)
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
        _require_finite(next_obs, reward)
        self._take(obs)
        self._running_return += reward
        returns = self._running_return[done].tolist()
        self._running_return[done] = 0.0
        self._record(env_action, done)
        return batch, returns

    def close(self) -> None:
        """Close every environment."""
        if self._failed:
            # A worker that crashed or was interrupted in a step does not answer a request to close.
            _kill_workers(self._envs)
        if not getattr(self._envs, "closed", False):
            self._envs.close()

    def _take(self, observation: NDArray[Any]) -> None:
        _require_finite(observation, np.zeros(1))
        self._raw_obs = observation
        self._obs = observation.astype(np.float32)

    def _record(self, env_action: NDArray[Any], done: NDArray[np.bool_]) -> None:
        for index, action in enumerate(env_action):
            if done[index]:
                self._actions[index].clear()
            elif self._recorded:
                self._actions[index].append(action)
        self._episode += done

    def _restart(self, restored: NDArray[np.bool_]) -> list[int]:
        failed = np.flatnonzero(~restored.astype(bool))
        for index in failed:
            self._actions[index].clear()
        self._running_return[failed] = 0.0
        self._episode[failed] += 1
        return [int(index) for index in failed]

    @contextlib.contextmanager
    def _described(self) -> Iterator[None]:
        """Turn the death of a worker into a TrainingError; other errors are described where they happen."""
        level = gym.logger.min_level
        if hasattr(self._envs, "processes"):
            gym.logger.min_level = 50  # or a worker's traceback is printed as well
        try:
            yield
        except (EOFError, ConnectionError):
            self._failed = True
            raise TrainingError(
                f"{_who_died(self._envs)} died without a word; the last checkpoint is intact, look for a crash "
                "in native code or a lack of memory and go on with --resume"
            ) from None
        except BaseException:
            self._failed = True
            raise
        finally:
            gym.logger.min_level = level


def _make_vector(vector: VectorName, env_id: str, seed: int, opened: Sequence[OpenEpisode | None]) -> VectorEnv:
    if vector == "envpool":
        from rsm_train.environments.envpool_backend import EnvPoolVector

        return EnvPoolVector(env_id, seed, [None if one is None else one.episode for one in opened])
    makers = [partial(make_episodes, env_id, seed, index, one, os.getpid()) for index, one in enumerate(opened)]
    kind: Any = AsyncVectorEnv if vector == "async" else SyncVectorEnv
    made: VectorEnv = kind(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    return made


def _kill_workers(envs: Any) -> None:
    processes = [] if getattr(envs, "closed", True) else getattr(envs, "processes", [])
    for process in processes:
        process.kill()
        process.join()
        envs.closed = True


def _require_finite(observation: NDArray[Any], reward: NDArray[Any]) -> None:
    for what, values in (("observation", observation), ("reward", reward)):
        if not np.isfinite(values).all():
            index = int(np.argwhere(~np.isfinite(values))[0][0])
            raise TrainingError(
                f"wanted finite observations and rewards, got NaN or Inf in the {what} of environment {index}; "
                "the last checkpoint is intact, correct the environment and go on with --resume"
            )


def _who_died(envs: Any) -> str:
    for index, process in enumerate(getattr(envs, "processes", ())):
        process.join(timeout=1.0)
        if process.exitcode is not None:
            return f"the worker of environment {index} (exit status {process.exitcode})"
    return "an environment worker"
