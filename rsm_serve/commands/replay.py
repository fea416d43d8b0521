"""Recorded requests, asked again: whether the same observations and seeds still give the same actions.

The actions of the policy are compared, then and now. If the server limited an action, the record has the
policy's own action too. Every request gets a new client id, so no earlier action limits it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from rsm_common.errors import BundleError, NotReadyError, PolicyNotFoundError, RequestError
from rsm_common.policy import ActResult
from rsm_common.spec import PolicySpec
from rsm_serve.commands.replay_report import Difference, Report
from rsm_serve.commands.replay_targets import Against
from rsm_serve.recording.format import Record


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


def compare(number: int, record: Record, result: ActResult, spec: PolicySpec, tolerance: float) -> Difference:
    """How the policy's answer differs from the recorded one.

    Raises:
        RequestError: the two cannot be compared.
    """
    then = record.policy_action
    assert then is not None, "only records of answered requests are compared"
    if result.adjusted is not None and result.adjusted.any():
        raise RequestError("the policy failed, and the server answered with its fallback")
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
