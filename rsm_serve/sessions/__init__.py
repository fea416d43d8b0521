"""Inference sessions: one module per runtime, behind one small protocol; `choice` opens one by its name."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Session(Protocol):
    """A loaded graph. `run` may be called from one thread at a time."""

    @property
    def runtime(self) -> str:
        """Which runtime this is, for logs and reports: "onnxruntime 1.31.1, CPU"."""
        ...

    def run(
        self, obs_BO: NDArray[np.float32], noise_BTNA: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Actions [B, A] and, if the graph has critics, values [B], both float32.

        The arrays belong to the caller: a later run does not change them.
        """
        ...

    def close(self) -> None:
        """Release what the runtime holds, when no run is under way; `run` cannot be called any more."""
        ...
