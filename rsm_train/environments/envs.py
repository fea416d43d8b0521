"""Vector environments for learning: actions in [-1, 1], true final observations, correct termination."""

from __future__ import annotations

import contextlib
import multiprocessing
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

from rsm_common.errors import EnvFaultError, RsmError, UnsupportedEnvError
from rsm_eval.checked_env import describe_exception
from rsm_train.algorithms.common import Batch
from rsm_train.config import VectorName
from rsm_train.environments.episodes import RESTORED, EnvSource, OpenEpisode, make_episodes


class VectorEnv(Protocol):
    """The used part of a vector environment. The next episode begins in the step that ends the one before."""

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
        source: EnvSource | str,
        count: int,
        seed: int,
        *,
        vector: VectorName = "sync",
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Create and reset the environments, or put them where they were when `state()` was taken.

        Args:
            source: the environment; text is an id without arguments.
            count: environments.
            seed: of the run.
            vector: how they are stepped.
            state: what `state()` was, checked by `check_state`.

        Raises:
            UnsupportedEnvError: see `rsm_eval.envs.make_env`; or envpool does not have the environment.
            MissingExtraError: envpool is not installed.
            EnvFaultError: an environment fails in its first reset.
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
        self.ended = torch.zeros(count, dtype=torch.bool)
        """Whether the episode of each environment ended with the last step, [count]."""
        self._failed = False
        self._env_id = source if isinstance(source, str) else source.env_id
        self._envs = _make_vector(
            vector, EnvSource(source) if isinstance(source, str) else source, seed, opened
        )
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
        """The tensors that the environments are restored from."""
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
            EnvFaultError: an environment fails, or returns what float32 cannot hold as a finite number.
        """
        # Rounding may carry an action over its bounds, as in ActionScale.to_env.
        env_action = np.clip(self._center + self._half_range * action_BA.numpy(), *self.action_bounds)
        env_action = env_action.astype(self._action_dtype)
        with self._described():
            obs, reward, terminated, truncated, info = self._envs.step(env_action)
        next_obs = _to_float32(obs)
        done: NDArray[np.bool_] = terminated | truncated
        for index in np.flatnonzero(done):
            next_obs[index] = _to_float32(info["final_obs"][index])
        self._require_finite("observation", next_obs)
        self._require_finite("reward", stored_reward := _to_float32(reward))
        batch = Batch(
            obs=self.obs,
            action=action_BA,
            reward=torch.from_numpy(stored_reward),
            next_obs=torch.from_numpy(next_obs),
            terminated=torch.from_numpy(terminated.astype(np.float32)),
        )
        self._take(obs)
        self.ended = torch.from_numpy(done.astype(bool))
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
        self._obs = _to_float32(observation)
        self._require_finite("observation", self._obs)
        self._raw_obs = observation

    def _require_finite(self, what: str, values: NDArray[np.float32]) -> None:
        """Check [N] or [N, O] float32, the form in which they are stored."""
        if not np.isfinite(values).all():
            index, *element = (int(place) for place in np.argwhere(~np.isfinite(values))[0])
            where = f" in element {element[0]}" if element else ""
            raise EnvFaultError(
                f"environment {index} ({self._env_id}): wanted a finite float32 {what}, got "
                f"{values[(index, *element)]}{where}; correct the environment"
            )

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
        """Turn the death of a worker into one sentence; other errors are described where they happen."""
        try:
            with _quiet_workers():
                yield
        except (EOFError, ConnectionError):
            self._failed = True
            raise EnvFaultError(
                f"{_who_died(self._envs)} of {self._env_id} died without an error; look for a crash in native "
                "code or a lack of memory and correct it"
            ) from None
        except BaseException:
            self._failed = True
            raise


@contextlib.contextmanager
def _quiet_workers() -> Iterator[None]:
    """Keep Gymnasium from printing a worker's traceback beside the error that it raises here."""
    level = gym.logger.min_level
    gym.logger.min_level = 50
    try:
        yield
    finally:
        gym.logger.min_level = level


def _make_vector(
    vector: VectorName, source: EnvSource, seed: int, opened: Sequence[OpenEpisode | None]
) -> VectorEnv:
    if vector == "envpool":
        from rsm_train.environments.envpool_backend import EnvPoolVector

        return EnvPoolVector(source, seed, [None if one is None else one.episode for one in opened])
    makers = [partial(make_episodes, source, seed, index, one, os.getpid()) for index, one in enumerate(opened)]
    kind: Any = AsyncVectorEnv if vector == "async" else SyncVectorEnv
    others = set(multiprocessing.active_children())
    try:
        with _quiet_workers():
            made: VectorEnv = kind(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    except BaseException as error:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
            worker.join()
        if isinstance(error, RsmError) or not isinstance(error, Exception):
            raise
        raise UnsupportedEnvError(
            f"wanted {len(opened)} environments {source.env_id} with the same spaces, got "
            f"{describe_exception(error)}; correct the environment"
        ) from error
    return made


def _kill_workers(envs: Any) -> None:
    processes = [] if getattr(envs, "closed", True) else getattr(envs, "processes", [])
    for process in processes:
        process.kill()
        process.join()
        envs.closed = True


def _to_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """A copy; what is too large becomes Inf, which is then refused."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _who_died(envs: Any) -> str:
    for index, process in enumerate(getattr(envs, "processes", ())):
        process.join(timeout=1.0)
        if process.exitcode is not None:
            return f"the worker of environment {index} (exit status {process.exitcode})"
    return "an environment worker"
