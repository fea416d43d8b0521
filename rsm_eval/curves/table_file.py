"""Curves of other programs, from a CSV file: one row per seed and step."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rsm_common.errors import UsageError
from rsm_eval.curves.seed_curve import SeedCurve, require_sound

SUFFIX = ".csv"
COLUMNS = ("task", "algorithm", "seed", "step", "return")
MINUTES = "minutes"
"""The one column that may be missing."""
_REMEDY = "see the example in `rsm-eval curves --help`"

Row = tuple[int, float, float | None]
"""Step, return, minutes."""


def read_table(path: Path) -> list[SeedCurve]:
    """Read the curves of a CSV file with COLUMNS, and perhaps MINUTES, in any order; other columns are ignored.

    The rows of a seed may be in any order too. The algorithm is the label of the curve.

    Raises:
        UsageError: the file cannot be read, or a row is not as described.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "a file that is not text"
        raise UsageError(f"wanted a CSV file at {str(path)!r}, got {reason}; check the path") from None
    reader = csv.DictReader(lines)
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise UsageError(
            f"wanted the columns {', '.join(COLUMNS)} and perhaps {MINUTES} in the first line of "
            f"{str(path)!r}, got none named {' or '.join(missing)}; {_REMEDY}"
        )
    found: dict[tuple[str, str, int], list[Row]] = {}
    for row in reader:
        (task, label, seed), point = _parse(row, f"line {reader.line_num} of {str(path)!r}")
        found.setdefault((task, label, seed), []).append(point)
    if not found:
        raise UsageError(f"wanted at least one row below the names of the columns in {str(path)!r}, got none")
    return [_curve(key, rows, path) for key, rows in found.items()]


def _parse(row: Mapping[str, str | None], where: str) -> tuple[tuple[str, str, int], Row]:
    texts = {name: (row.get(name) or "").strip() for name in (*COLUMNS, MINUTES)}
    empty = [name for name in COLUMNS if not texts[name]]
    if empty:
        raise UsageError(f"wanted a value for {empty[0]} in {where}, got nothing; {_REMEDY}")
    seed, step = (_whole(name, texts[name], where) for name in ("seed", "step"))
    numbers = {name: _number(name, texts[name], where) for name in ("return", MINUTES) if texts[name]}
    return (texts["task"], texts["algorithm"], seed), (step, numbers["return"], numbers.get(MINUTES))


def _whole(name: str, text: str, where: str) -> int:
    if text.isdecimal():
        return int(text)
    value = _number(name, text, where)  # 25000.0, as a column with a gap is written by pandas
    if value < 0 or not value.is_integer():
        raise UsageError(f"wanted a whole number of at least 0 for {name} in {where}, got {text!r}; {_REMEDY}")
    return int(value)


def _number(name: str, text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise UsageError(f"wanted a finite number for {name} in {where}, got {text!r}; {_REMEDY}")
    return value


def _curve(key: tuple[str, str, int], rows: list[Row], path: Path) -> SeedCurve:
    steps, returns, minutes = zip(*sorted(rows, key=lambda row: row[0]), strict=True)
    repeated = next((step for step, after in itertools.pairwise(steps) if step == after), None)
    if repeated is not None:
        raise UsageError(
            f"wanted one row per seed and step in {str(path)!r}, got several of seed {key[2]} of {key[1]} on "
            f"{key[0]} at step {repeated:,}; write the mean over the episodes"
        )
    known = not any(minute is None for minute in minutes)
    curve = SeedCurve(
        *key,
        str(path),
        np.array(steps, dtype=np.int64),
        np.array(returns, dtype=np.float64),
        np.array(minutes, dtype=np.float64) if known else None,
    )
    return require_sound(curve, UsageError)
