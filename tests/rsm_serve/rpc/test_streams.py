"""Streams without a transport."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any

from rsm_common.errors import InvalidRequestError
from rsm_serve.rpc.streams import OpenStreams, OrderedStream, Submitted


async def silent() -> AsyncIterator[Any]:
    """A caller that says nothing."""
    await asyncio.Event().wait()
    yield


def test_a_stream_whose_handler_is_dropped_is_closed_when_the_call_ends():
    """gRPC may drop a handler's generator; nobody then ends the block that the stream is open in."""

    async def main() -> None:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        changes: list[int] = []
        ends: list[Any] = []
        stream: OrderedStream[str, int, int] = OrderedStream(
            lambda request: Submitted(future, int, lambda error: -1), lambda request, error: -1
        )

        async def one_request() -> AsyncIterator[str]:
            yield "act"
            await asyncio.Event().wait()

        block = OpenStreams(changes.append).open(stream, one_request(), ends.append)
        await block.__aenter__()
        await asyncio.sleep(0)
        assert changes == [1]
        ends[0]("the context")
        assert changes == [1, -1]
        assert future.cancelled(), "nobody waits for its answer"
        await block.__aexit__(None, None, None)
        assert changes == [1, -1], "it is closed once"

    asyncio.run(main())


def test_a_stream_is_closed_at_the_end_of_its_block():
    async def main() -> None:
        changes: list[int] = []
        stream: OrderedStream[str, int, int] = OrderedStream(
            lambda request: Submitted(asyncio.get_running_loop().create_future(), int, lambda error: -1),
            lambda request, error: -1,
        )
        async with OpenStreams(changes.append).open(stream, silent(), lambda close: None):
            assert changes == [1]
        assert changes == [1, -1]

    asyncio.run(main())


def test_what_comes_after_the_end_is_not_submitted():
    async def main() -> None:
        more = asyncio.Event()
        submitted: list[str] = []
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def requests() -> AsyncIterator[str]:
            yield "before"
            await more.wait()
            yield "after"

        def submit(request: str) -> Submitted[int, int]:
            submitted.append(request)
            return Submitted(answer, int, lambda error: -1)

        stream: OrderedStream[str, int, int] = OrderedStream(submit, lambda request, error: -1)
        reader = asyncio.create_task(stream.read(requests()))
        await asyncio.sleep(0)
        stream.end()
        more.set()
        answer.set_result(7)
        await reader
        assert [response async for response in stream.responses()] == [7]
        assert submitted == ["before"]

    asyncio.run(main())


def test_a_stream_keeps_no_request():
    """Of refused ones neither: they may have 16 MiB each, and wait for a caller that reads nothing."""

    class Request:
        pass

    async def main() -> None:
        kept: list[weakref.ref[Request]] = []
        futures: list[asyncio.Future[int]] = []

        async def requests() -> AsyncIterator[Request]:
            for _ in range(6):
                request = Request()
                kept.append(weakref.ref(request))
                yield request
                del request

        def submit(request: Request) -> Submitted[int, int]:
            if len(kept) % 2:
                raise InvalidRequestError("no")
            futures.append(asyncio.get_running_loop().create_future())
            return Submitted(futures[-1], int, lambda error: -2)

        stream: OrderedStream[Request, int, int] = OrderedStream(submit, lambda request, error: -1)
        await stream.read(requests())
        gc.collect()
        assert [one() for one in kept] == [None] * 6
        for number, future in enumerate(futures[:-1]):
            future.set_result(number)
        futures[-1].set_exception(InvalidRequestError("late"))
        assert [response async for response in stream.responses()] == [-1, 0, -1, 1, -1, -2]

    asyncio.run(main())
