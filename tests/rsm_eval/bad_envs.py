"""Environments with one fault each, registered as tests.rsm_eval.bad_envs:Rsm...-v0.

`RsmBad-v0` takes its fault as an argument. Its spaces are those of tests/rsm_eval/tiny_env.py, its actions
are rewarded by the first element, and its episodes end after 5 steps.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

MODULE = __name__
BAD = f"{MODULE}:RsmBad-v0"
GOOD_OBS = np.array([0.5, -0.5, 0.0, 1.0])

REWARDS: dict[str, Any] = {
    "reward none": None,
    "reward text": "much",
    "reward of two": np.array([1.0, 2.0]),
    "reward [[1]]": np.ones((1, 1)),
    "reward complex": 1j,
    "reward nan": float("nan"),
    "reward inf": np.float32("inf"),
    "reward 1e39": 1e39,
}
OBSERVATIONS: dict[str, Any] = {
    "obs short": GOOD_OBS[:3],
    "obs column": GOOD_OBS[:, None],
    "obs complex": GOOD_OBS + 1j,
    "obs text": np.array(["a", "b", "c", "d"]),
    "obs none": None,
    "obs ragged": [[1.0], [1.0, 2.0], 3.0, 4.0],
    "obs dict": {"a": 1},
    "obs nan": np.where([True, True, False, True], GOOD_OBS, np.nan),
    "obs 1e39": np.array([0.0, 1e39, 0.0, 0.0]),
}
FLAGS: dict[str, Any] = {
    "flag none": None,
    "flag text": "no",
    "flag 2": 2,
    "flag of two": np.array([True, False]),
}
ANSWERS: dict[str, Any] = {"answer of four": (GOOD_OBS, 1.0, False, {}), "answer none": None}
FAULTS = (*REWARDS, *OBSERVATIONS, *FLAGS, *ANSWERS, "info list", "raise", "exit")


class BadEnv(gym.Env[Any, Any]):
    """Right but for one fault, in step `at` of every episode; at 0 in reset.

    Args:
        fault: a key of the tables above; "" for none.
        at: step.
        instance: the fault is only in the instance of this number, counted from `BadEnv.created = 0`.
        obs_size: elements of an observation, from 4.
        action_high: upper bound of the second action.
    """

    created = 0

    def __init__(
        self,
        fault: str = "",
        at: int = 2,
        instance: int | None = None,
        obs_size: int = 4,
        action_high: float = 1.0,
    ) -> None:
        number, BadEnv.created = BadEnv.created, BadEnv.created + 1
        self.observation_space = spaces.Box(-np.inf, np.inf, (obs_size,), np.float64)
        self.action_space = spaces.Box(np.array([-3, -3], np.float32), np.array([1, action_high], np.float32))
        self._size = obs_size
        self._fault, self._at = fault if instance in (None, number) else "", at
        if self._fault.startswith("constructor"):
            self._construct()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        super().reset(seed=seed)
        self._time = 0
        self._raise()
        return self._obs(), [] if self._now("info list") else {}

    def step(self, action: Any) -> Any:
        self._time += 1
        self._raise()
        if self._time == self._at and self._fault in ANSWERS:
            return ANSWERS[self._fault]
        reward, flag = float(action[0]), self._time >= 5
        if self._time == self._at:
            reward, flag = REWARDS.get(self._fault, reward), FLAGS.get(self._fault, flag)
        return self._obs(), reward, flag, False, [] if self._now("info list") else {}

    def _now(self, fault: str) -> bool:
        return self._fault == fault and self._time == self._at

    def _obs(self) -> Any:
        good = np.resize(GOOD_OBS, self._size)
        return OBSERVATIONS.get(self._fault, good) if self._time == self._at else good

    def _raise(self) -> None:
        if self._now("raise"):
            raise ZeroDivisionError("the spring\nis broken.")
        if self._now("exit"):
            sys.exit("no licence")

    def _construct(self) -> None:
        if self._fault == "constructor file":
            Path("/no/such/model.xml").read_text()
        if self._fault == "constructor gl":
            raise AttributeError("'NoneType' object has no attribute 'glGetError'")
        if self._fault == "constructor import":
            from gymnasium import no_such_name  # type: ignore[attr-defined]  # noqa: F401
        if self._fault == "constructor exit":
            sys.exit(3)


class NeedsSize(BadEnv):
    def __init__(self, size: int) -> None:
        super().__init__()


class OddSpaces(gym.Env[Any, Any]):
    """Any spaces; every step is as good as another."""

    def __init__(self, observation: spaces.Space[Any], action: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation, action

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        return self.observation_space.sample(), 0.0, False, False, {}


class NoSpaces(gym.Env[Any, Any]):
    pass


class NotAnEnv:
    pass


BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)


def box(low: float, high: float, dtype: Any = np.float64) -> spaces.Box:
    return spaces.Box(low, high, (2,), dtype)


# Named spaces: (observation, action).
SPACES: dict[str, tuple[spaces.Space[Any], spaces.Space[Any]]] = {
    "DictObs": (spaces.Dict({"a": BOX, "b": spaces.Discrete(3)}), BOX),
    "TupleObs": (spaces.Tuple((BOX, BOX)), BOX),
    "DiscreteObs": (spaces.Discrete(3), BOX),
    "ImageObs": (spaces.Box(0, 255, (4, 4, 3), np.uint8), BOX),
    "SequenceObs": (spaces.Sequence(BOX), BOX),
    "TextObs": (spaces.Text(3), BOX),
    "DictAction": (BOX, spaces.Dict({"a": BOX})),
    "TupleAction": (BOX, spaces.Tuple((BOX, BOX))),
    "SquareAction": (BOX, spaces.Box(-1.0, 1.0, (2, 2), np.float32)),
    "DiscreteAction": (BOX, spaces.Discrete(2)),
    "MultiDiscreteAction": (BOX, spaces.MultiDiscrete([2, 3])),
    "MixedAction": (BOX, spaces.Tuple((BOX, spaces.Discrete(2)))),
    "TextAction": (BOX, spaces.Text(3)),
    "UnboundedAction": (BOX, box(-np.inf, np.inf)),
    "HalfBoundedAction": (BOX, box(0.0, np.inf)),
    "HugeAction": (BOX, box(-3e38, 3e38)),
    "TooHugeAction": (BOX, box(-1e39, 1e39)),
    "NarrowAction": (BOX, box(1.0, 1.0 + 1e-12)),
    "IntegerAction": (BOX, box(-2, 2, np.int64)),
}

for _name, _spaces in SPACES.items():
    gym.register(
        f"Rsm{_name}-v0", f"{MODULE}:OddSpaces", kwargs={"observation": _spaces[0], "action": _spaces[1]}
    )
for _name, _kind in (("Bad", BadEnv), ("NeedsSize", NeedsSize), ("NoSpaces", NoSpaces), ("NotAnEnv", NotAnEnv)):
    gym.register(f"Rsm{_name}-v0", f"{MODULE}:{_kind.__name__}")


def normalized(**kwargs: Any) -> gym.Env[Any, Any]:
    """With running statistics of observations and rewards."""
    return gym.wrappers.NormalizeReward(gym.wrappers.NormalizeObservation(BadEnv(**kwargs)))


gym.register("RsmNormalized-v0", normalized)
