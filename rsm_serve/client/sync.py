"""Clients of `rsm.v1.PolicyService`: a remote policy is a `Policy` like any other.

    with PolicyClient("127.0.0.1:8001", policy="pendulum") as policy:
        action = policy.act(obs).action

Needs only numpy, grpcio and protobuf. Every call has a deadline, and none is retried: for a control loop
a late action is worse than an error. Create clients after fork, not before.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsm_common.errors import InvalidRequestError, NotReadyError, RequestError
from rsm_common.policy import ActResult, ActRows, Seed, act_rows
from rsm_common.spec import PolicySpec, check_env
from rsm_serve.client.connection import Connection, Target, Tls, methods
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.wire.caller import check_client_id, check_priority
from rsm_serve.wire.codec import decode_response, encode_request

CONNECT_TIMEOUT_S = 5.0
MAX_TIMEOUT_S = 86_400
"""A day, the longest deadline: somewhere beyond, the timers of gRPC and Python overflow."""


class PolicyClient:
    """A policy on a server, as a `Policy`; connects when constructed, and may be used from several threads.

    Args:
        address: 'host:port', 'unix:/path', or 'grpc://host:port/NAME[:VERSION]'; 'grpcs://...' for TLS.
        policy: its name; may be left out if the server has exactly one.
        version: a number; None for the current one.
        timeout_s: deadline of every call; at most a day, as every timeout here.
        connect_timeout_s: deadline of the first call, which fetches the specification.
        client_id: who asks, a name of this robot alone; while canaries run, it always meets the same version,
            and a server that limits how far an action moves per step counts from this robot's last one.
        priority: from -10 to 10; requests of higher priority go first.
        tls: how to trust the server, and the client's own certificate; None: for grpcs:// what RSM_TLS_CA,
            RSM_TLS_CERT and RSM_TLS_KEY say, else plaintext.
        token: for a server with --act-token-file; None: what RSM_TOKEN says, if anything.

    Raises:
        InvalidRequestError: an argument is out of range.
        UnauthenticatedError: the server does not know the token, or its certificate is not to be trusted.
        NotReadyError: no server answers at the address, or it is shutting down.
        PolicyNotFoundError: no such policy or version.
    """

    def __init__(
        self,
        address: str,
        policy: str | None = None,
        version: int | str | None = None,
        *,
        timeout_s: float = 1.0,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        client_id: str = "",
        priority: int = 0,
        tls: Tls | None = None,
        token: str | None = None,
    ) -> None:
        self.target = Target.parse(address, policy, version)
        self._connection = Connection.to(self.target, tls, token)
        self.timeout_s = _positive(timeout_s)
        _positive(connect_timeout_s, "connect_timeout_s")
        self.client_id = check_client_id(client_id)
        self.priority = check_priority(priority)
        self._connected: _Call | None = None
        self._channel = self._connection.channel()
        get_spec, self._act, self._act_stream = methods(self._channel, self._connection)
        request = pb.GetSpecRequest(policy=self.target.policy, version=self.target.version)
        try:
            info = get_spec(request, timeout=connect_timeout_s)
        except grpc.RpcError as error:
            self.close()
            raise self._connection.error(error, connect_timeout_s) from None
        self._call = self._connected = _Call(
            self._connection, PolicySpec.from_json(info.spec_json), self.client_id, self.priority
        )
        self.max_batch_size: int = info.max_batch_size
        """Most rows that one call may carry."""
        self.server_version: str = info.server_version

    @property
    def spec(self) -> PolicySpec:
        """What the policy takes and gives, fetched on connecting."""
        return self._call.spec

    def act(
        self,
        obs: ArrayLike,
        *,
        seed: Seed = None,
        noise: NDArray[np.float32] | None = None,
        deterministic: bool = False,
        client_id: str | None = None,
    ) -> ActResult:
        """Sample actions; see `rsm_common.policy.Policy.act`.

        `client_id` says who asks this time, for a caller that asks for several; None: the client itself.

        Raises:
            InvalidRequestError: wrong shape, dtype or count, or NaN or Inf.
            DeadlineExpiredError: no answer within `timeout_s`.
            NotReadyError: no server answers, or it is shutting down.
            QueueFullError: the server sheds load; its `retry_after_s` says when to try again.
            SupersededError: the server has --latest-wins, and a newer request of this `client_id` came.
            BackendError: the policy failed.
        """
        started = time.perf_counter()
        rows, request = self._call.request(obs, seed, noise, deterministic, client_id)
        try:
            response = self._act(request, timeout=self.timeout_s)
        except grpc.RpcError as error:
            raise self._connection.error(error, self.timeout_s) from None
        return self._call.result(rows, request, response, started)

    def stream(self, *, timeout_s: float | None = None) -> PolicyStream:
        """A stream to the policy, for a control loop: less overhead per step than `act`.

        Args:
            timeout_s: deadline of every step; None for the client's.

        Raises:
            InvalidRequestError: `timeout_s` is out of range.
        """
        limit_s = self.timeout_s if timeout_s is None else _positive(timeout_s)
        return PolicyStream(self._call, self._act_stream, limit_s)

    def check_env(self, env: object) -> None:
        """Make sure that policy and environment belong together; see `rsm_common.policy.check_env`.

        Raises:
            UnsupportedEnvError: they do not.
        """
        check_env(self.spec, env)

    def close(self) -> None:
        """Close the connection; later calls raise NotReadyError."""
        if self._connected is not None:
            self._connected.closed = True
        self._channel.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PolicyStream:
    """One step after the other over one bidirectional stream; a `Policy` for one thread.

    After an expired deadline or a lost connection the next step opens a new stream: nothing is kept on
    the server between steps, and an answer that came too late is never taken for a later step's.
    """

    def __init__(
        self, call: _Call, open_stream: Callable[[Iterator[pb.ActRequest]], Any], timeout_s: float
    ) -> None:
        self._call = call
        self._open_stream = open_stream
        self._timeout_s = timeout_s
        self._requests: queue.SimpleQueue[pb.ActRequest | None] = queue.SimpleQueue()
        self._responses: Any = None
        self._closed = False
        self._watchdog = _Watchdog()

    @property
    def spec(self) -> PolicySpec:
        """What the policy takes and gives."""
        return self._call.spec

    def act(
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
            raise NotReadyError(f"the stream to {self._call.target} was closed here; open another")
        if self._responses is None:
            self._open()
        self._watchdog.arm(self._responses, self._timeout_s)
        try:
            self._requests.put(request)
            response = next(self._responses)
        except BaseException as error:
            expired = self._watchdog.disarm()
            self._drop()  # also when interrupted: the answer that is under way belongs to nobody
            if expired:
                raise self._call.connection.too_late(self._timeout_s) from None
            if isinstance(error, StopIteration):
                raise NotReadyError(
                    f"the server at {self._call.target} ended the stream; connect again"
                ) from None
            if isinstance(error, grpc.RpcError):
                raise self._call.connection.error(error, self._timeout_s) from None
            raise
        if self._watchdog.disarm():
            self._drop()  # cancelled just as the answer came: the answer is good, the stream is not
        return self._call.result(rows, request, response, started)

    def close(self) -> None:
        """End the stream; the client stays open."""
        self._closed = True
        self._drop()
        self._watchdog.close()

    def __enter__(self) -> PolicyStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        self._requests = queue.SimpleQueue()
        self._responses = self._open_stream(iter(self._requests.get, None))

    def _drop(self) -> None:
        self._requests.put(None)  # lets gRPC's sending thread end
        if self._responses is not None:
            self._responses.cancel()
            self._responses = None


class _Watchdog:
    """Cancels a call that is not disarmed in time.

    Blocking reads of a gRPC stream take no timeout. The thread sleeps until the earliest moment at which
    something can be due, so that in a control loop it wakes about once per timeout, not once per step.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._call: Any = None
        self._due_s = 0.0
        self._wakes_at_s: float | None = None
        self._expired = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def arm(self, call: Any, timeout_s: float) -> None:
        """Cancel the call in `timeout_s` seconds."""
        with self._changed:
            self._call, self._expired = call, False
            self._due_s = time.monotonic() + timeout_s
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="rsm-client-deadline", daemon=True)
                self._thread.start()
            elif self._wakes_at_s is None or self._due_s < self._wakes_at_s:
                self._changed.notify()

    def disarm(self) -> bool:
        """Let the call be; whether it was cancelled."""
        with self._changed:
            self._call = None
            return self._expired

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                if self._call is None:
                    self._wakes_at_s = None
                    self._changed.wait()
                elif self._due_s > now:
                    self._wakes_at_s = self._due_s
                    self._changed.wait(self._due_s - now)
                else:
                    self._expired = True
                    self._call.cancel()
                    self._call = None


