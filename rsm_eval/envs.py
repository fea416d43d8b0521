"""Environments: create one by its id, check its spaces, keep several for the next rollout."""

from __future__ import annotations

import functools
import sys
from types import TracebackType
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rsm_common.errors import UnsupportedEnvError
from rsm_common.spec import BoxSpec

BoxEnv: TypeAlias = gym.Env[NDArray[Any], NDArray[Any]]
"""An environment whose observations and actions are flat boxes of real numbers."""


def make_env(env_id: str, *, render_mode: str | None = None) -> BoxEnv:
    """Create an environment and check that it is one a diffusion policy can act in.

    Args:
        env_id: a registered Gymnasium id such as "HalfCheetah-v5", or "module:EnvId", which imports the
            module first so that it can register its environments.
        render_mode: as in `gymnasium.make`.

    Returns:
        The environment with its registered time limit and no other additions.

    Raises:
        UnsupportedEnvError: the id is unknown, its module or simulator cannot be imported, or an
            observation or action is not a flat box of real numbers, or an action has no finite bounds.
    """
    _tame_mujoco()
    # An environment that cannot be rendered need not know the word.
    rendering: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
    try:
        # The passive checker costs as much as a small MuJoCo step and repeats what is checked here.
        env: BoxEnv = gym.make(env_id, disable_env_checker=True, **rendering)
    except (gym.error.Error, ImportError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UnsupportedEnvError(
            f"wanted a Gymnasium environment id such as HalfCheetah-v5 or module:EnvId, got {env_id!r}: "
            f"{reason}; check the spelling and that its package is installed"
        ) from None
    try:
        _check_spaces(env_id, env)
    except UnsupportedEnvError:
        env.close()
        raise
    return env


def action_bounds(env: BoxEnv) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Lower and upper action bounds, each [A] float32, environment units."""
    space = _box(env.action_space)
    return space.low.astype(np.float32), space.high.astype(np.float32)


def observation_size(env: BoxEnv) -> int:
    """O, the number of elements of an observation."""
    return int(_box(env.observation_space).shape[0])


def env_boxes(env: BoxEnv) -> tuple[BoxSpec, BoxSpec]:
    """The observation and the action box of an environment, as a policy's specification records them."""
    return _box_spec("obs", _box(env.observation_space)), _box_spec("action", _box(env.action_space))


def env_seed(episode_seed: int) -> int:
    """What an environment is reset with for an episode seed of 64 bits: its lower 32.

    Environments with a numpy RandomState take no more.
    """
    return episode_seed % 2**32


def control_dt_s(env: BoxEnv) -> float | None:
    """Seconds of simulated time between two actions; None if the environment does not say."""
    dt = getattr(env.unwrapped, "dt", None)
    return float(dt) if isinstance(dt, (int, float)) and dt > 0 else None


def time_limit(env: BoxEnv) -> int | None:
    """Steps after which the environment truncates an episode; None if it has no limit."""
    return env.spec.max_episode_steps if env.spec is not None else None


class EnvPool:
    """Environments of one id, created when first needed and kept for the next rollout.

    Periodic evaluation creates its environments once this way. Close it, or use it as a context manager.
    """

    def __init__(self, env_id: str) -> None:
        """Create the first environment.

        Raises:
            UnsupportedEnvError: see `make_env`.
        """
        self.env_id = env_id
        self._envs = [make_env(env_id)]

    def take(self, count: int) -> list[BoxEnv]:
        """The first `count` environments, in the state their last user left them in: reset them.

        A pool serves one rollout at a time.
        """
        while len(self._envs) < count:
            self._envs.append(make_env(self.env_id))
        return self._envs[:count]

    def close(self) -> None:
        """Close every environment; the pool may be used again and starts anew."""
        while self._envs:
            self._envs.pop().close()

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@functools.cache
def _tame_mujoco() -> None:
    """Make MuJoCo tell each warning once on stderr, and not in a MUJOCO_LOG.TXT wherever the process runs.

    MuJoCo 4 warns of a deprecated attribute in several of Gymnasium's models, for every environment made.
    """
    try:
        import mujoco
    except ImportError:
        return
    if hasattr(mujoco, "set_mju_user_warning") and mujoco.get_mju_user_warning() is None:

        @functools.lru_cache(maxsize=100)
        def tell(message: str) -> None:
            print(f"MuJoCo: {message}", file=sys.stderr)

        mujoco.set_mju_user_warning(tell)


def _check_spaces(env_id: str, env: BoxEnv) -> None:
    for what, space in (("observation", env.observation_space), ("action", env.action_space)):
        if not isinstance(space, spaces.Box) or len(space.shape) != 1 or space.shape[0] < 1:
            raise UnsupportedEnvError(
                f"wanted an environment with a flat Box {what} space, but {env_id} has {_describe(space)}; "
                "choose another environment or flatten the space with a Gymnasium wrapper"
            )
    action = _box(env.action_space)
    if action.dtype is None or action.dtype.kind != "f":
        raise UnsupportedEnvError(
            f"wanted an environment with real-valued actions, but the actions of {env_id} are {action.dtype}; "
            "a diffusion policy needs a continuous action space"
        )
    if not (np.isfinite(action.low).all() and np.isfinite(action.high).all()):
        raise UnsupportedEnvError(
            f"wanted an environment with finite action bounds, but {env_id} has {_describe(action)}; "
            "bound the actions with gymnasium.wrappers.RescaleAction or choose another environment"
        )
    if not (action.low < action.high).all():
        raise UnsupportedEnvError(
            f"wanted an environment whose lower action bounds are below the upper ones, "
            f"but {env_id} has {_describe(action)}; correct its action space"
        )


def _box(space: spaces.Space[Any]) -> spaces.Box:
    assert isinstance(space, spaces.Box), "make_env lets only boxes through"
    return space


def _box_spec(prefix: str, box: spaces.Box) -> BoxSpec:
    def bounds(values: NDArray[Any]) -> tuple[float | None, ...]:
        return tuple(float(value) if np.isfinite(value) else None for value in values)

    names = tuple(f"{prefix}_{index}" for index in range(box.shape[0]))
    return BoxSpec(names=names, low=bounds(box.low), high=bounds(box.high))


def _describe(space: spaces.Space[Any]) -> str:
    return " ".join(str(space).split())
