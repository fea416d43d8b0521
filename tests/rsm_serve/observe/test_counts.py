"""Counts of a version and of a server, without a server."""

from __future__ import annotations

import numpy as np
import pytest

from rsm_common.policy import ActResult, Timing
from rsm_serve.observe.counts import LATENCY_BOUNDS_S, ROWS_BOUNDS, Histogram, LaneCounts, ServerCounts
from rsm_serve.observe.settled import Answered, Settled


def lane(policy: str = "tiny", version: str = "1") -> LaneCounts:
    return LaneCounts(policy, version, "a runtime", lambda: 0)


def settled(code: str = "OK", reason: str = "", timing: Timing | None = None, arrived_ns: int = 7) -> Settled:
    answered = None
    if timing is not None:
        answered = Answered(ActResult(np.zeros((2, 3), np.float32), None, None, "1", timing), 30.0)
    return Settled("service", "Act", "tiny", "1", "", arrived_ns, 0.5, code, reason, None, answered, answered)


@pytest.mark.parametrize("bounds", [LATENCY_BOUNDS_S, ROWS_BOUNDS])
def test_buckets_ascend(bounds):
    assert list(bounds) == sorted(set(bounds))


def test_latency_buckets_reach_from_50_microseconds_to_a_second():
    assert (LATENCY_BOUNDS_S[0], LATENCY_BOUNDS_S[-1]) == (50e-6, 1.0)


def test_a_histogram_knows_its_count_and_sum():
    histogram = Histogram((1.0, 2.0))
    for value in (1.0, 1.5, 7.0):
        histogram.add(value)
    assert (histogram.counts, histogram.count, histogram.total) == ([1, 1, 1], 3, 9.5)


def test_the_requests_of_a_batch_share_its_durations():
    counts, batch = lane(), Timing(0.0, 10.0, 200.0, 4)
    for timing in (batch, batch, Timing(0.0, 10.0, 100.0, 4)):
        counts.settled(settled(timing=timing))
    assert (counts.rows, counts.request_s.count, counts.queue_s.count) == (6, 3, 3)
    assert counts.network.count == 3
    assert counts.network.total == pytest.approx(500e-6)
    assert counts.executions == 2
    assert counts.by_batch_rows[4].network.total == pytest.approx(300e-6)


def test_a_batch_is_counted_once_though_others_are_settled_between_its_requests():
    counts, one, other = lane(), Timing(0.0, 10.0, 200.0, 2), Timing(0.0, 10.0, 200.0, 1)
    for timing in (one, other, one):
        counts.settled(settled(timing=timing))
    assert {size: batches.network.count for size, batches in counts.by_batch_rows.items()} == {2: 1, 1: 1}
    assert counts.executions == 2


def test_failures_are_timed_and_requests_that_were_given_up_are_not():
    counts = lane()
    for code, reason in (("CANCELLED", "cancelled"), ("DEADLINE_EXCEEDED", "late"), ("INTERNAL", "backend")):
        counts.settled(settled(code, reason))
    assert len(counts.requests) == 3
    assert (counts.failed.count, counts.failed.total) == (1, 0.5)
    assert counts.request_s.count == counts.rows == 0


def test_the_last_arrival_is_the_latest():
    counts = lane()
    for arrived_ns in (5, 9, 7):
        counts.settled(settled(arrived_ns=arrived_ns))
    assert counts.last_arrival_ns == 9


def test_loads_are_counted_with_their_result():
    counts = ServerCounts()
    with counts.loading("tiny"):
        pass
    with pytest.raises(ValueError, match="no"), counts.loading("tiny"):
        raise ValueError("no")
    loads, seconds = counts.load_counts()
    assert loads == {("tiny", "ok"): 1, ("tiny", "failed"): 1}
    assert list(seconds) == ["tiny"]


def test_versions_are_shown_in_their_order_and_a_later_load_replaces_an_earlier_one():
    counts, first, second = ServerCounts(), lane("tiny", "10"), lane("tiny", "10")
    for added in (first, lane("tiny", "9"), lane("other", "1"), second):
        counts.add(added)
    counts.remove(first)
    assert [(shown.policy, shown.version) for shown in counts.lanes] == [
        ("other", "1"),
        ("tiny", "9"),
        ("tiny", "10"),
    ]
    counts.remove(second)
    assert len(counts.lanes) == 2
