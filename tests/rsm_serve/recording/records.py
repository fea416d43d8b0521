"""Records that tests make and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rsm_common.policy import Timing
from rsm_common.seeds import expand_seed
from rsm_serve.recording.format import Record, read

OBS = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)


def recorded(directory: Path) -> list[Any]:
    """Untyped: the tests know what there is."""
    return list(read(directory))


def make_record(rows: int = 2, **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "policy": "tiny",
        "version": "3",
        "method": "Act",
        "client_id": "arm-7",
        "arrived_unix_ns": 1_700_000_000_123_456_789,
        "obs": OBS[:rows],
        "seeds": expand_seed(2**64 - 1, rows),
        "noise": None,
        "action": OBS[:rows, :2],
        "q": OBS[:rows, 0],
        "policy_action": OBS[:rows, :2],
        "timing": Timing(1.5, 2.5, 3.5, 4, 9.5),
    }
    return Record(**fields | changes)
