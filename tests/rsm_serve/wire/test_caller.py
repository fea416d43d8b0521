"""Who goes first: priorities, the newest of a client, hints for those that are shed, turns among lanes."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsm_common.errors import (
    DeadlineExpiredError,
    InvalidRequestError,
    QueueFullError,
    SupersededError,
    error_from_status,
    retry_after_ms,
    wire_status,
)
from rsm_serve.bundle.contract import load_bundle
from rsm_serve.client import AsyncPolicyClient, PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.engine.batcher import Batcher
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.queue import BatchLimits, BatchQueue, Entry
from rsm_serve.engine.turns import Turns
from rsm_serve.local import LocalPolicy
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.server import background_server
from rsm_serve.sessions.choice import open_session
from rsm_serve.wire.caller import MAX_PRIORITY, PRIORITY_STEP_S, check_priority
from tests.rsm_serve.test_server import ANY_PORT, ZEROS, Gated, Rig, raw_stub, wait_until

ONE_BY_ONE = BatchLimits(max_batch_size=1, max_queue_rows=8)
LATEST = BatchLimits(max_batch_size=4, max_queue_rows=8, latest_wins=True)


def wait_for_line(turns: Turns, length: int) -> None:
    wait_until(lambda: turns.waiting == length, f"{length} in line")


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

    def test_nobody_starves(self):
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

    def test_without_a_name_or_the_option_nobody_is_replaced(self):
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


class TestTurns:
    def test_lanes_with_work_go_round_robin_however_much_waits_in_one(self):
        order: list[str] = []
        turns = Turns(1)
        left = {"a": 6, "b": 2, "c": 2}
        lined_up = threading.Event()

        def compute(requests):
            item = requests[0]
            order.append(item)
            left[item] -= 1
            assert lined_up.wait(30), "the first one computes until all are there"
            # It takes as long as the others with work need to stand in line.
            others = sum(count > 0 for other, count in left.items() if other != item)
            wait_for_line(turns, others)
            return list(requests)

        async def main():
            lanes = {item: Batcher[str, str](compute, ONE_BY_ONE, turns=turns) for item in left}
            for lane in lanes.values():
                lane.start()
            futures = [lanes["a"].put("a", 1) for _ in range(6)]
            await asyncio.to_thread(wait_until, lambda: bool(order), "the first to compute")
            for item in ("b", "c"):
                length = turns.waiting + 1
                futures += [lanes[item].put(item, 1) for _ in range(2)]
                await asyncio.to_thread(wait_for_line, turns, length)
            lined_up.set()
            await asyncio.gather(*futures)
            for lane in lanes.values():
                lane.close()
                await lane.drained()

        asyncio.run(main())
        assert "".join(order) == "abcabcaaaa"
        assert turns.waiting == 0

    def test_no_more_compute_at_once_than_there_are_turns(self):
        turns, lock, pair = Turns(2), threading.Lock(), threading.Barrier(2)
        running, most = 0, 0

        def work():
            nonlocal running, most
            with turns:
                with lock:
                    running += 1
                    most = max(most, running)
                pair.wait(30)  # two are inside at once, or this would time out
                with lock:
                    running -= 1

        for _ in range(20):
            threads = [threading.Thread(target=work) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        assert most == 2

    def test_what_expires_in_line_for_a_turn_is_not_computed(self):
        turns = Turns(1)
        computed: list[int] = []

        def compute(requests):
            computed.extend(requests)
            return list(requests)

        async def main():
            now = [0.0]
            batcher = Batcher[int, int](compute, ONE_BY_ONE, clock=lambda: now[0], turns=turns)
            batcher.start()
            with turns:
                late = batcher.put(1, 1, timeout_s=1.0)
                gone = batcher.put(2, 1)
                await asyncio.to_thread(wait_for_line, turns, 1)
                now[0] = 2.0
                gone.cancel()
                await asyncio.sleep(0)
            with pytest.raises(DeadlineExpiredError):
                await late
            assert (await batcher.put(3, 1)).answer == 3
            batcher.close()
            await batcher.drained()

        asyncio.run(main())
        assert computed == [3]


@pytest.fixture
def rig(bundle_repo):
    """As in test_server, with latest-wins."""
    bundle = load_bundle(bundle_repo / "tiny")
    session = Gated(open_session(bundle, "onnxruntime"))
    lane = Lane(LocalPolicy(bundle, session), BatchLimits(4, 8, latest_wins=True))
    config = ServerConfig.from_options(repo=bundle_repo, addresses=ANY_PORT, drain_seconds=30)
    with background_server(config, [lane]) as server:
        rig = Rig(server, session, lane)
        try:
            yield rig
        finally:
            rig.open()
            rig.pool.shutdown()


class TestThroughTheServer:
    def test_a_clients_newer_request_supersedes_its_waiting_one(self, rig):
        with (
            PolicyClient(rig.address, timeout_s=60) as other,
            PolicyClient(rig.address, timeout_s=60, client_id="r2") as robot,
        ):
            first = rig.hold_worker(other)
            unary = rig.pool.submit(robot.act, np.zeros(4), seed=1)
            rig.wait_queued(1)
            stream = robot.stream()
            older = rig.pool.submit(stream.act, np.zeros((2, 4)), seed=2)
            with pytest.raises(SupersededError, match="newer request of this client_id"):
                unary.result(30)
            rig.wait_queued(2)
            newer = rig.pool.submit(robot.act, np.zeros((3, 4)), seed=3)
            with pytest.raises(SupersededError):
                older.result(30)
            rig.open()
            assert first.result(30).action.shape == (2,)
            assert newer.result(30).action.shape == (3, 2)
            assert stream.act(np.zeros(4)).action.shape == (2,), "the stream goes on"
            stream.close()
        assert rig.session.batches == [1, 3, 1]

    def test_priority_decides_what_is_computed_next(self, rig):
        with (
            PolicyClient(rig.address, timeout_s=60) as usual,
            PolicyClient(rig.address, timeout_s=60, priority=3) as urgent,
        ):
            first = rig.hold_worker(usual)
            second = rig.pool.submit(usual.act, np.zeros((3, 4)))
            rig.wait_queued(3)
            third = rig.pool.submit(urgent.act, np.zeros((4, 4)))
            rig.wait_queued(7)
            rig.open()
            for future in (first, second, third):
                future.result(30)
        assert rig.session.batches == [1, 4, 3]

    def test_the_hint_reaches_the_client_alone_and_in_a_stream(self, rig):
        with PolicyClient(rig.address, timeout_s=60) as client:
            client.act(np.zeros(4))
            first = rig.hold_worker(client)
            others = [rig.pool.submit(client.act, np.zeros((4, 4))) for _ in range(2)]
            rig.wait_queued(8)
            with client.stream() as stream:
                for act in (client.act, stream.act):
                    with pytest.raises(QueueFullError, match="8 of at most 8.*try again in about") as caught:
                        act(np.zeros(4))
                    assert (caught.value.retry_after_s or 0) >= 0.001
            rig.open()
            for future in (first, *others):
                future.result(30)

    def test_what_a_request_says_of_itself_is_checked_on_both_sides(self, rig):
        for arguments in ({"client_id": "x" * 129}, {"client_id": "é" * 65}, {"priority": 11}):
            with pytest.raises(InvalidRequestError, match="wanted a"):
                PolicyClient(rig.address, **arguments)
            with pytest.raises(InvalidRequestError, match="wanted a"):
                AsyncPolicyClient(rig.address, **arguments)
            with raw_stub(rig.address) as stub:
                (answer,) = stub.ActStream(iter([pb.ActRequest(rows=1, obs=ZEROS, **arguments)]), timeout=30)
            assert answer.error.code == "INVALID_ARGUMENT"

    def test_the_asynchronous_client_says_it_too(self, rig):
        async def main():
            async with (
                AsyncPolicyClient(rig.address, timeout_s=60, client_id="r") as robot,
                AsyncPolicyClient(rig.address, timeout_s=60) as other,
            ):
                rig.shut()
                first = asyncio.create_task(other.act(np.zeros(4)))
                assert await asyncio.to_thread(rig.session.entered.acquire, True, 30)
                older = asyncio.create_task(robot.act(np.zeros(4)))
                await asyncio.to_thread(rig.wait_queued, 1)
                async with robot.stream() as stream:
                    newer = asyncio.create_task(stream.act(np.zeros(4)))
                    with pytest.raises(SupersededError):
                        await older
                    rig.open()
                    await asyncio.gather(first, newer)

        asyncio.run(main())
