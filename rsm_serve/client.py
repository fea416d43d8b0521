"""Clients of `rsm.v1.PolicyService`: a remote policy is a `Policy` like any other.

    with PolicyClient("127.0.0.1:8001", policy="pendulum") as policy:
        action = policy.act(obs).action

Needs only numpy, grpcio and protobuf. Every call has a deadline, and none is retried: for a control loop
a late action is worse than an error. Create clients after fork, not before.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsm_serve.codec import ERROR_MARK, MAX_MESSAGE_BYTES, RETRY_AFTER, decode_response, encode_request
from rsm_serve.errors import (
    DeadlineExpiredError,
    InvalidRequestError,
    NotReadyError,
    RequestError,
    error_from_status,
)
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.policy import ActResult, ActRows, PolicySpec, Seed, act_rows, check_env
from rsm_serve.scheduling import check_client_id, check_priority

SERVICE = "rsm.v1.PolicyService"
SCHEME = "grpc://"
CONNECT_TIMEOUT_S = 5.0

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A silent network loss is noticed within 30 s even while no call is open.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.enable_retries", 0),
    # Its own connection per client: a dead one is never shared.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True)
class Target:
    """Which policy of which server."""

    address: str
    """host:port or unix:/path."""
    policy: str
    """May be empty if the server has exactly one."""
    version: str
    """Empty for the current one."""

    @classmethod
    def parse(cls, address: str, policy: str | None = None, version: int | str | None = None) -> Target:
        """From 'host:port', 'unix:/path' or 'grpc://host:port/NAME[:VERSION]'.

        Raises:
            InvalidRequestError: none of these, or two different policies or versions.
        """
        name, number = policy or "", "" if version is None else str(version)
        if address.startswith(SCHEME):
            address, _, path = address.removeprefix(SCHEME).partition("/")
            url_name, _, url_number = path.partition(":")
            if (url_name and name not in ("", url_name)) or (url_number and number not in ("", url_number)):
                raise InvalidRequestError(
                    f"wanted one policy, got {path!r} in the address and {name!r} {number!r} beside it; "
                    "leave one of them out"
                )
            name, number = name or url_name, number or url_number
        if "://" in address or ":" not in address:
            raise InvalidRequestError(
                f"wanted an address such as 127.0.0.1:8001, unix:/path or grpc://127.0.0.1:8001/NAME, "
                f"got {address!r}"
            )
        return cls(address, name, number)

    def __str__(self) -> str:
        return self.address


class PolicyClient:
    """A policy on a server, as a `Policy`; connects when constructed, and may be used from several threads.

    Args:
        address: 'host:port', 'unix:/path', or 'grpc://host:port/NAME[:VERSION]'.
        policy: its name; may be left out if the server has exactly one.
        version: a number; None for the current one.
        timeout_s: deadline of every call.
        connect_timeout_s: deadline of the first call, which fetches the specification.
        client_id: who asks, a name of this robot alone; while canaries run, it always meets the same version.
        priority: from -10 to 10; requests of higher priority go first.

    Raises:
        InvalidRequestError: an argument is out of range.
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
    ) -> None:
        self.target = Target.parse(address, policy, version)
        self.timeout_s = _positive(timeout_s)
        self.client_id = check_client_id(client_id)
        self.priority = check_priority(priority)
        self._connected: _Call | None = None
        self._channel = grpc.insecure_channel(self.target.address, options=_CHANNEL_OPTIONS)
        self._act = self._channel.unary_unary(
            f"/{SERVICE}/Act", pb.ActRequest.SerializeToString, pb.ActResponse.FromString
        )
        self._act_stream = self._channel.stream_stream(
            f"/{SERVICE}/ActStream", pb.ActRequest.SerializeToString, pb.ActResponse.FromString
        )
        get_spec = self._channel.unary_unary(
            f"/{SERVICE}/GetSpec", pb.GetSpecRequest.SerializeToString, pb.GetSpecResponse.FromString
        )
        request = pb.GetSpecRequest(policy=self.target.policy, version=self.target.version)
        try:
            info = get_spec(request, timeout=connect_timeout_s)
        except grpc.RpcError as error:
            self.close()
            raise _translate(error, self.target, connect_timeout_s) from None
        self._call = self._connected = _Call(
            self.target, PolicySpec.from_json(info.spec_json), self.client_id, self.priority
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
    ) -> ActResult:
        """Sample actions; see `rsm_serve.policy.Policy.act`.

        Raises:
            InvalidRequestError: wrong shape, dtype or count, or NaN or Inf.
            DeadlineExpiredError: no answer within `timeout_s`.
            NotReadyError: no server answers, or it is shutting down.
            QueueFullError: the server sheds load; its `retry_after_s` says when to try again.
            SupersededError: the server has --latest-wins, and a newer request of this `client_id` came.
            BackendError: the policy failed.
        """
        started = time.perf_counter()
        rows, request = self._call.request(obs, seed, noise, deterministic)
        try:
            response = self._act(request, timeout=self.timeout_s)
        except grpc.RpcError as error:
            raise _translate(error, self.target, self.timeout_s) from None
        return self._call.result(rows, request, response, started)

    def stream(self, *, timeout_s: float | None = None) -> PolicyStream:
        """A stream to the policy, for a control loop: less overhead per step than `act`.

        Args:
            timeout_s: deadline of every step; None for the client's.
        """
        limit_s = self.timeout_s if timeout_s is None else _positive(timeout_s)
        return PolicyStream(self._call, self._act_stream, limit_s)

    def check_env(self, env: object) -> None:
        """Make sure that policy and environment belong together; see `rsm_serve.policy.check_env`.

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
                raise _too_late(self._call.target, self._timeout_s) from None
            if isinstance(error, StopIteration):
                raise NotReadyError(
                    f"the server at {self._call.target} ended the stream; connect again"
                ) from None
            if isinstance(error, grpc.RpcError):
                raise _translate(error, self._call.target, self._timeout_s) from None
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
    ) -> None:
        self.target = Target.parse(address, policy, version)
        self.timeout_s = _positive(timeout_s)
        self.client_id = check_client_id(client_id)
        self.priority = check_priority(priority)
        self._connect_timeout_s = connect_timeout_s
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
        import grpc.aio

        self._channel = grpc.aio.insecure_channel(self.target.address, options=_CHANNEL_OPTIONS)
        self._act = self._channel.unary_unary(
            f"/{SERVICE}/Act", pb.ActRequest.SerializeToString, pb.ActResponse.FromString
        )
        self._act_stream = self._channel.stream_stream(
            f"/{SERVICE}/ActStream", pb.ActRequest.SerializeToString, pb.ActResponse.FromString
        )
        get_spec = self._channel.unary_unary(
            f"/{SERVICE}/GetSpec", pb.GetSpecRequest.SerializeToString, pb.GetSpecResponse.FromString
        )
        request = pb.GetSpecRequest(policy=self.target.policy, version=self.target.version)
        try:
            info = await get_spec(request, timeout=self._connect_timeout_s)
        except grpc.RpcError as error:
            await self.close()
            raise _translate(error, self.target, self._connect_timeout_s) from None
        self._connected = _Call(
            self.target, PolicySpec.from_json(info.spec_json), self.client_id, self.priority
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
    ) -> ActResult:
        """Sample actions; arguments and errors as `PolicyClient.act`. Cancelling it cancels the request."""
        started = time.perf_counter()
        rows, request = self._call.request(obs, seed, noise, deterministic)
        try:
            response = await self._act(request, timeout=self.timeout_s)
        except grpc.RpcError as error:
            raise _translate(error, self.target, self.timeout_s) from None
        return self._call.result(rows, request, response, started)

    def stream(self, *, timeout_s: float | None = None) -> AsyncPolicyStream:
        """A stream to the policy, for a control loop; see `PolicyClient.stream`."""
        limit_s = self.timeout_s if timeout_s is None else _positive(timeout_s)
        return AsyncPolicyStream(self._call, self._act_stream, limit_s)

    def check_env(self, env: object) -> None:
        """Make sure that policy and environment belong together; see `rsm_serve.policy.check_env`."""
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
        if self._stream is None:
            self._stream = self._open_stream()
        try:
            response = await _within(self._timeout_s, self._step(self._stream, request))
        except BaseException as error:
            await self.close()  # also when cancelled: the answer that is under way belongs to nobody
            if isinstance(error, asyncio.TimeoutError):
                raise _too_late(self._call.target, self._timeout_s) from None
            if isinstance(error, grpc.RpcError):
                raise _translate(error, self._call.target, self._timeout_s) from None
            raise
        return self._call.result(rows, request, response, started)

    async def _step(self, stream: Any, request: pb.ActRequest) -> pb.ActResponse:
        import grpc.aio

        await stream.write(request)
        response = await stream.read()
        if response is grpc.aio.EOF:
            raise NotReadyError(f"the server at {self._call.target} ended the stream; connect again")
        assert isinstance(response, pb.ActResponse)
        return response

    async def close(self) -> None:
        """End the stream; the client stays open."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.cancel()

    async def __aenter__(self) -> AsyncPolicyStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


