"""Bidirectional streams: requests in flight, answered in their order, and all streams of a service together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rsm_serve.errors import InvalidRequestError, NotReadyError

STREAM_WINDOW = 64
"""Requests of one stream that may be in flight; then the server stops reading and flow control acts."""
UNREADABLE = "wanted messages of the protocol, got one that cannot be read"
SHUTTING_DOWN = "the server is shutting down; connect to another, or again later"

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
        window: int = STREAM_WINDOW,
    ) -> None:
        self._submit = submit
        self._refuse = refuse
        self._window = asyncio.Semaphore(window)
        # A request with what became of it; None ends the stream.
        self._pending: asyncio.Queue[tuple[Request, Submitted[Answer, Response] | Exception] | None]
        self._pending = asyncio.Queue()
        self._in_flight: asyncio.Future[Answer] | None = None
        self.ended_by_server = False
        self.unreadable = False
        """A message came that is none of the protocol's; nothing can be read behind it."""

    async def read(self, requests: AsyncIterator[Request]) -> None:
        """Submit requests as they come."""
        try:
            async for request in requests:
                await self._window.acquire()
                self._pending.put_nowait((request, self._submitted(request)))
        except Exception:
            self.unreadable = True
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


class OpenStreams:
    """The open streams of a service, which end together when the server drains.

    Args:
        changed: told +1 when a stream opens and -1 when it closes.
    """

    def __init__(self, changed: Callable[[int], None]) -> None:
        self._changed = changed
        self._streams: set[OrderedStream[Any, Any, Any]] = set()
        self._draining = False

    async def responses(
        self, stream: OrderedStream[Request, Any, Response], requests: AsyncIterator[Request]
    ) -> AsyncIterator[Response]:
        """The responses of a stream, until its caller or the server ends it.

        Raises:
            NotReadyError: the server ended it.
            InvalidRequestError: a message could not be read.
        """
        if self._draining:
            stream.end()
        self._streams.add(stream)
        self._changed(+1)
        reader = asyncio.create_task(stream.read(requests))
        try:
            async for response in stream.responses():
                yield response
            if stream.ended_by_server:
                raise NotReadyError(SHUTTING_DOWN)
            if stream.unreadable:
                raise InvalidRequestError(UNREADABLE)
        finally:
            self._streams.discard(stream)
            self._changed(-1)
            reader.cancel()
            stream.cancel()

    def drain(self) -> None:
        """Answer what is in flight, then end the open streams."""
        self._draining = True
        for stream in self._streams:
            stream.end()
