"""What a policy states of itself: the content of policy.json.

Shape legend: O observation size, A action size, T denoising steps, N particles.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import BundleError, UnsupportedEnvError

SCHEMA_VERSION = 3
"""Version of the policy.json layout. 2 added `sampling`, `accuracy` and `tolerance`; 3 added `env_args` and the
sampler "gaussian". A file has the lowest version that holds its content, so that older toolkits can read it."""
READABLE_SCHEMA_VERSIONS = (1, 2, 3)

DEFAULT_TOLERANCE = 1e-4
"""Of a float32 graph: leaves room for another CPU's order of summation, far below what an action means to an
environment."""

MAX_NOISE_SIZE = 2**24
"""Most numbers of one row's noise, T N A (64 MiB). A file must not be able to exhaust the memory."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class BoxSpec:
    """A flat box: `names`, `low` and `high` all have one entry per element.

    A bound is None where the box is unbounded on that side (JSON has no infinity).

    Raises:
        BundleError: counts that differ, names that are not text, or bounds that are not finite numbers.
    """

    names: tuple[str, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.low) == len(self.high) >= 1:
            raise BundleError(
                "a box needs equally many names, low and high bounds, at least one; "
                f"got {len(self.names)}, {len(self.low)} and {len(self.high)}"
            )
        for bound in (*self.low, *self.high):
            if bound is not None and not (isinstance(bound, int | float) and abs(bound) <= _FLOAT32_MAX):
                raise BundleError(f"a box needs finite float32 numbers or None as bounds, got {bound!r:.60}")
        for name in self.names:
            if not isinstance(name, str):
                raise BundleError(f"a box needs text as names, got {name!r:.60}")

    @functools.cached_property
    def size(self) -> int:
        """Number of elements."""
        return len(self.names)


@dataclass(frozen=True)
class PolicySpec:
    """All that a caller must know about a policy; the content of policy.json."""

    name: str
    algorithm: str
    env_id: str
    observation: BoxSpec
    action: BoxSpec
    steps: int
    """T, denoising steps; T >= 1."""
    particles: int
    """N, particles of which the critics choose the best; N >= 1."""
    control_dt_s: float | None = None
    """Seconds between two actions in the environment; None if the environment does not say."""
    sampler: str = "ddpm"
    precision: str = "fp32"
    has_q: bool = True
    """Whether the policy returns the critic's value of the chosen particle."""
    version: str = "0"
    """A positive number for a bundle; "0" for a policy that was never exported."""
    sampling: Mapping[str, Any] | None = None
    """How the chain denoises: "schedule", "train_steps", "timesteps" (of the schedule, in the order they are
    taken), "eta", "prior_std"; None where it is not recorded."""
    tolerance: float = DEFAULT_TOLERANCE
    """How far two runtimes may be apart, as a fraction of the action range; for reduced precision more."""
    accuracy: Mapping[str, Any] | None = None
    """Of an exported graph against the policy it was made from: "rows", "max_error" and "mean_error" as
    fractions of the action range, "other_particle_rate"; None for a policy that was never exported."""
    evaluation: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    env_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the environment's constructor: numbers, text, booleans or None."""

    def __post_init__(self) -> None:
        for key in ("name", "algorithm", "env_id", "sampler", "precision", "version"):
            if not isinstance(getattr(self, key), str):
                raise BundleError(f"a policy needs text as {key}, got {getattr(self, key)!r:.60}")
        if not all(type(count) is int and count >= 1 for count in (self.steps, self.particles)):
            raise BundleError(
                f"a policy needs whole numbers steps >= 1 and particles >= 1, "
                f"got {self.steps!r:.60} and {self.particles!r:.60}"
            )
        if math.prod(self.noise_shape) > MAX_NOISE_SIZE:
            raise BundleError(
                f"a policy needs at most {MAX_NOISE_SIZE} random numbers per action, got "
                f"{' x '.join(map(str, self.noise_shape))} (steps, particles, action elements)"
            )
        self._check_types()
        if not isinstance(self.tolerance, int | float) or not 0 < self.tolerance < 1:
            raise BundleError(f"a policy needs a tolerance between 0 and 1, got {self.tolerance!r:.60}")
        for low, high in zip(self.action.low, self.action.high, strict=True):
            if low is None or high is None or not low < high:
                raise BundleError(
                    f"every action needs a finite low and high bound, low < high, got {low} and {high}"
                )
            if high - low > _FLOAT32_MAX:
                raise BundleError(
                    f"every action needs bounds whose difference fits into float32, got {low} and {high}"
                )

    def _check_types(self) -> None:
        if not isinstance(self.has_q, bool):
            raise BundleError(f"a policy needs true or false as has_q, got {self.has_q!r:.60}")
        dt = self.control_dt_s
        is_number = isinstance(dt, int | float) and not isinstance(dt, bool)
        if dt is not None and not (is_number and 0 < dt < math.inf):
            raise BundleError(
                f"a policy needs a number of seconds > 0, or none, as control_dt_s, got {dt!r:.60}"
            )
        for key in ("sampling", "accuracy", "evaluation", "provenance", "env_args"):
            value = getattr(self, key)
            if not isinstance(value, Mapping) and (value is not None or key in ("provenance", "env_args")):
                raise BundleError(f"a policy needs named values as {key}, got {value!r:.60}")

    @functools.cached_property
    def noise_shape(self) -> tuple[int, int, int]:
        """(T, N, A): the shape of one row's noise."""
        return (self.steps, self.particles, self.action.size)

    @property
    def schema_version(self) -> int:
        """The version of policy.json that is written; see `SCHEMA_VERSION`."""
        return SCHEMA_VERSION if self.env_args or self.has_mean_action else 2

    @property
    def has_mean_action(self) -> bool:
        """True if zero noise gives the policy's mean action, which a deterministic request then gets."""
        return self.sampler == "gaussian"

    @property
    def action_low(self) -> NDArray[np.float32]:
        """Lower action bounds [A], environment units."""
        return np.asarray(self.action.low, dtype=np.float32)

    @property
    def action_high(self) -> NDArray[np.float32]:
        """Upper action bounds [A], environment units."""
        return np.asarray(self.action.high, dtype=np.float32)

    def to_json(self) -> str:
        """The content of policy.json."""
        data = dataclasses.asdict(self)
        data["noise_shape"] = list(self.noise_shape)
        data["schema_version"] = self.schema_version
        if not self.env_args:
            del data["env_args"]  # an older toolkit refuses fields that it does not know
        return json.dumps(data, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> PolicySpec:
        """Parse policy.json.

        Raises:
            BundleError: not JSON, another schema version, or a missing, unknown or ill-typed field.
        """
        try:
            data = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"policy.json is not JSON ({error}); export the policy again") from None
        found = data.get("schema_version") if isinstance(data, dict) else None
        # By type too: to Python, true and 1.0 are 1.
        if type(found) is not int or found not in READABLE_SCHEMA_VERSIONS:
            newer = type(found) is int and found > SCHEMA_VERSION
            raise BundleError(
                f"wanted policy.json of schema version {', '.join(map(str, READABLE_SCHEMA_VERSIONS[:-1]))} "
                f"or {READABLE_SCHEMA_VERSIONS[-1]}, "
                f"got {found!r:.60}; " + ("install a newer rsm-toolkit" if newer else "export the policy again")
            )
        del data["schema_version"]  # every field that an older version lacks has a default
        noise_shape = data.pop("noise_shape", None)
        try:
            for box in ("observation", "action"):
                data[box] = BoxSpec(**{key: _json_list(value) for key, value in data[box].items()})
            spec = cls(**data)
        except (TypeError, KeyError, AttributeError) as error:
            raise BundleError(f"policy.json is incomplete: {error}; export the policy again") from None
        if noise_shape != list(spec.noise_shape):
            raise BundleError(
                f"policy.json contradicts itself: noise_shape {noise_shape}, but T, N, A are "
                f"{list(spec.noise_shape)}; export the policy again"
            )
        return spec