_HEALTH_STATES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")


def check_health(address: str, policy: str = "", *, timeout_s: float = 1.0) -> str:
    """Ask `grpc.health.v1.Health/Check`.

    Args:
        address: 'host:port' or 'unix:/path'.
        policy: empty for the whole server.
        timeout_s: how long to wait.

    Returns:
        "SERVING", "NOT_SERVING", "UNKNOWN", or "SERVICE_UNKNOWN" if there is no such policy.

    Raises:
        NotReadyError: no server answers.
        DeadlineExpiredError: none within `timeout_s`.
    """
    target = Target.parse(address, policy)
    name = target.policy.encode()
    if len(name) > 127:
        raise InvalidRequestError(f"wanted a policy name of at most 127 bytes, got {len(name)}")
    # Two messages of one field each (string service = 1; enum status = 1), written out, because the
    # package with the generated code is not part of the base install.
    request = b"\x0a" + bytes([len(name)]) + name if name else b""
    with grpc.insecure_channel(target.address, options=_CHANNEL_OPTIONS) as channel:
        try:
            response: bytes = channel.unary_unary("/grpc.health.v1.Health/Check")(request, timeout=timeout_s)
        except grpc.RpcError as error:
            if getattr(error, "code", lambda: None)() is grpc.StatusCode.NOT_FOUND:
                return "SERVICE_UNKNOWN"
            raise _translate(error, target, timeout_s) from None
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

    def __init__(self, target: Target, spec: PolicySpec, client_id: str, priority: int) -> None:
        self.target = target
        self.spec = spec
        self._client_id = client_id
        self._priority = priority
        self.closed = False
        """The client was closed: nothing goes out any more, on no stream of it either."""
        self._last_id = 0

    def request(
        self, obs: ArrayLike, seed: Seed, noise: NDArray[np.float32] | None, deterministic: bool
    ) -> tuple[ActRows, pb.ActRequest]:
        if self.closed:
            raise NotReadyError(f"the client of {self.target} was closed here; create another")
        rows = act_rows(self.spec, obs, seed=seed, noise=noise, deterministic=deterministic)
        self._last_id += 1  # only for logs and traces: two threads may draw the same
        message = encode_request(
            rows,
            policy=self.target.policy,
            version=self.target.version,
            request_id=self._last_id,
            draw=seed is None,
            deterministic=deterministic,
            client_id=self._client_id,
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


def _positive(timeout_s: float) -> float:
    if not 0 < timeout_s < float("inf"):
        raise InvalidRequestError(f"wanted a finite timeout_s > 0, got {timeout_s}; every call has a deadline")
    return timeout_s


def _too_late(target: Target, timeout_s: float) -> DeadlineExpiredError:
    return DeadlineExpiredError(
        f"no answer from {target} within {timeout_s:g} s; allow more time (timeout_s) or send less"
    )


def _translate(error: Any, target: Target, timeout_s: float) -> RequestError:
    """The typed error for a failed call: the server's own, or a sentence about the connection."""
    code, details = error.code().name, error.details() or ""
    metadata = [tuple(pair) for pair in error.trailing_metadata() or ()]
    if ERROR_MARK in metadata:
        hint = str(dict(metadata).get(RETRY_AFTER, ""))
        return error_from_status(code, details, int(hint) if hint.isdecimal() else None)
    if code == "UNAVAILABLE":
        return NotReadyError(
            f"no policy server answers at {target} ({details}); start one with rsm-serve, or check the address"
        )
    if code == "DEADLINE_EXCEEDED":
        return _too_late(target, timeout_s)
    if code == "CANCELLED":  # not by us: a server that closes cuts off the calls that come too late
        return NotReadyError(
            f"the server at {target} has closed, or more calls wait than it reads ({details}); "
            "connect to another, or again later"
        )
    if code == "RESOURCE_EXHAUSTED":  # by gRPC itself: the message is too large
        return InvalidRequestError(f"the message to or from {target} is too large ({details}); send fewer rows")
    if code == "UNIMPLEMENTED":
        return NotReadyError(f"the server at {target} is not an rsm-serve ({details}); check the address")
    return RequestError(f"the call to {target} failed: {code}: {details}")
