"""Inference sessions: one module per runtime, behind one small protocol."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Session(Protocol):
    """A loaded graph. `run` may be called from one thread at a time."""

    def run(
        self, obs_BO: NDArray[np.float32], noise_BTNA: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Actions [B, A] and, if the graph has critics, values [B], both float32.

        The arrays belong to the caller: a later run does not change them.
        """
        ...
