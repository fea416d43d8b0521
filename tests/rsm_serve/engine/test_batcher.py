"""The batcher: its decisions as a pure state machine, and the driver with real threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsm_common.errors import (
    BackendError,
    ConfigError,
    DeadlineExpiredError,
    InvalidRequestError,
    NotReadyError,
    QueueFullError,
    RequestError,
)
from rsm_serve.engine.batcher import Batcher
from rsm_serve.engine.queue import BatchLimits, BatchQueue
from rsm_serve.observe.settled import Answered
from rsm_serve.wire.caller import check_rows

SMALL = BatchLimits(max_batch_size=4, max_queue_rows=8)


def items(batch_entries):
    return [entry.item for entry in batch_entries]


def test_an_idle_worker_takes_what_is_there_at_once():
    queue = BatchQueue[str](SMALL)
    queue.put("a", 1, now=10.0)
    assert queue.ready_at() == 10.0
    assert items(queue.take(10.0).entries) == ["a"]
    assert queue.ready_at() is None
    assert items(queue.take(10.0).entries) == []


def test_what_arrives_meanwhile_is_the_next_batch_in_order_and_never_split():
    queue = BatchQueue[str](SMALL)
    for name, rows in (("a", 1), ("b", 2), ("c", 2), ("d", 1)):
        queue.put(name, rows, now=0.0)
    first = queue.take(0.0)
    assert (items(first.entries), first.rows) == (["a", "b"], 3)  # c would be 5 rows; d must not overtake it
    assert items(queue.take(0.0).entries) == ["c", "d"]
    assert queue.rows == 0


def test_a_delay_waits_for_the_oldest_but_not_for_a_full_batch():
    queue = BatchQueue[str](BatchLimits(4, 8, max_queue_delay_s=0.5))
    queue.put("a", 1, now=0.0)
    queue.put("b", 1, now=0.25)
    assert queue.ready_at() == 0.5
    assert items(queue.take(0.49).entries) == []
    queue.put("c", 2, now=0.3)
    assert queue.ready_at() == 0.0
    assert items(queue.take(0.3).entries) == ["a", "b", "c"]


def test_closing_ends_the_delay_and_refuses_more():
    queue = BatchQueue[str](BatchLimits(4, 8, max_queue_delay_s=100.0))
    queue.put("a", 1, now=0.0)
    queue.close()
    assert not queue.finished
    with pytest.raises(NotReadyError):
        queue.put("b", 1, now=0.0)
    assert items(queue.take(0.0).entries) == ["a"]
    assert queue.finished


def test_expired_requests_leave_at_batch_formation_and_make_room_for_others():
    queue = BatchQueue[str](SMALL)
    queue.put("late", 3, now=0.0, deadline_s=1.0)
    queue.put("good", 4, now=0.0, deadline_s=2.0)
    batch = queue.take(1.0)
    assert (items(batch.entries), items(batch.expired)) == (["good"], ["late"])
    assert queue.rows == 0


def test_a_request_that_is_late_already_is_refused():
    queue = BatchQueue[str](SMALL)
    with pytest.raises(DeadlineExpiredError):
        queue.put("late", 1, now=1.0, deadline_s=1.0)
    assert queue.rows == 0


def test_a_cancelled_request_frees_its_room():
    queue = BatchQueue[str](SMALL)
    entry = queue.put("gone", 4, now=0.0)
    queue.put("good", 4, now=0.0)
    with pytest.raises(QueueFullError):
        queue.put("more", 1, now=0.0)
    assert queue.cancel(entry)
    assert not queue.cancel(entry)
    queue.put("more", 4, now=0.0)
    assert items(queue.take(0.0).entries) == ["good"]


def test_a_full_queue_says_its_limit():
    queue = BatchQueue[str](SMALL)
    queue.put("a", 4, now=0.0)
    queue.put("b", 4, now=0.0)
    with pytest.raises(QueueFullError, match="8 of at most 8"):
        queue.put("c", 1, now=0.0)


@pytest.mark.parametrize("rows", [0, 5])
def test_a_request_larger_than_a_batch_is_refused_with_the_limit(rows):
    with pytest.raises(InvalidRequestError, match=f"1 to 4 rows.*got {rows}"):
        check_rows(rows, SMALL.max_batch_size)
    with pytest.raises(AssertionError):
        BatchQueue[str](SMALL).put("a", rows, now=0.0)


@pytest.mark.parametrize("limits", [(0, 1, 0.0), (4, 3, 0.0), (4, 8, -1.0), (4, 8, float("nan"))])
def test_contradicting_limits_are_rejected(limits):
    with pytest.raises(ConfigError):
        BatchLimits(*limits)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(1, 4), st.one_of(st.none(), st.integers(0, 6))),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.none()),
        st.tuples(st.just("take"), st.integers(0, 3), st.none()),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(ACTIONS, st.sampled_from([0.0, 2.0]))
def test_every_request_leaves_exactly_once_and_in_order(actions, delay_s):
    queue = BatchQueue[int](BatchLimits(4, 10, delay_s))
    now, accepted, waiting = 0.0, {}, []
    for number, (kind, value, extra) in enumerate(actions):
        if kind == "put":
            try:
                accepted[number] = queue.put(number, value, now, None if extra is None else now + extra)
                waiting.append(number)
            except (QueueFullError, DeadlineExpiredError):
                pass
        elif kind == "cancel" and value in accepted:
            assert queue.cancel(accepted[value]) == (value in waiting)
            waiting = [item for item in waiting if item != value]
        elif kind == "take":
            now += value
            ready_at = queue.ready_at()
            batch = queue.take(now)
            # Work-conserving: something leaves whenever something is due.
            assert bool(batch.entries or batch.expired) == (ready_at is not None and ready_at <= now)
            gone = sorted(items(batch.entries) + items(batch.expired))
            assert gone == waiting[: len(gone)]  # the oldest, and nobody overtakes
            assert items(batch.entries) == sorted(items(batch.entries))
            assert batch.rows <= 4
            assert all(e.deadline_s is not None and e.deadline_s <= now for e in batch.expired)
            assert all(e.deadline_s is None or e.deadline_s > now for e in batch.entries)
            waiting = waiting[len(gone) :]
        assert queue.rows == sum(accepted[item].rows for item in waiting) <= 10


class Gate:
    """A computation that waits until the test opens it, and records its batches."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)
        self.batches: list[list[int]] = []

    def __call__(self, requests: Sequence[int]) -> list[int | RequestError]:
        self.batches.append(list(requests))
        self.entered.release()
        assert self.open.wait(30)
        if 13 in requests:
            raise RuntimeError("secret detail")
        return [BackendError("unlucky") if request == 7 else 10 * request for request in requests]


