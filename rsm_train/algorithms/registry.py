"""The algorithms that rsm-train knows by name. A new algorithm is its own file and one line here."""

from __future__ import annotations

from rsm_train.algorithms.common import Algorithm
from rsm_train.algorithms.dpmd import DPMD
from rsm_train.algorithms.sac import SAC
from rsm_train.algorithms.sdac import SDAC

ALGORITHMS: dict[str, type[Algorithm]] = {
    "dpmd": DPMD,
    "sdac": SDAC,
    "sac": SAC,
}
