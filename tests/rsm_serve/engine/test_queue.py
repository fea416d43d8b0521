"""The queue of a batcher: which requests form a batch, priorities, replacements and advice to try again."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsm_common.errors import (
    ConfigError,
    DeadlineExpiredError,
    InvalidRequestError,
    NotReadyError,
    QueueFullError,
    SupersededError,
    error_from_status,
    retry_after_ms,
    wire_status,
)
from rsm_serve.engine.queue import BatchLimits, BatchQueue, Entry
from rsm_serve.wire.caller import MAX_PRIORITY, PRIORITY_STEP_S, check_priority, check_rows

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


FIRST_IN_FIRST_OUT = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(1, 4), st.one_of(st.none(), st.integers(0, 6))),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.none()),
        st.tuples(st.just("take"), st.integers(0, 3), st.none()),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(FIRST_IN_FIRST_OUT, st.sampled_from([0.0, 2.0]))
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
            assert gone == waiting[: len(gone)]  # the oldest, in their order
            assert items(batch.entries) == sorted(items(batch.entries))
            assert batch.rows <= 4
            assert all(e.deadline_s is not None and e.deadline_s <= now for e in batch.expired)
            assert all(e.deadline_s is None or e.deadline_s > now for e in batch.entries)
            waiting = waiting[len(gone) :]
        assert queue.rows == sum(accepted[item].rows for item in waiting) <= 10


ONE_BY_ONE = BatchLimits(max_batch_size=1, max_queue_rows=8)


LATEST = BatchLimits(max_batch_size=4, max_queue_rows=8, latest_wins=True)


def drained(queue: BatchQueue[str], now: float = 0.0) -> list[str]:
    """Everything that waits, in the order in which it leaves."""
    order = []
    while batch := queue.take(now).entries:
        order += [entry.item for entry in batch]
    return order


class TestPriorities:
    def test_higher_goes_first_then_first_in_first_out(self):
        queue = BatchQueue[str](ONE_BY_ONE)
        for name, priority in (("a", 0), ("b", 5), ("c", -5), ("d", 5), ("e", 0)):
            queue.put(name, 1, now=0.0, priority=priority)
        assert drained(queue) == ["b", "d", "a", "e", "c"]

    def test_every_priority_gets_its_turn(self):
        """The lowest priority waits for the highest only as long as documented."""
        queue = BatchQueue[str](ONE_BY_ONE)
        queue.put("low", 1, now=0.0, priority=-MAX_PRIORITY)
        longest_s = 2 * MAX_PRIORITY * PRIORITY_STEP_S
        queue.put("before", 1, now=longest_s - 0.01, priority=MAX_PRIORITY)
        queue.put("after", 1, now=longest_s + 0.01, priority=MAX_PRIORITY)
        assert drained(queue, now=longest_s + 0.01) == ["before", "low", "after"]

    @pytest.mark.parametrize("priority", [-11, 11, 2**31 - 1])
    def test_others_are_refused(self, priority):
        with pytest.raises(InvalidRequestError, match=f"from -10 to 10, got {priority}"):
            check_priority(priority)
        queue = BatchQueue[str](ONE_BY_ONE)
        with pytest.raises(AssertionError):
            queue.put("a", 1, now=0.0, priority=priority)
        assert queue.rows == 0

    def test_a_delay_counts_from_the_oldest_of_all(self):
        queue = BatchQueue[str](BatchLimits(4, 8, max_queue_delay_s=0.5))
        queue.put("old", 1, now=0.0, priority=-5)
        queue.put("urgent", 1, now=0.3, priority=5)
        assert queue.ready_at() == 0.5


class TestLatestWins:
    def test_the_newest_takes_the_place_of_the_one_that_waits(self):
        queue = BatchQueue[str](LATEST)
        first = queue.put("a1", 2, now=0.0, client_id="a")
        queue.put("b1", 1, now=0.1, client_id="b")
        newer = queue.put("a2", 3, now=0.2, client_id="a")
        assert newer.replaced is first
        assert queue.rows == 4
        assert not queue.cancel(first), "it is no longer there"
        assert (newer.arrived_s, newer.since_s) == (0.2, 0.0)  # it waited from 0.2 on, in the place of 0.0
        assert drained(queue) == ["a2", "b1"]

    def test_what_is_being_computed_is_not_replaced(self):
        queue = BatchQueue[str](LATEST)
        queue.put("a1", 1, now=0.0, client_id="a")
        assert drained(queue) == ["a1"]
        assert queue.put("a2", 1, now=0.0, client_id="a").replaced is None

    def test_without_a_client_id_or_the_option_no_request_is_replaced(self):
        for limits, client_id in ((LATEST, ""), (BatchLimits(4, 8), "a")):
            queue = BatchQueue[str](limits)
            for item in ("1", "2"):
                assert queue.put(item, 1, now=0.0, client_id=client_id).replaced is None
            assert drained(queue) == ["1", "2"]

    def test_a_full_queue_has_room_for_a_replacement_and_keeps_the_old_for_one_too_many(self):
        queue = BatchQueue[str](LATEST)
        queue.put("a1", 4, now=0.0, client_id="a")
        queue.put("b1", 3, now=0.0, client_id="b")
        with pytest.raises(QueueFullError):
            queue.put("c1", 2, now=0.0, client_id="c")
        queue.put("b2", 4, now=0.0, client_id="b")
        queue.put("a2", 1, now=0.0, client_id="a")
        queue.put("c2", 3, now=0.0, client_id="c")
        with pytest.raises(QueueFullError):
            queue.put("a3", 4, now=0.0, client_id="a")
        assert drained(queue) == ["a2", "b2", "c2"]
        assert queue.rows == 0

    def test_another_priority_is_another_place(self):
        queue = BatchQueue[str](LATEST)
        queue.put("a1", 1, now=0.0, client_id="a")
        queue.put("b1", 1, now=0.0)
        assert queue.put("a2", 1, now=0.0, client_id="a", priority=-1).replaced is not None
        assert drained(queue) == ["b1", "a2"]


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(1, 4), st.integers(-3, 3), st.sampled_from(["", "a", "b"])),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0), st.just("")),
        st.tuples(st.just("take"), st.integers(0, 3), st.just(0), st.just("")),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(ACTIONS)
def test_every_request_leaves_once_in_the_documented_order(actions):
    """Against a plain list that is sorted anew for every batch."""
    queue = BatchQueue[int](BatchLimits(4, 10, latest_wins=True))
    now = 0.0
    accepted: dict[int, Entry[int]] = {}
    waiting: dict[int, Entry[int]] = {}
    for number, (kind, value, priority, client_id) in enumerate(actions):
        if kind == "put":
            try:
                entry = queue.put(number, value, now, priority=priority, client_id=client_id)
            except QueueFullError:
                continue
            accepted[number] = entry
            if entry.replaced is not None:
                assert entry.replaced.client_id == client_id != ""
                del waiting[entry.replaced.item]
            waiting[number] = entry
            assert len({e.client_id for e in waiting.values()} - {""}) == sum(
                e.client_id != "" for e in waiting.values()
            )
        elif kind == "cancel" and value in accepted:
            assert queue.cancel(accepted[value]) == (waiting.pop(value, None) is not None)
        elif kind == "take":
            now += 0.1 * value
            expected: list[int] = []
            room = 4
            for entry in sorted(waiting.values(), key=lambda e: (e.since_s - 0.1 * e.priority, e.place)):
                if entry.rows > room:
                    break
                room -= entry.rows
                expected.append(entry.item)
            assert [entry.item for entry in queue.take(now).entries] == expected
            for item in expected:
                del waiting[item]
        assert queue.rows == sum(entry.rows for entry in waiting.values()) <= 10
        assert (queue.ready_at() is None) == (not waiting)


class TestHints:
    def full(self, *batches: tuple[int, float]) -> QueueFullError:
        queue = BatchQueue[str](BatchLimits(4, 8))
        for rows, seconds in batches:
            queue.computed(rows, seconds)
        queue.put("a", 4, now=0.0)
        queue.put("b", 2, now=0.0)
        with pytest.raises(QueueFullError) as caught:
            queue.put("c", 3, now=0.0)
        return caught.value

    def test_it_is_the_time_for_what_waits_at_the_recent_speed(self):
        error = self.full((4, 0.4), (2, 0.2))
        assert error.retry_after_s == pytest.approx(0.6)
        assert "try again in about 600 ms" in str(error)
        assert retry_after_ms(error) == 600
        assert retry_after_ms(self.full((4, 1e-9))) == 1

    def test_the_recent_counts_more(self):
        slow_then_fast = self.full(*[(4, 4.0)] * 50, *[(4, 0.4)] * 50)
        assert slow_then_fast.retry_after_s == pytest.approx(0.6, rel=0.1)

    def test_before_anything_was_computed_there_is_none(self):
        error = self.full()
        assert error.retry_after_s is None
        assert "about" not in str(error)
        assert retry_after_ms(error) is None

    def test_it_survives_the_wire(self):
        code, message = wire_status(self.full((1, 0.1)))
        back = error_from_status(code, message, 600)
        assert isinstance(back, QueueFullError)
        assert back.retry_after_s == 0.6
        assert isinstance(error_from_status("ABORTED", "x"), SupersededError)