def run_gated(scenario):
    async def main():
        gate = Gate()
        batcher = Batcher(gate, SMALL, name="test")
        batcher.start()
        try:
            await scenario(gate, batcher)
        finally:
            gate.open.set()
            batcher.close()
            await asyncio.wait_for(batcher.drained(), 30)

    asyncio.run(main())


async def entered(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.entered.acquire, True, 30)


def test_the_driver_batches_what_arrives_while_the_worker_is_busy():
    async def scenario(gate, batcher):
        first = batcher.put(1, 1)
        await entered(gate)
        others = [batcher.put(n, 1) for n in (2, 3, 4)]
        gate.open.set()
        answered: list[Answered[int]] = await asyncio.gather(first, *others)
        assert [a.answer for a in answered] == [10, 20, 30, 40]
        assert gate.batches == [[1], [2, 3, 4]]
        assert answered[1].queue_us > 0

    run_gated(scenario)


def test_a_failing_backend_fails_its_batch_and_the_worker_goes_on():
    async def scenario(gate, batcher):
        gate.open.set()
        with pytest.raises(BackendError):
            await batcher.put(13, 1)
        assert (await batcher.put(2, 1)).answer == 20

    run_gated(scenario)


def test_one_unlucky_request_does_not_poison_its_batch():
    async def scenario(gate, batcher):
        first = batcher.put(1, 1)
        await entered(gate)
        unlucky, good = batcher.put(7, 1), batcher.put(8, 1)
        gate.open.set()
        with pytest.raises(BackendError, match="unlucky"):
            await unlucky
        assert (await good).answer == 80
        assert (await first).answer == 10
        assert gate.batches == [[1], [7, 8]]

    run_gated(scenario)


def test_a_cancelled_request_is_never_computed():
    async def scenario(gate, batcher):
        first = batcher.put(1, 1)
        await entered(gate)
        gone, good = batcher.put(2, 1), batcher.put(3, 1)
        gone.cancel()
        await asyncio.sleep(0)
        assert batcher.queued_rows == 1
        gate.open.set()
        await asyncio.gather(first, good)
        assert gate.batches == [[1], [3]]

    run_gated(scenario)


def test_an_expired_request_is_never_computed():
    async def main():
        now = [0.0]
        gate = Gate()
        batcher = Batcher(gate, SMALL, clock=lambda: now[0])
        batcher.start()
        first = batcher.put(1, 1)
        await entered(gate)
        late, good = batcher.put(2, 1, timeout_s=1.0), batcher.put(3, 1, timeout_s=3.0)
        now[0] = 2.0
        gate.open.set()
        with pytest.raises(DeadlineExpiredError):
            await late
        assert (await good).queue_us == pytest.approx(2e6)
        assert (await first).queue_us == 0
        assert gate.batches == [[1], [3]]
        batcher.close()
        await batcher.drained()

    asyncio.run(main())


def test_closing_answers_what_is_queued_and_refuses_more():
    async def scenario(gate, batcher):
        first = batcher.put(1, 1)
        await entered(gate)
        second = batcher.put(2, 1)
        batcher.close()
        with pytest.raises(NotReadyError):
            batcher.put(3, 1)
        gate.open.set()
        await batcher.drained()
        assert [(await first).answer, (await second).answer] == [10, 20]

    run_gated(scenario)


def test_a_computation_that_loses_an_answer_fails_the_batch_only():
    async def main():
        batcher: Batcher[int, int] = Batcher(lambda requests: [1] if len(requests) == 2 else [], SMALL)
        batcher.start()
        with pytest.raises(BackendError):
            await batcher.put(1, 1)
        batcher.close()
        await asyncio.wait_for(batcher.drained(), 30)

    asyncio.run(main())
