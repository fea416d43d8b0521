"""Recorded requests asked again: whether the same observations and seeds still give the same actions.

Compared is what the policy itself chose, then and now: of an action that the server limited the record has the
policy's own too, and every request is asked in the name of a client of its own, which has no action before.
"""

from __future__ import annotations

import contextlib
import math
import secrets
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rsm_common.commandline import aligned
from rsm_common.errors import BundleError, NotReadyError, PolicyNotFoundError, RequestError, UsageError
from rsm_common.policy import ActResult, Policy, Timing
from rsm_common.spec import PolicySpec
from rsm_serve.bundle.contract import SPEC_FILE, list_versions, parse_version
from rsm_serve.client import PolicyClient
from rsm_serve.client.target import Target
from rsm_serve.recording.format import Record

WORST = 5
"""Records that the report names."""
PERCENTILES = (50, 90, 99)
STAGES = ("queue", "compute", "total")


class Against(Protocol):
    """What answers this time."""

    @property
    def policy(self) -> str:
        """Whose records are asked; empty: everybody's."""
        ...

    def spec(self, record: Record) -> PolicySpec:
        """Of the policy that answers a record.

        Raises:
            PolicyNotFoundError, NotReadyError, BundleError: there is none.
        """
        ...

    def ask(self, record: Record) -> ActResult:
        """Answer a record that was answered then.

        Raises:
            RequestError: it cannot be answered now.
        """
        ...

    def close(self) -> None:
        """Release what is open."""
        ...


class Server:
    """A server; every record is asked of the version that answered it, unless the target names one.

    Args:
        target: whom to ask.
        connect: a client for (policy, version).
    """

    def __init__(self, target: Target, connect: Callable[[str, str], PolicyClient]) -> None:
        self.policy = target.policy
        self._version = target.version
        self._connect = connect
        self._clients: dict[tuple[str, str], PolicyClient | RequestError] = {}
        self._run, self._asked = secrets.token_hex(4), 0

    def spec(self, record: Record) -> PolicySpec:
        """See `Against`."""
        return self._client(record).spec

    def ask(self, record: Record) -> ActResult:
        """See `Against`."""
        assert record.obs is not None
        self._asked += 1
        client_id = f"replay-{self._run}-{self._asked}"
        client = self._client(record)
        return client.act(record.obs, seed=record.seeds, noise=record.noise, client_id=client_id)

    def close(self) -> None:
        """See `Against`."""
        for client in self._clients.values():
            if isinstance(client, PolicyClient):
                client.close()

    def _client(self, record: Record) -> PolicyClient:
        key = (self.policy or record.policy, self._version or record.version)
        if key not in self._clients:
            try:
                self._clients[key] = self._connect(*key)
            except (PolicyNotFoundError, NotReadyError) as error:
                self._clients[key] = error
        client = self._clients[key]
        if isinstance(client, RequestError):
            raise client
        return client


class Bundles:
    """Bundles in this process: one version, or of a policy's directory the version that answered.

    Args:
        path: a version directory, a policy directory, or a model.onnx.
        version: to take of a policy directory; empty: each record's own.
    """

    def __init__(self, path: Path, version: str = "") -> None:
        if version and parse_version(version) is None:
            raise UsageError(f"wanted the number of a version such as 3 as --version, got {version!r:.60}")
        self._path = path
        versions = list_versions(path)
        self._many = bool(versions)
        self._version = version
        self._opened: dict[str, Any] = {}
        self.policy = _name_of(path, versions) if versions else self._open("").spec.name
        if version and not self._many and self._open("").spec.version != version:
            raise UsageError(
                f"wanted version {version}, got the bundle {str(path)!r} of version "
                f"{self._open('').spec.version}; leave --version out, or name the policy's directory"
            )

    def spec(self, record: Record) -> PolicySpec:
        """See `Against`."""
        return self._find(record).spec

    def ask(self, record: Record) -> ActResult:
        """See `Against`."""
        assert record.obs is not None
        return self._find(record).act(record.obs, seed=record.seeds, noise=record.noise)

    def close(self) -> None:
        """See `Against`."""
        for policy in self._opened.values():
            if not isinstance(policy, BundleError):
                policy.close()

    def _find(self, record: Record) -> Policy:
        return self._open((self._version or record.version) if self._many else "")

    def _open(self, version: str) -> Policy:
        from rsm_serve.local import open_policy

        if version not in self._opened:
            if version and not (version.isascii() and version.isdecimal()):  # of a file: it must not be a path
                raise BundleError(f"wanted a number as version, got {version!r:.60}; the record is not ours")
            try:
                self._opened[version] = open_policy(self._path / version)
            except BundleError as error:
                if not version:
                    raise
                self._opened[version] = error
        if isinstance(self._opened[version], BundleError):
            raise self._opened[version]
        policy: Policy = self._opened[version]
        return policy


