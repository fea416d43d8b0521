"""One protocol for everything that acts.

A torch policy, an inference session, a remote client, a recorder: each is a `Policy`, and they compose
by wrapping. Shape legend: B rows, O observation size, A action size, T denoising steps, N particles.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsm_common.errors import InvalidRequestError
from rsm_common.seeds import DETERMINISTIC_SEED, draw_noise, resolve_seeds
from rsm_common.spec import PolicySpec

FLOAT32 = np.dtype(np.float32)

Seed = int | NDArray[np.uint64] | list[int] | None


STAGES = ("queue", "batch", "compute", "network", "total")
"""Stages of the time of an answer, in order. `network` is the part of `total` that the others do not explain:
the transport of a server, or the cost of the call itself for a policy in this process."""


@dataclass(frozen=True)
class Timing:
    """Where the time of one answer went, in microseconds."""

    queue_us: float = 0.0
    """From arrival to the batch being formed."""
    batch_us: float = 0.0
    """Stacking rows and drawing noise."""
    compute_us: float = 0.0
    """The network."""
    batch_rows: int = 1
    """Rows that were computed together."""
    total_us: float = 0.0
    """As the caller saw it, transport included."""


class Adjustment(enum.IntEnum):
    """What a server did to an action before it gave it out; as in policy.proto."""

    NONE = 0
    """Nothing: the policy's own action."""
    LIMITED = 1
    """Clipped towards the action before, because a step may be no larger."""
    HELD = 2
    """The policy failed: the client's last action again."""
    CENTERED = 3
    """The policy failed: the centre of the action bounds, or a step towards it."""


@dataclass(frozen=True)
class ActResult:
    """An answer; the leading B is absent if the observation came without it."""

    action: NDArray[np.float32]
    """[A] or [B, A], environment units, inside the action bounds."""
    q: NDArray[np.float32] | None
    """[] or [B], critic value of the chosen particle; None if the policy has no critic."""
    seed: NDArray[np.uint64] | None
    """[] or [B], replays the answer; None if the caller gave the noise itself."""
    version: str
    timing: Timing
    adjusted: NDArray[np.int32] | None = None
    """[] or [B], an `Adjustment` per row; None if every action is the policy's own."""


class Policy(Protocol):
    """Anything that turns observations into actions."""

    @property
    def spec(self) -> PolicySpec:
        """What the policy takes and gives."""
        ...

    def act(
        self,
        obs: ArrayLike,
        *,
        seed: Seed = None,
        noise: NDArray[np.float32] | None = None,
        deterministic: bool = False,
    ) -> ActResult:
        """Sample actions.

        Args:
            obs: [O] or [B, O], real numbers, finite, raw environment units.
            seed: one per row, or one for all (see `rsm_common.seeds.expand_seed`), or None to draw one.
            noise: [T, N, A] or [B, T, N, A] standard normal, instead of a seed.
            deterministic: use the documented constant seed for every row.

        Raises:
            InvalidRequestError: wrong type, shape, dtype or count, or NaN or Inf.
        """
        ...


@dataclass(frozen=True)
class ActRows:
    """A validated act call, always with a batch axis; with noise or seeds, unless a server is to draw them."""

    obs_BO: NDArray[np.float32]
    seeds_B: NDArray[np.uint64] | None
    noise_BTNA: NDArray[np.float32] | None
    single: bool
    """The caller sent [O] and expects [A]."""

    def drawn_noise(self, spec: PolicySpec) -> NDArray[np.float32]:
        """The noise [B, T, N, A]: as given, or drawn from the seeds."""
        if self.noise_BTNA is not None:
            return self.noise_BTNA
        assert self.seeds_B is not None
        noise_BTNA = draw_noise(self.seeds_B, spec.noise_shape)
        if spec.has_mean_action:
            noise_BTNA[self.seeds_B == DETERMINISTIC_SEED] = 0
        return noise_BTNA

    def result(
        self,
        action_BA: NDArray[np.float32],
        q_B: NDArray[np.float32] | None,
        *,
        version: str,
        timing: Timing,
        adjusted_B: NDArray[np.int32] | None = None,
    ) -> ActResult:
        """The answer in the shape the caller used."""
        if not self.single:
            return ActResult(action_BA, q_B, self.seeds_B, version, timing, adjusted_B)
        return ActResult(
            action=action_BA[0],
            q=None if q_B is None else np.asarray(q_B[0]),
            seed=None if self.seeds_B is None else np.asarray(self.seeds_B[0]),
            version=version,
            timing=timing,
            adjusted=None if adjusted_B is None else np.asarray(adjusted_B[0]),
        )