class AsyncPolicyClient:
    """`PolicyClient` for asyncio: the same arguments, errors and answers, awaited.

    async with AsyncPolicyClient("127.0.0.1:8001", policy="pendulum") as policy:
        action = (await policy.act(obs)).action

    Belongs to the event loop that enters it.
    """

    def __init__(
        self,
        address: str,
        policy: str | None = None,
        version: int | str | None = None,
        *,
        timeout_s: float = 1.0,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        client_id: str = "",
        priority: int = 0,
        tls: Tls | None = None,
        token: str | None = None,
    ) -> None:
        self.target = Target.parse(address, policy, version)
        self._connection = Connection.to(self.target, tls, token)
        self.timeout_s = _positive(timeout_s)
        self.client_id = check_client_id(client_id)
        self.priority = check_priority(priority)
        self._connect_timeout_s = _positive(connect_timeout_s, "connect_timeout_s")
        self._channel: Any = None
        self._connected: _Call | None = None
        self.max_batch_size = 0
        self.server_version = ""

    async def connect(self) -> AsyncPolicyClient:
        """Fetch the specification; entering the client does it too.

        Raises:
            NotReadyError: no server answers at the address, or it is shutting down.
            PolicyNotFoundError: no such policy or version.
        """
        self._channel = self._connection.aio_channel()
        get_spec, self._act, self._act_stream = methods(self._channel, self._connection)
        request = pb.GetSpecRequest(policy=self.target.policy, version=self.target.version)
        try:
            info = await get_spec(request, timeout=self._connect_timeout_s)
        except grpc.RpcError as error:
            await self.close()
            raise self._connection.error(error, self._connect_timeout_s) from None
        self._connected = _Call(
            self._connection, PolicySpec.from_json(info.spec_json), self.client_id, self.priority
        )
        self.max_batch_size = info.max_batch_size
        self.server_version = info.server_version
        return self

    @property
    def spec(self) -> PolicySpec:
        """What the policy takes and gives, fetched on connecting."""
        return self._call.spec

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
            raise self._connection.error(error, self.timeout_s) from None
        return self._call.result(rows, request, response, started)

    def stream(self, *, timeout_s: float | None = None) -> AsyncPolicyStream:
        """A stream to the policy, for a control loop; see `PolicyClient.stream`."""
        limit_s = self.timeout_s if timeout_s is None else _positive(timeout_s)
        return AsyncPolicyStream(self._call, self._act_stream, limit_s)

    def check_env(self, env: object) -> None:
        """Make sure that policy and environment belong together; see `rsm_common.policy.check_env`."""
        check_env(self.spec, env)

    async def close(self) -> None:
        """Close the connection."""
        if self._connected is not None:
            self._connected.closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> AsyncPolicyClient:
        return await self.connect()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def _call(self) -> _Call:
        if self._connected is None:
            raise NotReadyError(
                f"the client of {self.target} is not connected; use 'async with' or await connect() first"
            )
        return self._connected


