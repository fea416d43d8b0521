"""The asyncio client of `rsm.v1.PolicyService`."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsm_common.policy import ActResult, Seed
from rsm_common.spec import PolicySpec
from rsm_serve.client.call import Attempts, Call, Client
from rsm_serve.client.connection import methods
from rsm_serve.client.failure import too_late
from rsm_serve.pb import policy_pb2 as pb


class AsyncPolicyClient(Client):
    """`PolicyClient` for asyncio: the same arguments, errors and answers, awaited.

        async with AsyncPolicyClient("127.0.0.1:8001", policy="pendulum") as policy:
            action = (await policy.act(obs)).action

    Takes the arguments of `Client`. Belongs to the event loop that enters it.
    """

    _channel: Any = None

    async def connect(self) -> AsyncPolicyClient:
        """Fetch the specification; entering the client does it too.

        Raises:
            NotReadyError, DeadlineExpiredError, UnauthenticatedError, PolicyNotFoundError: see `PolicyClient`.
        """
        self._channel = self._connection.aio_channel()
        get_spec, self._act, self._act_stream = methods(self._channel, self._connection.metadata)
        attempts = Attempts(self._connection, self._connect_timeout_s)
        try:
            connected = False
            while not connected:
                try:
                    self._take(await get_spec(self._spec_request(), timeout=attempts.left_s))
                    connected = True
                except grpc.RpcError as error:
                    # In a thread, because it may ask for the server's certificate.
                    await asyncio.sleep(await asyncio.to_thread(attempts.failed, error))
        except BaseException:
            await self.close()
            raise
        return self

    async def act(
        self,
        obs: ArrayLike,
        *,
        seed: Seed = None,
        noise: NDArray[np.float32] | None = None,
        deterministic: bool = False,
        client_id: str | None = None,
    ) -> ActResult:
        """Sample actions; arguments and errors as `PolicyClient.act`. Cancelling it cancels the request."""
        started = time.perf_counter()
        rows, request = self._call.request(obs, seed, noise, deterministic, client_id)
        try:
            response = await self._act(request, timeout=self.timeout_s)
        except grpc.RpcError as error:
            raise self._call.failed(error, self.timeout_s) from None
        return self._call.result(rows, request, response, started)

    def stream(self, *, timeout_s: float | None = None) -> AsyncPolicyStream:
        """A stream to the policy, for a control loop; see `PolicyClient.stream`."""
        return AsyncPolicyStream(self._call, self._act_stream, self._limit_s(timeout_s))

    async def close(self) -> None:
        """Close the connection; later calls raise NotReadyError."""
        self._let_go()
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> AsyncPolicyClient:
        return await self.connect()

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncPolicyStream:
    """`PolicyStream` for asyncio; one step at a time."""

    def __init__(self, call: Call, open_stream: Callable[[], Any], timeout_s: float) -> None:
        self._call = call
        self._open_stream = open_stream
        self._timeout_s = timeout_s
        self._stream: Any = None
        self._closed = False

    @property
    def spec(self) -> PolicySpec:
        """What the policy takes and gives."""
        return self._call.spec

    async def act(
        self,
        obs: ArrayLike,
        *,
        seed: Seed = None,
        noise: NDArray[np.float32] | None = None,
        deterministic: bool = False,
    ) -> ActResult:
        """Sample actions for one control step; arguments and errors as `PolicyClient.act`."""
        started = time.perf_counter()
        rows, request = self._call.request(obs, seed, noise, deterministic)
        if self._closed:
            raise self._call.stream_closed()
        if self._stream is None:
            self._stream = self._open_stream()
        try:
            response = await _within(self._timeout_s, self._step(self._stream, request))
        except BaseException as error:
            self._drop()  # also when cancelled: the next step must not read the answer that is under way
            if isinstance(error, asyncio.TimeoutError):
                raise too_late(self._call.target, self._timeout_s) from None
            if isinstance(error, grpc.RpcError):
                raise self._call.failed(error, self._timeout_s) from None
            raise
        return self._call.result(rows, request, response, started)

    async def _step(self, stream: Any, request: pb.ActRequest) -> pb.ActResponse:
        import grpc.aio

        # A stream that the server ended since the last step takes nothing, and says why when it is read.
        with contextlib.suppress(asyncio.InvalidStateError):
            await stream.write(request)
        response = await stream.read()
        if response is grpc.aio.EOF:
            raise self._call.stream_ended()
        assert isinstance(response, pb.ActResponse)
        return response

    async def close(self) -> None:
        """End the stream; the client stays open."""
        self._closed = True
        self._drop()

    async def __aenter__(self) -> AsyncPolicyStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _drop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.cancel()


async def _within(timeout_s: float, step: Coroutine[Any, Any, pb.ActResponse]) -> pb.ActResponse:
    """The step's result.

    Raises:
        asyncio.TimeoutError: it took too long, and was cancelled.
    """
    if sys.version_info >= (3, 11):
        async with asyncio.timeout(timeout_s):  # wait_for would start a task for every step
            return await step
    else:
        return await asyncio.wait_for(step, timeout_s)
