"""The batcher, with real threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from rsm_common.errors import (
    BackendError,
    DeadlineExpiredError,
    NotReadyError,
    RequestError,
)
from rsm_serve.engine.batcher import Batcher
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.observe.settled import Answered
from tests.hang import HANG_S

SMALL = BatchLimits(max_batch_size=4, max_queue_rows=8)


class Gate:
    """A computation that waits until the test opens it, and records its batches."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)
        self.batches: list[list[int]] = []

    def __call__(self, requests: Sequence[int]) -> list[int | RequestError]:
        self.batches.append(list(requests))
        self.entered.release()
        assert self.open.wait(HANG_S)
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
            await asyncio.wait_for(batcher.drained(), HANG_S)

    asyncio.run(main())


async def entered(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.entered.acquire, True, HANG_S)


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
        await asyncio.wait_for(batcher.drained(), HANG_S)

    asyncio.run(main())