class AsyncPolicyStream:
    """`PolicyStream` for asyncio; one step at a time."""

    def __init__(self, call: _Call, open_stream: Callable[[], Any], timeout_s: float) -> None:
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
            raise NotReadyError(f"the stream to {self._call.target} was closed here; open another")
        if self._stream is None:
            self._stream = self._open_stream()
        try:
            response = await _within(self._timeout_s, self._step(self._stream, request))
        except BaseException as error:
            self._drop()  # also when cancelled: the answer that is under way belongs to nobody
            if isinstance(error, asyncio.TimeoutError):
                raise self._call.connection.too_late(self._timeout_s) from None
            if isinstance(error, grpc.RpcError):
                raise self._call.connection.error(error, self._timeout_s) from None
            raise
        return self._call.result(rows, request, response, started)

    async def _step(self, stream: Any, request: pb.ActRequest) -> pb.ActResponse:
        import grpc.aio

        # A stream that the server ended since the last step takes nothing, and says why when it is read.
        with contextlib.suppress(asyncio.InvalidStateError):
            await stream.write(request)
        response = await stream.read()
        if response is grpc.aio.EOF:
            raise NotReadyError(f"the server at {self._call.target} ended the stream; connect again")
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


_HEALTH_STATES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")


def check_health(address: str, policy: str = "", *, timeout_s: float = 1.0, tls: Tls | None = None) -> str:
    """Ask `grpc.health.v1.Health/Check`, which needs no token.

    Args:
        address: as for `PolicyClient`.
        policy: empty for the whole server.
        timeout_s: how long to wait.
        tls: as for `PolicyClient`.

    Returns:
        "SERVING", "NOT_SERVING", "UNKNOWN", or "SERVICE_UNKNOWN" if there is no such policy.

    Raises:
        InvalidRequestError: an argument is out of range.
        UnauthenticatedError: the server's certificate is not to be trusted.
        NotReadyError: no server answers.
        DeadlineExpiredError: none within `timeout_s`.
    """
    _positive(timeout_s)
    target = Target.parse(address, policy)
    name = target.policy.encode()
    if len(name) > 127:
        raise InvalidRequestError(f"wanted a policy name of at most 127 bytes, got {len(name)}")
    # Two messages of one field each (string service = 1; enum status = 1), written out, because the
    # package with the generated code is not part of the base install.
    request = b"\x0a" + bytes([len(name)]) + name if name else b""
    connection = Connection.to(target, tls, token="")
    with connection.channel() as channel:
        try:
            response: bytes = channel.unary_unary("/grpc.health.v1.Health/Check")(request, timeout=timeout_s)
        except grpc.RpcError as error:
            if getattr(error, "code", lambda: None)() is grpc.StatusCode.NOT_FOUND:
                return "SERVICE_UNKNOWN"
            raise connection.error(error, timeout_s) from None
    state = response[1] if len(response) >= 2 and response[0] == 0x08 else 0
    return _HEALTH_STATES[state] if state < len(_HEALTH_STATES) else "UNKNOWN"


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