def _name_of(policy_dir: Path, versions: Sequence[int]) -> str:
    """A policy's name as any of its versions says it, which a link to its directory need not."""
    for number in versions:
        try:
            return PolicySpec.from_json((policy_dir / str(number) / SPEC_FILE).read_bytes()).name
        except (OSError, BundleError):  # told when it is asked
            continue
    return policy_dir.absolute().name


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


def compare(number: int, record: Record, result: ActResult, spec: PolicySpec, tolerance: float) -> Difference:
    """How the policy's answer differs from the recorded one.

    Raises:
        RequestError: the two cannot be compared.
    """
    then = record.policy_action
    assert then is not None, "only records of answered requests are compared"
    if result.adjusted is not None and result.adjusted.any():
        raise RequestError("the policy failed, and the server gave out something else")
    if result.action.shape != then.shape:
        raise RequestError(f"wanted actions {list(then.shape)} as then, got {list(result.action.shape)}")
    action_BA = np.abs(result.action - then) / (spec.action_high - spec.action_low)
    off_B = ~(action_BA <= tolerance).all(axis=1)
    q_B, q_off_B = np.zeros(len(then)), np.zeros(len(then), bool)
    if record.q is not None and result.q is not None:
        q_B = np.abs(result.q - record.q)
        q_off_B = ~(q_B <= tolerance * np.maximum(1, np.abs(record.q)))
    known = record.q is not None and result.q is not None
    return Difference(
        number=number,
        record=record,
        action=float(action_BA.max()),
        rows=int(off_B.sum()),
        tied_rows=int((off_B & ~q_off_B).sum()) if known else 0,
        q=float(q_B.max()),
        q_rows=int(q_off_B.sum()),
    )


@dataclass
class Report:
    """What a replay found."""

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


def replay(
    records: Iterable[Record],
    against: Against,
    report: Report,
    *,
    policy: str = "",
    limit: int | None = None,
) -> None:
    """Ask recorded requests again, one after the other, and count into the report.

    Args:
        records: of `rsm_serve.recording.read`.
        against: what answers now.
        report: what is filled.
        policy: whose records to ask; empty: those of `against`.
        limit: at most so many are asked; None: all.
    """
    wanted, asked = policy or against.policy, 0
    for number, record in enumerate(records, 1):
        if limit is not None and asked >= limit:
            return
        report.records += 1
        if wanted and record.policy != wanted:
            report.other_policies += 1
        elif not record.ok:
            report.failed_then[record.code] += 1
        elif record.policy_action is None or record.obs is None:
            report.fallbacks_then += 1
        else:
            asked += 1
            _ask(number, record, against, report)


def _ask(number: int, record: Record, against: Against, report: Report) -> None:
    try:
        spec = against.spec(record)
    except (PolicyNotFoundError, NotReadyError, BundleError) as error:
        report.missing.setdefault(f"{record.policy}:{record.version}", str(error))
        report.missing_records += 1
        return
    tolerance = spec.tolerance if report.tolerance is None else report.tolerance
    try:
        result = against.ask(record)
        difference = compare(number, record, result, spec, tolerance)
    except RequestError as error:
        report.failed_now[str(error)] += 1
        return
    report.add(difference, result.timing)


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
