"""Environments of a Python function instead of an id: its name in a run, and checks of what it makes."""

from __future__ import annotations

import contextlib
import functools
import pickle
import weakref
from collections.abc import Callable
from typing import Any

from gymnasium.vector.utils import CloudpickleWrapper

from rsm_common.errors import ConfigError, UnsupportedEnvError
from rsm_eval.env_ids import factory_env_id, factory_name
from rsm_eval.envs import BoxEnv


class EnvFactory:
    """A function without arguments that makes environments, with a name; itself such a function."""

    def __init__(self, function: Callable[[], BoxEnv]) -> None:
        """Take a function, a class, or anything else that is called without arguments."""
        self._function = function
        self._made: list[weakref.ref[Any]] = []
        self.env_id = factory_env_id(_name_of(function))
        """What stands in a run for an environment id."""

    def __call__(self) -> BoxEnv:
        """Another environment.

        Raises:
            UnsupportedEnvError: it is one that the function has made before.
        """
        env = self._function()
        base = getattr(env, "unwrapped", env)
        if any(made() is base for made in self._made):
            raise UnsupportedEnvError(
                f"wanted another environment at every call of {factory_name(self.env_id)}(), got the same one "
                "again; create the environment inside this function"
            )
        self._made = [made for made in self._made if made() is not None]
        with contextlib.suppress(TypeError):  # no environment at all, which is refused where it is used
            self._made.append(weakref.ref(base))
        return env

    def __getstate__(self) -> dict[str, Any]:
        """For a worker, which makes environments of its own."""
        return vars(self) | {"_made": []}

    def check_pickle(self) -> None:
        """Check that a worker process can get the function, as Gymnasium sends it.

        Raises:
            ConfigError: it cannot.
        """
        try:
            pickle.dumps(CloudpickleWrapper(self))
        except Exception as error:  # what is pickled may raise anything
            raise ConfigError(
                f"wanted a function {factory_name(self.env_id)} that can be sent to another process for vector "
                f"async, got {type(error).__name__}: {error}; create in the function what it holds, or use "
                "vector sync"
            ) from error


def _name_of(function: Any) -> str:
    """ "module:function", with the arguments that functools.partial gives it if they are short."""
    if isinstance(function, functools.partial):
        values = [*map(_shown, function.args), *(f"{k}={_shown(v)}" for k, v in function.keywords.items())]
        return f"{_name_of(function.func)}({', '.join(values)})"
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def _shown(value: Any) -> str:
    """A plain value; other values have texts that differ from process to process."""
    return repr(value) if value is None or isinstance(value, bool | int | float | str) else "..."
