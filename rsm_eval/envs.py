"""Environments: create one by its id, check its spaces, keep several for the next rollout."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rsm_common.errors import UnsupportedEnvError
from rsm_common.spec import BoxSpec
from rsm_eval.checked_env import FLOAT32_MAX, CheckedEnv, describe_exception
from rsm_eval.env_ids import factory_name, look_in_working_directory

BoxEnv: TypeAlias = gym.Env[NDArray[Any], NDArray[Any]]
"""An environment whose observations and actions are flat boxes of real numbers."""


EnvArgs: TypeAlias = Mapping[str, Any]
"""Keyword arguments of an environment's constructor: numbers, text, booleans or None."""


Factory: TypeAlias = Callable[[], BoxEnv]
"""A function without arguments that makes another environment at every call."""


def make_env(
    env_id: str,
    env_args: EnvArgs | None = None,
    *,
    name: str | None = None,
    render_mode: str | None = None,
    factory: Factory | None = None,
) -> BoxEnv:
    """Create an environment and check that it is one a diffusion policy can act in.

    Args:
        env_id: a registered Gymnasium id such as "HalfCheetah-v5", or "module:EnvId", which imports the
            module first so that it can register its environments. The module may be in the working directory.
        env_args: keyword arguments of the environment's constructor.
        name: what errors call the environment; by default "environment ENV_ID".
        render_mode: as in `gymnasium.make`.
        factory: what makes the environment, whose id is then `rsm_eval.env_ids.factory_env_id`.

    Returns:
        The environment with its registered time limit, inside a `CheckedEnv`.

    Raises:
        UnsupportedEnvError: the id is unknown, the environment cannot be created, or an observation or action
            is not a flat box of real numbers, or an action has no finite bounds.
    """
    _import_mujoco(rendering=render_mode is not None)
    env = _registered(env_id, env_args, render_mode) if factory is None else _of_factory(env_id, factory)
    try:
        _check_spaces(env_id, env)
    except UnsupportedEnvError:
        env.close()
        raise
    return CheckedEnv(env, name or f"environment {env_id}")


def _registered(env_id: str, env_args: EnvArgs | None, render_mode: str | None) -> BoxEnv:
    made_by = factory_name(env_id)
    if made_by is not None:
        raise UnsupportedEnvError(
            f"wanted a Gymnasium environment id such as HalfCheetah-v5 or module:EnvId, got the environment "
            f"that the Python function {made_by} makes; register it, and name its id with --env"
        )
    look_in_working_directory(env_id)
    # An environment that cannot be rendered need not know the word.
    rendering: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
    try:
        # The passive checker costs as much as a small MuJoCo step and repeats what is checked here.
        made: BoxEnv = gym.make(env_id, disable_env_checker=True, **rendering, **(env_args or {}))
    except (Exception, SystemExit) as error:
        raise _not_created(env_id, env_args, error) from error
    return made


def _of_factory(env_id: str, factory: Factory) -> BoxEnv:
    try:
        env: Any = factory()
    except UnsupportedEnvError:
        raise
    except (Exception, SystemExit) as error:
        raise UnsupportedEnvError(
            f"wanted to create an environment with {factory_name(env_id)}(), got {describe_exception(error)}; "
            "correct this function"
        ) from error
    if isinstance(env, gym.Env):
        return env
    shown = " ".join(f"{env!r:.60}".split())
    raise UnsupportedEnvError(
        f"wanted {factory_name(env_id)}() to return a gymnasium.Env, got {shown}; correct this function"
    )


def running_statistics(env: BoxEnv) -> list[str]:
    """Names of the wrappers of an environment that change their transformation while they run.

    Two instances of such an environment differ: what was learnt in one is evaluated in another.
    """
    names = []
    layer: Any = env
    while isinstance(layer, gym.Wrapper):
        own = vars(layer)
        function = own.get("func")
        stateful = function is not None and not inspect.isroutine(function)
        if stateful or inspect.ismethod(function) or {"obs_rms", "return_rms"} & set(own):
            names.append(type(layer).__name__)
        layer = layer.env
    return names


