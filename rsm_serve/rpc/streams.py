"""Bidirectional streams: the requests of one, answered in order, and all open streams of a service."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rsm_common.errors import InvalidRequestError, NotReadyError, RequestError
from rsm_serve.security.access import while_granted

STREAM_WINDOW = 64
"""Requests of one stream that may be in flight; then the server stops reading until one is answered."""
UNREADABLE = "wanted messages of the protocol, got one that cannot be read"
SHUTTING_DOWN = "the server is shutting down; connect to another, or again later"

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Response = TypeVar("Response")


@dataclass(eq=False, slots=True)
class Submitted(Generic[Answer, Response]):
    """A request that was queued."""

    future: asyncio.Future[Answer]
    encode: Callable[[Answer], Response]
    """Makes the message for its answer."""
    refuse: Callable[[Exception], Response]
    """Makes the message if it fails."""


@dataclass(eq=False, slots=True)
class _Refused(Generic[Response]):
    response: Response


class OrderedStream(Generic[Request, Answer, Response]):
    """Submits requests when they arrive, and yields their responses in the same order.

    Args:
        submit: queues a request.
        refuse: makes the message for a request that `submit` refuses.
        window: requests that may be in flight. A full window stops the reader, and the transport's flow control
            stops the caller.
    """

    def __init__(
        self,
        submit: Callable[[Request], Submitted[Answer, Response]],
        refuse: Callable[[Request, Exception], Response],
        window: int = STREAM_WINDOW,
    ) -> None:
        self._submit = submit
        self._refuse = refuse
        self._window = window
        # Queued requests, or the responses to refused ones, in order of arrival. The requests' messages are not
        # kept: each may have 16 MiB, and a caller may read no responses.
        self._pending: deque[Submitted[Answer, Response] | _Refused[Response]] = deque()
        # At most one side waits: the reader while the window is full, the writer while no request is pending.
        self._moved: asyncio.Future[None] | None = None
        self._read_all = False
        self.ended_by_server = False
        self.failure: RequestError | None = None
        """The error that ended the reading; None without one."""

    async def read(self, requests: AsyncIterator[Request]) -> None:
        """Submit requests when they arrive."""
        try:
            async for request in requests:
                while len(self._pending) >= self._window:
                    await self._move()
                if self.ended_by_server:
                    break
                self._pending.append(self._submitted(request))
                del request  # do not keep the message while waiting for the next
                self._wake()
        except RequestError as error:
            self.failure = error
        except Exception:
            self.failure = InvalidRequestError(UNREADABLE)
        finally:
            self._read_all = True
            self._wake()

    def _submitted(self, request: Request) -> Submitted[Answer, Response] | _Refused[Response]:
        try:
            return self._submit(request)
        except Exception as error:
            return _Refused(self._refuse(request, error))

    async def responses(self) -> AsyncIterator[Response]:
        """One per request, in the order of the requests."""
        while True:
            while not self._pending:
                if self._read_all or self.ended_by_server:
                    return
                await self._move()
            yield await self._response(self._pending[0])
            if self._pending:  # empty if the stream was cancelled
                self._pending.popleft()
            self._wake()

    @staticmethod
    async def _response(submitted: Submitted[Answer, Response] | _Refused[Response]) -> Response:
        if isinstance(submitted, _Refused):
            return submitted.response
        try:
            return submitted.encode(await submitted.future)
        except Exception as error:
            return submitted.refuse(error)

    def end(self) -> None:
        """Answer what has been read, then stop."""
        self.ended_by_server = True
        self._wake()

    def cancel(self) -> None:
        """Cancel what is in flight, because the call is over."""
        pending, self._pending = self._pending, deque()
        for submitted in pending:
            if isinstance(submitted, Submitted):
                future = submitted.future
                if not future.cancel() and not future.cancelled():
                    future.exception()  # marks it as seen

    async def _move(self) -> None:
        """Wait until the other side, reader or writer, has moved."""
        self._moved = asyncio.get_running_loop().create_future()
        await self._moved

    def _wake(self) -> None:
        if self._moved is not None:
            if not self._moved.done():
                self._moved.set_result(None)
            self._moved = None


class OpenStreams:
    """The open streams of a service, which end together when the server drains.

    Args:
        changed: called with +1 when a stream opens and -1 when it closes. An exception at +1 refuses it.
    """

    def __init__(self, changed: Callable[[int], None]) -> None:
        self._changed = changed
        self._streams: set[OrderedStream[Any, Any, Any]] = set()
        self.draining = False
        """True once `drain` was called; new streams end at once."""

    @asynccontextmanager
    async def open(
        self,
        stream: OrderedStream[Request, Any, Response],
        requests: AsyncIterator[Request],
        on_end: Callable[[Callable[[object], None]], None],
    ) -> AsyncIterator[AsyncIterator[Response]]:
        """The responses of a stream, until its caller or the server ends it.

        Args:
            stream: a new one.
            requests: the messages that it reads.
            on_end: registers a function that the transport calls when the call is over. The end of the block is
                not enough: gRPC drops a handler whose caller left, and Python closes its generator later.

        Raises:
            LimitReachedError: there are too many.
            NotReadyError: at the end of the block, if the server ended it.
            InvalidRequestError: at the end of the block, if a message could not be read.
            UnauthenticatedError: at the end of the block, if the caller's token was revoked.
        """
        self._changed(+1)
        if self.draining:
            stream.end()
        self._streams.add(stream)
        reader = asyncio.create_task(stream.read(while_granted(requests)))

        def close(_: object = None) -> None:
            if stream in self._streams:
                self._streams.discard(stream)
                self._changed(-1)
                reader.cancel()
                stream.cancel()

        on_end(close)
        try:
            yield stream.responses()
            if stream.ended_by_server:
                raise NotReadyError(SHUTTING_DOWN)
            if stream.failure is not None:
                raise stream.failure
        finally:
            close()

    def drain(self) -> None:
        """Answer what is in flight, then end the open streams."""
        self.draining = True
        for stream in self._streams:
            stream.end()