class _Call:
    """What the four kinds of call share: arguments to message, message to answer."""

    def __init__(self, connection: Connection, spec: PolicySpec, client_id: str, priority: int) -> None:
        self.connection = connection
        self.target = connection.target
        self.spec = spec
        self._client_id = client_id
        self._priority = priority
        self.closed = False
        """The client was closed: nothing goes out any more, on no stream of it either."""
        self._last_id = 0

    def request(
        self,
        obs: ArrayLike,
        seed: Seed,
        noise: NDArray[np.float32] | None,
        deterministic: bool,
        client_id: str | None = None,
    ) -> tuple[ActRows, pb.ActRequest]:
        if self.closed:
            raise NotReadyError(f"the client of {self.target} was closed here; create another")
        rows = act_rows(self.spec, obs, seed=seed, noise=noise, deterministic=deterministic, draw=deterministic)
        self._last_id += 1  # only for logs and traces: two threads may draw the same
        message = encode_request(
            rows,
            policy=self.target.policy,
            version=self.target.version,
            request_id=self._last_id,
            deterministic=deterministic,
            client_id=self._client_id if client_id is None else check_client_id(client_id),
            priority=self._priority,
        )
        return rows, message

    def result(
        self, rows: ActRows, request: pb.ActRequest, response: pb.ActResponse, started: float
    ) -> ActResult:
        if response.request_id != request.request_id:
            raise RequestError(
                f"wanted the answer to request {request.request_id} from {self.target}, got that to "
                f"{response.request_id}; the server is not an rsm-serve"
            )
        total_us = 1e6 * (time.perf_counter() - started)
        return decode_response(self.spec, rows, response, total_us=total_us)


def _positive(timeout_s: float, name: str = "timeout_s") -> float:
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequestError(
            f"wanted {name} > 0 and at most {MAX_TIMEOUT_S} s, a day, got {timeout_s}; "
            "every call has a deadline"
        )
    return timeout_s