def _refuse_constant(name: str) -> None:
    """NaN and infinities are not JSON, although Python reads them."""
    raise ValueError(f"{name} is not a number in JSON")


def _json_list(value: object) -> tuple[Any, ...]:
    """Raises TypeError for anything else; text, whose letters would pass for names, included."""
    if not isinstance(value, list):
        raise TypeError(f"wanted a list, got {value!r:.60}")
    return tuple(value)


def check_env(spec: PolicySpec, env: object) -> None:
    """Make sure that a policy and an environment belong together.

    Args:
        spec: of the policy.
        env: has `observation_space` and `action_space` as in Gymnasium (`single_...` of a vector
            environment are preferred); taken by its attributes, so Gymnasium need not be installed.

    Raises:
        UnsupportedEnvError: a space is not a flat box, or its size or the action bounds are not the policy's.
    """
    for kind, box in (("observation", spec.observation), ("action", spec.action)):
        space = _space_of(env, kind)
        shape = getattr(space, "shape", None)
        if shape is None or len(shape) != 1 or not hasattr(space, "low"):
            found = "none" if space is None else " ".join(str(space).split())
            raise UnsupportedEnvError(
                f"policy {spec.name!r} wanted an environment with a flat box as {kind} space, got {found}; "
                f"use {spec.env_id}"
            )
        if shape[0] != box.size:
            raise UnsupportedEnvError(
                f"policy {spec.name!r} wanted {box.size} {kind} elements, the environment has {shape[0]}; "
                f"use {_origin(spec)}, which the policy was made for"
            )
    space = _space_of(env, "action")
    low, high = (np.asarray(getattr(space, side), dtype=np.float64) for side in ("low", "high"))
    wanted_low, wanted_high = spec.action_low.astype(np.float64), spec.action_high.astype(np.float64)
    slack = 1e-6 * (wanted_high - wanted_low)
    inside = (np.abs(low - wanted_low) <= slack) & (np.abs(high - wanted_high) <= slack)
    if not inside.all():
        index = int(np.flatnonzero(~inside)[0])
        raise UnsupportedEnvError(
            f"policy {spec.name!r} wanted the action bounds {spec.action.low[index]} to "
            f"{spec.action.high[index]} of element {index}, the environment has {low[index]} to {high[index]}; "
            f"use {_origin(spec)}, which the policy was made for"
        )


def _space_of(env: object, kind: str) -> object:
    space = getattr(env, f"single_{kind}_space", None)
    return getattr(env, f"{kind}_space", None) if space is None else space


def _origin(spec: PolicySpec) -> str:
    """The environment of a policy with its arguments."""
    return spec.env_id + "".join(f" --env-arg {name}={value}" for name, value in spec.env_args.items())