def statistics_warning(env_id: str, env: BoxEnv) -> str | None:
    """One sentence about wrappers with running statistics; None if there are none."""
    names = running_statistics(env)
    if not names:
        return None
    return (
        f"warning: {env_id} has {' and '.join(names)}, which keeps running statistics of its own, so training, "
        "evaluation and use are different environments; take it out of the environment, and for observations "
        "train with rsm-train --normalize-observation instead"
    )


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
    """The seed that an environment is reset with: the lower 32 bits of an episode seed.

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
    """Environments of one kind, created when first needed and kept for the next rollout.

    Periodic evaluation creates its environments once this way. Close it, or use it as a context manager.
    """

    def __init__(self, env_id: str, env_args: EnvArgs | None = None, *, factory: Factory | None = None) -> None:
        """Create the first environment; for the arguments see `make_env`.

        Raises:
            UnsupportedEnvError: see `make_env`.
        """
        self.env_id = env_id
        self.env_args = env_args
        self._factory = factory
        self._envs = [self._make()]

    def take(self, count: int) -> list[BoxEnv]:
        """The first `count` environments, in the state their last user left them in: reset them.

        A pool serves one rollout at a time.
        """
        while len(self._envs) < count:
            self._envs.append(self._make())
        return self._envs[:count]

    def _make(self) -> BoxEnv:
        return make_env(self.env_id, self.env_args, factory=self._factory)

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


def _not_created(env_id: str, env_args: EnvArgs | None, error: BaseException) -> UnsupportedEnvError:
    """The sentence for an environment that could not be made."""
    if isinstance(error, gym.error.Error | ModuleNotFoundError):
        reason = str(error).strip().split("\n")[0].rstrip(".")
        return UnsupportedEnvError(
            f"wanted a Gymnasium environment id such as HalfCheetah-v5 or module:EnvId, got {env_id!r}: "
            f"{reason}; check the spelling and that its package is installed"
        )
    given = "".join(f" --env-arg {name}={value}" for name, value in (env_args or {}).items())
    advice = "correct the environment"
    if isinstance(error, TypeError) and "argument" in str(error):
        advice += ", or the arguments of its constructor with --env-arg NAME=VALUE"
    elif env_args:
        advice += " or its arguments"
    return UnsupportedEnvError(
        f"wanted to create environment {env_id}{given}, got {describe_exception(error)}; {advice}"
    )


@functools.cache
def _import_mujoco(*, rendering: bool) -> None:
    """Import MuJoCo, if it is installed, so that each of its warnings is printed once on stderr.

    By itself MuJoCo writes warnings to MUJOCO_LOG.TXT in the working directory. MuJoCo 4 warns of a deprecated
    attribute in several of Gymnasium's models, for every environment made.

    MuJoCo loads the OpenGL library that MUJOCO_GL names when it is imported. Without rendering, a library
    that is missing does not matter: MuJoCo is then imported without one.
    """
    try:
        mujoco = _mujoco()
    except (Exception, SystemExit):
        if rendering or "MUJOCO_GL" not in os.environ:
            return
        mujoco = _mujoco_without_gl()
    if hasattr(mujoco, "set_mju_user_warning") and mujoco.get_mju_user_warning() is None:

        @functools.lru_cache(maxsize=100)
        def tell(message: str) -> None:
            print(f"MuJoCo: {message}", file=sys.stderr)

        mujoco.set_mju_user_warning(tell)


def _mujoco() -> Any:
    """The module; None if it is not installed."""
    return importlib.import_module("mujoco") if importlib.util.find_spec("mujoco") else None


def _mujoco_without_gl() -> Any:
    """Import MuJoCo as if MUJOCO_GL were "disabled"; None if that fails as well."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("mujoco", "OpenGL")]:
        del sys.modules[name]  # a half of the import that failed
    wanted = os.environ["MUJOCO_GL"]
    os.environ["MUJOCO_GL"] = "disabled"
    try:
        return _mujoco()
    except (Exception, SystemExit):
        return None  # told where an environment needs it
    finally:
        os.environ["MUJOCO_GL"] = wanted


