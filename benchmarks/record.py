"""The record of a benchmark: its numbers, command, machine and versions."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from rsm_common.provenance import machine_facts, provenance


def write_record(results: dict[str, Any], out: Path | None, *, show: bool = True) -> None:
    """Print the record as JSON unless `quiet`, and write it to a file if one is given."""
    record = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": {**machine_facts(), "load_average": round(os.getloadavg()[0], 2)},
        "versions": provenance(),
        **results,
    }
    text = json.dumps(record, indent=2) + "\n"
    if show:
        print(text, end="")
    if out is not None:
        out.write_text(text)