def act_rows(
    spec: PolicySpec,
    obs: ArrayLike,
    *,
    seed: Seed = None,
    noise: NDArray[np.float32] | None = None,
    deterministic: bool = False,
    draw: bool = True,
) -> ActRows:
    """Validate the arguments of `Policy.act` against a specification.

    Args:
        spec: of the policy.
        obs, seed, noise, deterministic: see `Policy.act`.
        draw: False leaves out the seeds where none is given: a server will draw them.

    Raises:
        InvalidRequestError: see `Policy.act`; no other error, whatever type an argument has.
    """
    obs_size = spec.observation.size
    array = _as_numbers("observation", obs)
    if not isinstance(deterministic, bool | np.bool_):
        raise InvalidRequestError(
            f"wanted deterministic as True or False, got {type(deterministic).__name__}; give a bool"
        )
    if array.ndim not in (1, 2) or array.shape[-1] != obs_size or array.size == 0:
        raise InvalidRequestError(
            f"wanted an observation of shape [{obs_size}] or [B, {obs_size}] for policy {spec.name!r}, "
            f"got {list(array.shape)}; check that policy and environment belong together"
        )
    single, rows = array.ndim == 1, array.size // obs_size
    if array.dtype == FLOAT32:
        obs_BO = np.ascontiguousarray(array.reshape(rows, obs_size))
    else:
        with np.errstate(over="ignore"):  # becomes Inf, which is refused below
            obs_BO = np.ascontiguousarray(array.reshape(rows, obs_size), dtype=np.float32)
    require_finite("observation", obs_BO)
    if noise is None:
        draws = draw or seed is not None
        seeds = resolve_seeds(seed, rows, deterministic=deterministic) if draws else None
        return ActRows(obs_BO, seeds, None, single)
    if seed is not None or deterministic:
        raise InvalidRequestError("wanted noise or a seed, got both; leave one of them out")
    noise_array = _as_numbers("noise", noise)
    with np.errstate(over="ignore"):  # becomes Inf, which is refused below
        noise_BTNA = np.ascontiguousarray(noise_array, dtype=np.float32)
    if noise_BTNA.shape == spec.noise_shape and rows == 1:
        noise_BTNA = noise_BTNA[None]
    if noise_BTNA.shape != (rows, *spec.noise_shape):
        raise InvalidRequestError(
            f"wanted noise of shape {[rows, *spec.noise_shape]} for policy {spec.name!r}, "
            f"got {list(noise_BTNA.shape)}; its axes are row, denoising step, particle, action"
        )
    require_finite("noise", noise_BTNA)
    return ActRows(obs_BO, None, noise_BTNA, single)


def _as_numbers(what: str, values: ArrayLike) -> NDArray[Any]:
    """The values as an array of real numbers.

    Raises:
        InvalidRequestError: they have no such form.
    """
    try:
        array = np.asarray(values)
    # Any array type may be given, and each raises its own errors: torch's tensors a RuntimeError or TypeError.
    except Exception as error:
        raise InvalidRequestError(
            f"wanted the {what} as an array of numbers, got {_kind(values)} ({_short(error)}); "
            f"{_advice(values, error)}"
        ) from None
    if array.dtype != FLOAT32 and array.dtype.kind not in "fiub":
        raise InvalidRequestError(
            f"wanted float32 numbers as {what}, got dtype {array.dtype} of {_kind(values)}; "
            f"{_DTYPE_ADVICE.get(array.dtype.kind, 'convert it to float32')}"
        )
    return array


_DTYPE_ADVICE = {
    "U": "give numbers instead of text",
    "S": "give numbers instead of text",
    "O": "give a number for every element",
    "c": "give real numbers",
}
"""What to do about an array that is not of real numbers, by the kind of its dtype."""


def _kind(values: object) -> str:
    return "None" if values is None else type(values).__name__


def _short(error: Exception) -> str:
    return " ".join(f"{error}".split())[:200]


def _advice(values: object, error: Exception) -> str:
    if type(values).__module__.partition(".")[0] == "torch" or "ensor" in f"{error}":
        return "give tensor.detach().cpu().float().numpy()"
    return "make all rows equally long" if isinstance(error, ValueError) else "give a numpy array"


def require_finite(what: str, array: NDArray[np.float32]) -> None:
    """Raise InvalidRequestError, which names the place, for an array with NaN or Inf."""
    finite = np.isfinite(array)
    if not np.logical_and.reduce(finite, axis=None):
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise InvalidRequestError(
            f"wanted finite numbers, got {array[where]} in the {what} at index {list(where)}; "
            "check the sensor or the simulator"
        )
