"""How closely a graph follows the policy it was made from, and how closely it must.

Best-of-N is discontinuous: where the two best particles tie to rounding, torch and another runtime may each
choose either, and both are right. So the graph must give one of the policy's own particles whose value is the
best to within a tolerance, and must state that value.

Actions are compared as fractions of the action range, values as fractions of the largest of the value itself,
the mean magnitude of the values compared, and 1. Values of critics with atoms are rounded in proportion to the
largest atom, which takes the place of the 1.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import ParityError
from rsm_common.spec import PolicySpec
from rsm_export.config import Precision
from rsm_train.policy import TorchPolicy

Array = NDArray[np.float32]

TOLERANCES: dict[Precision, float] = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 5e-2, "int8": 1e-1}
"""Largest allowed error of actions and of values."""
_ROUNDING_FACTOR = 4
"""How much more than the policy's own float32 rounding a float32 graph may be off."""


class Original(Protocol):
    """What a graph is compared with; a `TorchPolicy` is one."""

    spec: PolicySpec

    @property
    def value_size(self) -> float:
        """The magnitude that rounding of values is in proportion to, however small the value."""
        ...

    def particles(self, obs_BO: Array, noise_BTNA: Array) -> tuple[Array, Array | None]:
        """All N particles [B, N, A] in environment units, and their values [B, N], None without critics."""
        ...


@dataclass(frozen=True)
class Tolerance:
    """What is allowed, as fractions; see the module."""

    action: float
    value: float


@dataclass(frozen=True)
class Accuracy:
    """A graph against its policy on the same observations and noise; errors as fractions, see the module."""

    rows: int
    max_error: float
    """Of an action from the nearest of the policy's best particles."""
    mean_error: float
    other_particle_rate: float
    """Fraction of the rows in which that particle is not the one that the policy chooses."""
    max_q_error: float | None
    """None without critics."""
    tolerance: Tolerance

    def to_dict(self) -> dict[str, object]:
        """For policy.json."""
        return dataclasses.asdict(self)


def compare(
    policy: Original,
    obs_BO: Array,
    noise_BTNA: Array,
    action_BA: Array,
    q_B: Array | None,
    tolerance: Tolerance,
) -> Accuracy:
    """Compare a graph's answers with the policy.

    Args:
        policy: the original, in float32.
        obs_BO: observations.
        noise_BTNA: noise.
        action_BA: the graph's actions, environment units.
        q_B: the graph's values, None if it has no critics.
        tolerance: see `allowed`.

    Raises:
        ParityError: an action is no particle of nearly the best value, or a value is off by too much.
    """
    particle_BNA, q_BN = policy.particles(obs_BO, noise_BTNA)
    error_BN = (np.abs(action_BA[:, None] - particle_BNA) / _span(policy)).max(axis=2)
    if q_BN is None:
        q_BN = np.zeros_like(error_BN)
    best_B = q_BN.max(axis=1)
    slack_B = tolerance.value * _value_scale(policy, best_B)
    # Of the particles that may be chosen, the nearest.
    allowed_BN = np.where(q_BN >= (best_B - slack_B)[:, None], error_BN, np.inf)
    nearest_B, error_B = allowed_BN.argmin(axis=1), allowed_BN.min(axis=1)
    # NaN compares false with everything, so ask for the good case.
    for row in np.flatnonzero(~(error_B <= tolerance.action)):
        wanted = particle_BNA[row, q_BN[row].argmax()]
        raise ParityError(
            f"the graph does not act like the policy: action of row {row} is {_text(action_BA[row])}, wanted "
            f"{_text(wanted)} (off by {error_B[row]:.2g} of the action range, {tolerance.action:.2g} allowed)"
        )
    return Accuracy(
        rows=len(obs_BO),
        max_error=float(error_B.max()),
        mean_error=float(error_B.mean()),
        other_particle_rate=float(np.mean(q_BN[np.arange(len(q_BN)), nearest_B] < best_B)),
        max_q_error=None
        if q_B is None
        else _value_error(q_B, best_B, _value_scale(policy, best_B), tolerance.value),
        tolerance=tolerance,
    )


def _value_error(q_B: Array, best_B: Array, scale_B: Array, tolerance: float) -> float:
    error_B = np.abs(q_B - best_B) / scale_B
    for row in np.flatnonzero(~(error_B <= tolerance)):
        raise ParityError(
            f"the graph does not value like the policy: q of row {row} is {q_B[row]:.7g}, wanted "
            f"{best_B[row]:.7g} (off by {error_B[row]:.2g}, {tolerance:.2g} allowed)"
        )
    return float(error_B.max())


def allowed(policy: TorchPolicy, obs_BO: Array, noise_BTNA: Array, precision: Precision) -> Tolerance:
    """TOLERANCES, or more for a float32 graph of a policy whose own rounding is larger than usual.

    Two float32 programs cannot agree better than each agrees with exact arithmetic. A chain of one step, or of
    few deterministic ones, can amplify rounding a hundredfold; how much is measured, by running it in float64.
    """
    if precision != "fp32":
        return Tolerance(TOLERANCES[precision], TOLERANCES[precision])
    exact = TorchPolicy(policy.spec, policy.weights.double())
    exact_BNA, exact_BN = exact.particles(obs_BO.astype(np.float64), noise_BTNA.astype(np.float64))
    action_BNA, q_BN = policy.particles(obs_BO, noise_BTNA)
    rounding = [np.abs(action_BNA - exact_BNA) / _span(policy), np.zeros(1)]
    if q_BN is not None and exact_BN is not None:
        scale_B = _value_scale(policy, exact_BN.max(axis=1))
        rounding[1] = np.abs(q_BN - exact_BN).max(axis=1) / scale_B
    return Tolerance(*(max(TOLERANCES["fp32"], _ROUNDING_FACTOR * float(found.max())) for found in rounding))


def _span(policy: Original) -> Array:
    return policy.spec.action_high - policy.spec.action_low


def _value_scale(policy: Original, best_B: Array) -> Array:
    magnitude_B = np.abs(best_B)
    scale_B: Array = np.maximum(np.maximum(policy.value_size, magnitude_B), magnitude_B.mean())
    return scale_B


def _text(values: Array) -> str:
    shown = ", ".join(f"{value:.7g}" for value in values[:6])
    return f"[{shown}{', ...' if len(values) > 6 else ''}]"
