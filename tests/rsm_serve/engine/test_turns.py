"""Turns: how many lanes compute at the same time, and in which order."""

from __future__ import annotations

import asyncio
import threading

import pytest

from rsm_common.errors import (
    DeadlineExpiredError,
)
from rsm_serve.engine.batcher import Batcher
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.engine.turns import Turns
from tests.hang import HANG_S
from tests.rsm_serve.test_server import wait_until

ONE_BY_ONE = BatchLimits(max_batch_size=1, max_queue_rows=8)


def wait_for_line(turns: Turns, length: int) -> None:
    wait_until(lambda: turns.waiting == length, f"{length} in line")


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
            assert lined_up.wait(HANG_S), "the first one computes until all are there"
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
                pair.wait(HANG_S)  # two are inside at once, or this would time out
                with lock:
                    running -= 1

        for _ in range(20):
            threads = [threading.Thread(target=work) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(HANG_S)
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
