"""The requests of one bidirectional stream that are in flight, answered in the order of the requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Response = TypeVar("Response")


@dataclass(frozen=True)
class Submitted(Generic[Answer, Response]):
    """A request that was queued."""

    future: asyncio.Future[Answer]
    encode: Callable[[Answer], Response]
    """Makes the message for its answer."""


class OrderedStream(Generic[Request, Answer, Response]):
    """Submits requests as they come and gives their responses in order.

    Args:
        submit: queues a request.
        refuse: makes the message for a request that failed, in `submit` or later.
        window: requests that may be in flight; then the reader stops and the transport's flow control acts.
    """

    def __init__(
        self,
        submit: Callable[[Request], Submitted[Answer, Response]],
        refuse: Callable[[Request, Exception], Response],
        window: int,
    ) -> None:
        self._submit = submit
        self._refuse = refuse
        self._window = asyncio.Semaphore(window)
        # A request with what became of it; None ends the stream.
        self._pending: asyncio.Queue[tuple[Request, Submitted[Answer, Response] | Exception] | None]
        self._pending = asyncio.Queue()
        self._in_flight: asyncio.Future[Answer] | None = None
        self.ended_by_server = False

    async def read(self, requests: AsyncIterator[Request]) -> None:
        """Submit requests as they come."""
        try:
            async for request in requests:
                await self._window.acquire()
                self._pending.put_nowait((request, self._submitted(request)))
        finally:
            self._pending.put_nowait(None)

    def _submitted(self, request: Request) -> Submitted[Answer, Response] | Exception:
        try:
            return self._submit(request)
        except Exception as error:
            return error

    async def responses(self) -> AsyncIterator[Response]:
        """One per request, in the order of the requests."""
        while (item := await self._pending.get()) is not None:
            yield await self._response(*item)
            self._window.release()

    async def _response(self, request: Request, submitted: Submitted[Answer, Response] | Exception) -> Response:
        if isinstance(submitted, Exception):
            return self._refuse(request, submitted)
        self._in_flight = submitted.future
        try:
            return submitted.encode(await submitted.future)
        except Exception as error:
            return self._refuse(request, error)

    def end(self) -> None:
        """Answer what has been read, then stop."""
        self.ended_by_server = True
        self._pending.put_nowait(None)

    def cancel(self) -> None:
        """Nobody waits any more."""
        futures = [self._in_flight]
        while not self._pending.empty():
            item = self._pending.get_nowait()
            if item and isinstance(item[1], Submitted):
                futures.append(item[1].future)
        for future in futures:
            if future is not None and not future.cancel() and not future.cancelled():
                future.exception()  # marks it as seen
