"""Parity: the exported graph acts like the policy it was made from, or there is no bundle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsm_serve.errors import ParityError
from rsm_serve.policy import Policy
from rsm_serve.seeds import draw_noise, expand_seed
from rsm_serve.sessions import Session

BATCH_SIZES = (1, 7, 64)
TOLERANCE = 1e-5
"""Largest allowed error, as a fraction of the action range."""
_SEED = 0x5041_5249_5459


@dataclass(frozen=True)
class Parity:
    """How closely the graph follows the policy."""

    max_error: float
    """Largest error of any action, as a fraction of the action range."""
    rows: int
    """Rows compared."""


def check_parity(policy: Policy, session: Session, obs_PO: NDArray[np.float32]) -> Parity:
    """Compare policy and graph on the same observations and noise, at batches of 1, 7 and 64.

    Args:
        policy: the original.
        session: the exported graph.
        obs_PO: observations [P, O] to draw on; rows are repeated as needed.

    Raises:
        ParityError: an action differs by more than TOLERANCE of the action range.
    """
    spec = policy.spec
    span = spec.action_high - spec.action_low
    worst = 0.0
    for size in BATCH_SIZES:
        obs_BO = obs_PO[np.arange(size) % len(obs_PO)]
        noise = draw_noise(expand_seed(_SEED + size, size), spec.noise_shape)
        expected = policy.act(obs_BO, noise=noise).action
        got, _ = session.run(obs_BO, noise)
        error_BA = np.abs(got - expected) / span
        # NaN compares false with everything, so ask for the good case.
        if not (error_BA <= TOLERANCE).all():
            row, column = np.unravel_index(np.argmax(np.nan_to_num(error_BA, nan=np.inf)), error_BA.shape)
            raise ParityError(
                f"the graph does not act like the policy: batch {size}, row {row}, action {column} is "
                f"{got[row, column]:.7g}, wanted {expected[row, column]:.7g} (off by "
                f"{error_BA[row, column]:.2g} of the action range, {TOLERANCE:g} allowed); "
                "no bundle was written"
            )
        worst = max(worst, float(error_BA.max()))
    return Parity(worst, sum(BATCH_SIZES))
