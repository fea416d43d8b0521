"""The result of a replay: differences, counts and latency, as JSON and as text."""

from __future__ import annotations

import contextlib
import math
from array import array
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import numpy as np

from rsm_common.commandline import aligned
from rsm_common.policy import Timing
from rsm_serve.recording.format import Record

WORST = 5
"""Records that the report names."""
PERCENTILES = (50, 90, 99)
STAGES = ("queue", "compute", "total")


@dataclass(frozen=True)
class Difference:
    """Between an answer then and now."""

    number: int
    """Of the record, from 1, in the order of the files."""
    record: Record
    action: float
    """The largest of an action element, as a fraction of its range."""
    rows: int
    """Whose action is beyond the tolerance."""
    tied_rows: int
    """Of these, whose value is the same: another particle that ties with the one of then."""
    q: float
    """The largest of a value."""
    q_rows: int
    """Whose value is beyond the tolerance, as a fraction of the value or of 1."""


@dataclass
class Report:
    """The result of a replay."""

    against: str
    tolerance: float | None
    """As a fraction of the action range; None: that of each policy's specification."""
    records: int = 0
    """Read, of whatever policy."""
    other_policies: int = 0
    """Of policies that were not asked."""
    failed_then: Counter[str] = field(default_factory=Counter)
    """Not asked, because they had no answer then; by status."""
    fallbacks_then: int = 0
    """Not asked, because the answer then was not the policy's."""
    missing: dict[str, str] = field(default_factory=dict)
    """Policies and versions that are not there now, and why."""
    missing_records: int = 0
    failed_now: Counter[str] = field(default_factory=Counter)
    """By sentence."""
    compared: int = 0
    equal: int = 0
    """Records all of whose actions are within the tolerance."""
    rows: int = 0
    differing_rows: int = 0
    tied_rows: int = 0
    differing_q_rows: int = 0
    largest_q: float = 0.0
    worst: list[Difference] = field(default_factory=list)
    """Those that differ most, the worst first."""
    largest: float = 0.0
    unreadable: int = 0
    then_us: array[float] = field(default_factory=lambda: array("f"))
    """Of each comparison, the `STAGES` in a row; plain numbers, because recordings are long."""
    now_us: array[float] = field(default_factory=lambda: array("f"))

    @property
    def agrees(self) -> bool:
        """Whether everything that was answered then is answered now, by the same actions."""
        return self.equal == self.compared > 0 and not self.failed_now and not self.missing

    def add(self, difference: Difference, now: Timing) -> None:
        """Count a comparison."""
        record = difference.record
        self.compared += 1
        self.equal += difference.rows == 0
        self.rows += 0 if record.obs is None else len(record.obs)
        self.differing_rows += difference.rows
        self.tied_rows += difference.tied_rows
        self.differing_q_rows += difference.q_rows
        self.largest = _larger(self.largest, difference.action)
        self.largest_q = _larger(self.largest_q, difference.q)
        for column, timing in ((self.then_us, record.timing), (self.now_us, now)):
            column.extend((timing.queue_us, timing.compute_us, timing.total_us))
        if difference.rows:
            # What is not a number is worst.
            self.worst.append(difference)
            self.worst.sort(key=lambda one: -math.inf if math.isnan(one.action) else -one.action)
            del self.worst[WORST:]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "against": self.against,
            "tolerance": self.tolerance,
            "agrees": self.agrees,
            "records": self.records,
            "unreadable": self.unreadable,
            "other_policies": self.other_policies,
            "failed_then": dict(self.failed_then),
            "fallbacks_then": self.fallbacks_then,
            "missing": self.missing,
            "missing_records": self.missing_records,
            "failed_now": dict(self.failed_now),
            "compared": self.compared,
            "equal": self.equal,
            "rows": self.rows,
            "differing_rows": self.differing_rows,
            "tied_rows": self.tied_rows,
            "differing_q_rows": self.differing_q_rows,
            "largest_difference": _finite(self.largest),
            "largest_q_difference": _finite(self.largest_q),
            "worst": [_as_json(difference) for difference in self.worst],
            "latency_us": {"then": percentiles(self.then_us), "now": percentiles(self.now_us)},
        }


def percentiles(stages_us: array[float]) -> dict[str, dict[str, float]]:
    """Microseconds by stage and percentile; then, the total is the server's, now it is the caller's."""
    columns = np.array(stages_us).reshape(-1, len(STAGES))
    if not len(columns):
        return {}
    return {
        stage: {f"p{p}": round(float(np.percentile(column, p)), 1) for p in PERCENTILES}
        for stage, column in zip(STAGES, columns.T, strict=True)
    }


def table(report: Report) -> str:
    """The report as text."""
    tolerance = "the policy's tolerance" if report.tolerance is None else f"{report.tolerance:g}"
    lines = [
        f"{report.equal} of {report.compared} records agree to {tolerance} with {report.against}",
        f"largest difference {report.largest:.3g} of the action range",
        f"{report.differing_rows} of {report.rows} actions differ, {report.tied_rows} by a particle that ties",
        f"{report.differing_q_rows} values q differ, the largest by {report.largest_q:.3g}",
    ]
    not_asked = [
        (report.unreadable, "unreadable"),
        (report.other_policies, "of other policies"),
        (report.failed_then.total(), "failed then"),
        (report.fallbacks_then, "fallback answers then"),
        (report.missing_records, "of versions that are not there"),
    ]
    if any(count for count, _ in not_asked):
        lines.append("not asked: " + ", ".join(f"{count} {what}" for count, what in not_asked if count))
    lines += [f"not there: {what}: {why}" for what, why in sorted(report.missing.items())]
    lines += [f"failed now, {count} times: {why}" for why, count in report.failed_now.most_common(WORST)]
    if report.worst:
        rows: list[tuple[str, ...]] = [("record", "time", "policy", "client", "difference", "q")]
        rows += [_line(difference) for difference in report.worst]
        lines += ["", aligned(rows, left=4)]
    if report.compared:
        then, now = percentiles(report.then_us), percentiles(report.now_us)
        rows_us = [("microseconds", *(f"{when} p{p}" for when in ("then", "now") for p in PERCENTILES))]
        for stage in STAGES:
            rows_us.append((stage, *(f"{value:.0f}" for of in (then, now) for value in of[stage].values())))
        lines += ["", aligned(rows_us)]
    return "\n".join(lines)


def _line(difference: Difference) -> tuple[str, ...]:
    record = difference.record
    return (
        str(difference.number),
        _time(record),
        f"{record.policy}:{record.version}",
        record.client_id or "-",
        f"{difference.action:.3g}",
        f"{difference.q:.3g}",
    )


def _as_json(difference: Difference) -> dict[str, Any]:
    record = difference.record
    return {
        "record": difference.number,
        "time": _time(record),
        "policy": record.policy,
        "version": record.version,
        "client_id": record.client_id,
        "rows": difference.rows,
        "difference": _finite(difference.action),
        "q_difference": _finite(difference.q),
    }


def _time(record: Record) -> str:
    with contextlib.suppress(ValueError, OverflowError, OSError):  # a year that no calendar has
        when = datetime.fromtimestamp(record.arrived_unix_ns / 1e9, timezone.utc)
        return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return "?"


def _larger(one: float, other: float) -> float:
    """The larger one; what is not a number is largest."""
    return other if math.isnan(other) or other > one else one


def _finite(value: float) -> float | None:
    """None for what JSON has no number for."""
    return value if math.isfinite(value) else None
