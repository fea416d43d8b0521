"""Work beside the event loop: functions in threads of their own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LOADER = "rsm-serve-loader"
"""Name of the threads that load, look and close."""


async def in_thread(function: Callable[[], T], abandon: Callable[[T], object] | None = None) -> T:
    """Run a function in a thread of its own, which does not keep the process from exiting.

    Args:
        function: what to run.
        abandon: given the result if, when it comes, nobody waits for it any more.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T) -> None:
        if not future.done():
            future.set_result(result)
        elif abandon is not None:
            abandon(result)

    def fail(error: BaseException) -> None:
        if not future.done():
            future.set_exception(error)

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(fail, error)
            return
        try:
            loop.call_soon_threadsafe(deliver, result)
        except RuntimeError:
            if abandon is not None:
                abandon(result)

    threading.Thread(target=run, name=LOADER, daemon=True).start()
    try:
        return await future
    except Exception:
        # It is settled. Its exception has this frame, which has it: a circle that would keep what a load that
        # failed has read, until the collector comes by.
        del future
        raise