_BOUND_ACTIONS = (
    "give the action space finite bounds, or register the environment inside gymnasium.wrappers."
    "TransformAction(env, lambda action: action, Box(low, high))"
)


def _check_spaces(env_id: str, env: BoxEnv) -> None:
    observation, action = (getattr(env, f"{kind}_space", None) for kind in ("observation", "action"))
    if not _is_flat_box(observation):
        raise UnsupportedEnvError(
            f"wanted an environment with a flat Box observation space, but {env_id} has "
            f"{_describe(observation)}; {_flatten_observation(observation)}"
        )
    if not _is_flat_box(action):
        raise UnsupportedEnvError(
            f"wanted an environment with a flat Box action space, but {env_id} has {_describe(action)}; "
            f"{_flatten_action(action)}"
        )
    for what, box in (("observations", _box(observation)), ("actions", _box(action))):
        if box.dtype is None or box.dtype.kind not in ("fiub" if what == "observations" else "f"):
            raise UnsupportedEnvError(
                f"wanted an environment with real-valued {what}, but the {what} of {env_id} are {box.dtype}; "
                "choose an environment with a Box of dtype float32"
            )
    _check_bounds(env_id, _box(action))


def _check_bounds(env_id: str, action: spaces.Box) -> None:
    """Check action bounds as they are used: in float32."""
    with np.errstate(over="ignore"):
        low, high = action.low.astype(np.float32), action.high.astype(np.float32)
        span = high - low
    if not (np.isfinite(action.low).all() and np.isfinite(action.high).all()):
        raise UnsupportedEnvError(
            f"wanted an environment with finite action bounds, but {env_id} has {_describe(action)}; "
            f"{_BOUND_ACTIONS}"
        )
    if not np.isfinite(span).all():
        index = int(np.flatnonzero(~np.isfinite(span))[0])
        raise UnsupportedEnvError(
            f"wanted action bounds whose difference is a finite float32 number, but action {index} of {env_id} "
            f"goes from {action.low[index]:g} to {action.high[index]:g}; {_BOUND_ACTIONS}"
        )
    if not (span > 0).all():
        raise UnsupportedEnvError(
            f"wanted an environment whose lower action bounds are below the upper ones in float32, "
            f"but {env_id} has {_describe(action)}; correct its action space"
        )


def _is_flat_box(space: Any) -> bool:
    return isinstance(space, spaces.Box) and len(space.shape) == 1 and space.shape[0] >= 1


def _flatten_observation(space: Any) -> str:
    """Advice about an observation space that Gymnasium can carry out."""
    if isinstance(space, spaces.Space) and space.is_np_flattenable:
        return "register it inside gymnasium.wrappers.FlattenObservation, or choose another environment"
    return "choose another environment"


def _flatten_action(space: Any) -> str:
    """The same for an action space."""
    flat = spaces.flatten_space(space) if isinstance(space, spaces.Space) and space.is_np_flattenable else None
    if isinstance(flat, spaces.Box) and flat.dtype is not None and flat.dtype.kind == "f" and flat.shape[0] > 0:
        return (
            "register it inside gymnasium.wrappers.TransformAction(env, lambda action: "
            "spaces.unflatten(env.action_space, action), spaces.flatten_space(env.action_space))"
        )
    return "a diffusion policy needs continuous actions, choose another environment"


def _box(space: Any) -> spaces.Box:
    assert isinstance(space, spaces.Box), "make_env lets only boxes through"
    return space


def _box_spec(prefix: str, box: spaces.Box) -> BoxSpec:
    def bounds(values: NDArray[Any]) -> tuple[float | None, ...]:
        # A bound that float32 cannot hold bounds nothing.
        return tuple(float(value) if abs(value) <= FLOAT32_MAX else None for value in values)

    names = tuple(f"{prefix}_{index}" for index in range(box.shape[0]))
    return BoxSpec(names=names, low=bounds(box.low), high=bounds(box.high))


def _describe(space: Any) -> str:
    return "none" if space is None else " ".join(str(space).split())
