"""Work in the background: results, errors and cancelled callers."""

from __future__ import annotations

import asyncio
import threading

import pytest

from rsm_serve.engine.background import in_thread
from tests.hang import HANG_S


class TestThreads:
    def test_results_and_errors_come_back(self):
        async def main():
            assert await in_thread(lambda: 3) == 3
            with pytest.raises(ZeroDivisionError):
                await in_thread(lambda: 1 / 0)

        asyncio.run(main())

    @pytest.mark.parametrize("loop_ends_first", [False, True])
    def test_a_result_is_abandoned_after_its_caller_was_cancelled(self, loop_ends_first):
        gate, let_go = threading.Event(), threading.Event()

        def work() -> int:
            assert gate.wait(HANG_S)
            return 7

        async def main():
            task = asyncio.create_task(in_thread(work, abandon=lambda value: let_go.set()))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            if not loop_ends_first:
                gate.set()
                while not let_go.is_set():
                    await asyncio.sleep(0.001)

        asyncio.run(main())
        gate.set()
        assert let_go.wait(HANG_S)
