"""envpool (https://envpool.readthedocs.io) as a vector environment: one call steps all, on C++ threads."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rsm_common.errors import MissingExtraError, UnsupportedEnvError
from rsm_eval.checked_env import describe_exception
from rsm_eval.envs import action_bounds, make_env, observation_size
from rsm_train.environments.episodes import RESTORED, EnvSource, episode_seed


class EnvPoolVector:
    """Environments of envpool, reset in the step in which their episode ends.

    envpool seeds an environment once and not per episode, so an open episode cannot be restored: a resumed
    run begins new ones, with seeds that it has not used before.
    """

    def __init__(self, source: EnvSource, run_seed: int, opened: Sequence[int | None]) -> None:
        """Create the environments; `opened` is the open episode of each, or None in a new run.

        Raises:
            MissingExtraError: envpool is not installed.
            UnsupportedEnvError: envpool does not have the environment, or its environment of that name has
                other spaces than Gymnasium's.
        """
        env_id = source.env_id
        if source.factory is not None:
            raise UnsupportedEnvError(
                "wanted an environment id for vector envpool, got a function; use vector async"
            )
        try:
            envpool = importlib.import_module("envpool")
        except ImportError as error:
            raise MissingExtraError(
                f"rsm-train --vector envpool needs: pip install envpool ({error}); or use --vector async"
            ) from None
        if env_id not in envpool.list_all_envs():
            raise UnsupportedEnvError(
                f"wanted an environment that envpool has, got {env_id!r}; use --vector async, which takes any"
            )
        seeds = [
            episode_seed(run_seed, index, 0 if one is None else one + 1) % 2**31
            for index, one in enumerate(opened)
        ]
        try:
            self._envs: Any = envpool.make(
                env_id, env_type="gymnasium", num_envs=len(opened), seed=seeds, **source.args
            )
        except Exception as error:
            raise UnsupportedEnvError(
                f"wanted to create {env_id} of envpool, got {describe_exception(error)}; correct the arguments "
                "in --env-arg, or use --vector async"
            ) from None
        self._count = len(opened)
        self.single_observation_space: spaces.Box = self._envs.observation_space
        self.single_action_space: spaces.Box = self._envs.action_space
        self._check_same(source)

    def reset(self) -> tuple[NDArray[Any], dict[str, Any]]:
        """See `rsm_train.environments.envs.VectorEnv`."""
        obs, _ = self._envs.reset()
        return np.array(obs), {RESTORED: np.zeros(self._count, dtype=np.bool_)}

    def step(
        self, actions: NDArray[Any], /
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """See `rsm_train.environments.envs.VectorEnv`."""
        final_obs, reward, terminated, truncated, _ = self._envs.step(actions)
        obs = np.array(final_obs)
        over = np.flatnonzero(terminated | truncated)
        if len(over):
            obs[over], _ = self._envs.reset(over)
        return obs, reward.astype(np.float64), terminated, truncated, {"final_obs": final_obs}

    def close(self) -> None:
        """See `rsm_train.environments.envs.VectorEnv`."""
        self._envs.close()

    def _check_same(self, source: EnvSource) -> None:
        """The policy is evaluated, exported and used in Gymnasium's environment of the same name."""
        env = make_env(source.env_id, source.args)
        low, high = action_bounds(env)
        space, size = self.single_action_space, observation_size(env)
        env.close()
        same = (
            self.single_observation_space.shape == (size,)
            and np.array_equal(space.low.astype(np.float32), low)
            and np.array_equal(space.high.astype(np.float32), high)
        )
        if not same:
            raise UnsupportedEnvError(
                f"wanted {source.env_id} of envpool to have the spaces of Gymnasium's, got other ones; use "
                "--vector async"
            )
