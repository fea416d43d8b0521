"""The record of learning curves: the returns of one seed over steps and minutes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import RsmError


@dataclass(frozen=True)
class SeedCurve:
    """K points of one seed, ordered by step; K >= 1."""

    task: str
    """Environment id; a panel each."""
    label: str
    """Name of the algorithm with its settings; a line each."""
    seed: int
    source: str
    """The run directory or the file that it was read from."""
    steps: NDArray[np.int64]
    """[K] environment steps, strictly ascending."""
    returns: NDArray[np.float64]
    """[K] finite."""
    minutes: NDArray[np.float64] | None = None
    """[K] of wall clock since the run began, strictly ascending; None if they are not known."""
    total_steps: int | None = None
    """That the run is to reach; None if that is not known."""

    @property
    def last_step(self) -> int:
        """The step of the last point."""
        return int(self.steps[-1])

    @property
    def unfinished(self) -> bool:
        """Whether the run is known to have further steps to do."""
        return self.total_steps is not None and self.last_step < self.total_steps


def require_sound(curve: SeedCurve, error: type[RsmError]) -> SeedCurve:
    """Return the curve if its numbers are in order.

    Raises:
        RsmError: of the given class, if they are not.
    """
    where = f"seed {curve.seed} of {curve.label} on {curve.task} in {curve.source!r}"
    bad = np.flatnonzero(~np.isfinite(curve.returns))
    if bad.size:
        raise error(
            f"wanted finite returns, got {curve.returns[bad[0]]} at step {curve.steps[bad[0]]:,} of {where}; "
            "remove that line, or leave the seed out"
        )
    for name, values in (("steps", curve.steps), ("minutes", curve.minutes)):
        found = None if values is None else _first_descent(values)
        if values is not None and found is not None:
            raise error(
                f"wanted {name} that rise from point to point, got {values[found + 1]:,} after "
                f"{values[found]:,} in {where}; correct the file, or leave the seed out"
            )
    return curve


def _first_descent(values: NDArray[Any]) -> int | None:
    """The index of the first value that is not below the next one."""
    found = np.flatnonzero(~(np.diff(values) > 0))
    return int(found[0]) if found.size else None
