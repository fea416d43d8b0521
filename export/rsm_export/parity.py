"""Parity: the exported graph acts like the policy it was made from, or there is no bundle.

Best-of-N is discontinuous: where the two best particles tie to rounding, torch and another runtime may each
choose either, and both are right. So the graph must give, to TOLERANCE, a particle of the policy whose
value is the best to Q_TOLERANCE, and must state that value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsm_serve.errors import ParityError
from rsm_serve.seeds import draw_noise, expand_seed
from rsm_serve.sessions import Session
from rsm_train.policy import TorchPolicy

BATCH_SIZES = (1, 7, 64)
TOLERANCE = 1e-5
"""Largest allowed error of an action, as a fraction of the action range."""
Q_TOLERANCE = 1e-5
"""Largest allowed error of a value, as a fraction of the larger of 1 and the value."""
_SEED = 0x5041_5249_5459


@dataclass(frozen=True)
class Parity:
    """How closely the graph follows the policy."""

    max_error: float
    """Largest error of any action, as a fraction of the action range."""
    rows: int
    """Rows compared."""


def check_parity(policy: TorchPolicy, session: Session, obs_PO: NDArray[np.float32]) -> Parity:
    """Compare policy and graph on the same observations and noise, at batches of 1, 7 and 64.

    Args:
        policy: the original.
        session: the exported graph.
        obs_PO: observations [P, O] to draw on; rows are repeated as needed.

    Raises:
        ParityError: an action or a value differs by more than is allowed.
    """
    worst = 0.0
    for size in BATCH_SIZES:
        obs_BO = obs_PO[np.arange(size) % len(obs_PO)]
        noise = draw_noise(expand_seed(_SEED + size, size), policy.spec.noise_shape)
        worst = max(worst, _largest_error(policy, session, obs_BO, noise))
    return Parity(worst, sum(BATCH_SIZES))


def _largest_error(
    policy: TorchPolicy, session: Session, obs_BO: NDArray[np.float32], noise: NDArray[np.float32]
) -> float:
    span = policy.spec.action_high - policy.spec.action_low
    action_BNA, q_BN = policy.particles(obs_BO, noise)
    got_BA, got_q_B = session.run(obs_BO, noise)
    best_B = q_BN.max(axis=1)
    slack_B = Q_TOLERANCE * np.maximum(1, np.abs(best_B))
    error_BN = (np.abs(got_BA[:, None] - action_BNA) / span).max(axis=2)
    error_B = np.where(q_BN >= (best_B - slack_B)[:, None], error_BN, np.inf).min(axis=1)
    # NaN compares false with everything, so ask for the good case.
    for row in np.flatnonzero(~(error_B <= TOLERANCE)):
        wanted = action_BNA[row, q_BN[row].argmax()]
        raise ParityError(
            f"the graph does not act like the policy: batch {len(obs_BO)}, row {row} is {_text(got_BA[row])}, "
            f"wanted {_text(wanted)} (off by {error_B[row]:.2g} of the action range, {TOLERANCE:g} allowed); "
            "no bundle was written"
        )
    if got_q_B is not None and not (np.abs(got_q_B - best_B) <= slack_B).all():
        raise ParityError(
            f"the graph does not value like the policy: batch {len(obs_BO)} has q {_text(got_q_B)}, "
            f"wanted {_text(best_B)} to {Q_TOLERANCE:g}; no bundle was written"
        )
    return float(error_B.max())


def _text(values: NDArray[np.float32]) -> str:
    shown = ", ".join(f"{value:.7g}" for value in values[:6])
    return f"[{shown}{', ...' if len(values) > 6 else ''}]"
