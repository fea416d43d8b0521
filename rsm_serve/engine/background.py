"""Work in the background of an event loop: functions in threads of their own, and tasks that end together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOADER = "rsm-serve-loader"
"""Name of the threads that load policies, look at the repository and close sessions."""


async def in_thread(function: Callable[[], T], abandon: Callable[[T], object] | None = None) -> T:
    """Run a function in a thread of its own, which does not keep the process from exiting.

    Args:
        function: what to run.
        abandon: called with the result if the caller was cancelled before the function returned.
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
        # The exception refers to this frame, and this frame to the future, which has the exception: a circle
        # that would keep the files of a failed load in memory until the garbage collector runs.
        del future
        raise


class Tasks:
    """The tasks of one object in one event loop, which are cancelled together."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a task; an exception that ends it is logged."""
        self._add(work, self._log)

    async def finish(self, work: Coroutine[Any, Any, None]) -> bool:
        """Await work that goes on if the caller is cancelled; return False if `cancel` ended it."""
        task = self._add(work, self._discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
            return False
        return True

    async def cancel(self) -> None:
        """Cancel all tasks and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _add(
        self, work: Coroutine[Any, Any, None], done: Callable[[asyncio.Task[None]], None]
    ) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(done)
        return task

    def _discard(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as seen: the caller has it, or was cancelled

    def _log(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("work in the background failed", exc_info=task.exception())
