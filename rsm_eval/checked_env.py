"""An environment whose every answer is checked: shapes, kinds and finite numbers, before anything is stored."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rsm_common.errors import EnvFaultError

FLOAT32_MAX = float(np.finfo(np.float32).max)
"""Policies, replay buffers and servers hold float32: a larger number would become Inf there."""


class CheckedEnv(gym.Wrapper[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]):
    """Checks what an environment answers to `reset` and `step`.

    An observation leaves as an array of the shape and dtype of its space. A reward leaves as a float: arrays
    with one element and at most one axis are taken. Two booleans and a dictionary follow.

    Raises:
        EnvFaultError: the environment raised an exception, or answered with anything else.
    """

    def __init__(self, env: gym.Env[Any, Any], name: str) -> None:
        """Wrap an environment; `name` begins each error, for example "environment 2 (Hopper-v5)"."""
        super().__init__(env)
        self._name = name
        space = env.observation_space
        assert isinstance(space, spaces.Box)
        self._shape, self._dtype = space.shape, space.dtype
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Begin an episode."""
        self._steps = 0
        try:
            answer = self.env.reset(seed=seed, options=options)
        except EnvFaultError:
            raise
        except (Exception, SystemExit) as error:
            raise self._failed("reset", error) from error
        obs, info = self._parts(answer, "an observation and a dictionary", 2)
        return self._observation(obs), self._info(info)

    def step(self, action: NDArray[Any]) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        """Take one step."""
        self._steps += 1
        try:
            answer = self.env.step(action)
        except EnvFaultError:
            raise
        except (Exception, SystemExit) as error:
            raise self._failed("step", error) from error
        obs, reward, terminated, truncated, info = self._parts(
            answer, "observation, reward, terminated, truncated and info", 5
        )
        return (
            self._observation(obs),
            self._reward(reward),
            self._boolean("terminated", terminated),
            self._boolean("truncated", truncated),
            self._info(info),
        )

    @property
    def _when(self) -> str:
        return f"in step {self._steps} of its episode" if self._steps else "in reset"

    def _failed(self, what: str, error: BaseException) -> EnvFaultError:
        return EnvFaultError(
            f"{self._name} failed in {what}: {describe_exception(error)}; correct the environment"
        )

    def _fault(self, wanted: str, got: str) -> EnvFaultError:
        return EnvFaultError(f"{self._name}: wanted {wanted} {self._when}, got {got}; correct the environment")

    def _parts(self, answer: Any, wanted: str, count: int) -> tuple[Any, ...]:
        if not isinstance(answer, tuple) or len(answer) != count:
            raise self._fault(wanted, _shown(answer))
        return answer

    def _observation(self, value: Any) -> NDArray[Any]:
        try:
            array = np.asarray(value)
        except (Exception, SystemExit):  # ragged lists, or an object's own conversion
            array = np.asarray(None)
        if array.shape != self._shape or not np.can_cast(array.dtype, self._dtype, "same_kind"):
            got = f"shape {list(array.shape)}, {array.dtype}" if array.dtype != object else _shown(value)
            raise self._fault(f"an observation of shape {list(self._shape)}, {self._dtype}", got)
        if array.dtype.kind == "f" and not float(np.abs(array).max()) <= FLOAT32_MAX:
            raise self._fault("an observation of finite float32 numbers", first_unusable(array))
        return array.astype(self._dtype, copy=False)

    def _reward(self, value: Any) -> float:
        if type(value) is not float:
            array = _scalar(value)
            if array is None or array.dtype.kind not in "fiub":
                raise self._fault("a number as reward", _shown(value))
            value = float(array)
        if not -FLOAT32_MAX <= value <= FLOAT32_MAX:
            raise self._fault("a reward that is a finite float32 number", f"{value:g}")
        return float(value)

    def _boolean(self, what: str, value: Any) -> bool:
        if value is True or value is False:
            return value
        array = _scalar(value)
        if array is None or array.dtype.kind not in "biu" or int(array) not in (0, 1):
            raise self._fault(f"True or False as {what}", _shown(value))
        return bool(array)

    def _info(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise self._fault("a dictionary as info", _shown(value))
        return dict(value)


def first_unusable(values: NDArray[Any]) -> str:
    """The first element of [O] that float32 cannot hold as a finite number: "nan in element 3"."""
    index = int(np.flatnonzero(~(np.abs(values) <= FLOAT32_MAX))[0])
    return f"{values[index]:g} in element {index}"


def describe_exception(error: BaseException) -> str:
    """The kind of an exception, the first line of its text, and the file and line that raised it."""
    words = str(error).strip().split("\n")[0].rstrip(".")
    reason = f"{type(error).__name__}: {words}" if words else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    return f"{reason} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else reason


def _scalar(value: Any) -> NDArray[Any] | None:
    """A number, or the only element of an array with at most one axis, as a 0-d array; else None."""
    try:
        array = np.asarray(value)
    except (Exception, SystemExit):
        return None
    return array.reshape(()) if array.size == 1 and array.ndim <= 1 else None


def _shown(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, np.ndarray) and value.size != 1:
        return f"an array of shape {list(value.shape)}, {value.dtype}"
    if isinstance(value, tuple | list | dict) and len(repr(value)) > 60:
        return f"a {type(value).__name__} with {len(value)} elements"
    return " ".join(f"{value!r:.60}".split())
