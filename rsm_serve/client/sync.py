"""The synchronous client of `rsm.v1.PolicyService`: a remote policy with the interface `Policy`.

    with PolicyClient("127.0.0.1:8001", policy="pendulum") as policy:
        action = policy.act(obs).action

The client needs only numpy, grpcio and protobuf. Every call has a deadline. The client does not retry a call,
because a late action is worse than an error in a control loop. Create clients after a fork, not before it.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsm_common.policy import ActResult, Seed
from rsm_common.spec import PolicySpec
from rsm_serve.client.call import Attempts, Call, Client
from rsm_serve.client.connection import methods
from rsm_serve.client.failure import too_late
from rsm_serve.client.watchdog import Watchdog
from rsm_serve.pb import policy_pb2 as pb


class PolicyClient(Client):
    """A policy on a server, with the interface `Policy`; several threads may use one client.

    The constructor takes the arguments of `Client`, and connects. It waits up to `connect_timeout_s` for a
    server that is not running yet, starting or loading.

    Raises:
        InvalidRequestError: an argument is out of range.
        UnauthenticatedError: the token is unknown, or the server's certificate is not trusted.
        NotReadyError: no server answers at the address, or it is shutting down.
        DeadlineExpiredError: the server accepted the connection and did not answer.
        PolicyNotFoundError: the server does not have the policy or the version.
    """

    def _start(self) -> None:
        self._channel = self._connection.channel()
        get_spec, self._act, self._act_stream = methods(self._channel, self._connection.metadata)
        attempts = Attempts(self._connection, self._connect_timeout_s)
        try:
            while self._connected is None:
                try:
                    self._take(get_spec(self._spec_request(), timeout=attempts.left_s))
                except grpc.RpcError as error:
                    time.sleep(attempts.failed(error))
        except BaseException:
            self.close()
            raise

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

        `client_id` replaces the client's own `client_id` for this call, for example for one of several robots.

        Raises:
            InvalidRequestError: wrong shape, dtype or count, or NaN or Inf.
            DeadlineExpiredError: no answer within `timeout_s`.
            NotReadyError: no server answers, or it is shutting down.
            QueueFullError: the server is overloaded; `retry_after_s` is the time to wait in seconds.
            SupersededError: a newer request of this `client_id` replaced this one (--latest-wins).
            BackendError: the policy failed.
        """
        started = time.perf_counter()
        rows, request = self._call.request(obs, seed, noise, deterministic, client_id)
        try:
            response = self._act(request, timeout=self.timeout_s)
        except grpc.RpcError as error:
            raise self._call.failed(error, self.timeout_s) from None
        return self._call.result(rows, request, response, started)

    def stream(self, *, timeout_s: float | None = None) -> PolicyStream:
        """Open a stream for a control loop; it has less overhead per step than `act`.

        Args:
            timeout_s: deadline of every step in seconds; None takes the client's `timeout_s`.

        Raises:
            InvalidRequestError: `timeout_s` is out of range.
        """
        return PolicyStream(self._call, self._act_stream, self._limit_s(timeout_s))

    def close(self) -> None:
        """Close the connection; later calls raise NotReadyError."""
        self._let_go()
        self._channel.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PolicyStream:
    """A `Policy` for one thread that sends its steps over one bidirectional stream.

    After an expired deadline or a lost connection, the next step opens a new stream. A late answer is therefore
    never returned for a later step.
    """

    def __init__(
        self, call: Call, open_stream: Callable[[Iterator[pb.ActRequest]], Any], timeout_s: float
    ) -> None:
        self._call = call
        self._open_stream = open_stream
        self._timeout_s = timeout_s
        self._requests: queue.SimpleQueue[pb.ActRequest | None] = queue.SimpleQueue()
        self._responses: Any = None
        self._closed = False
        self._watchdog = Watchdog()

    @property
    def spec(self) -> PolicySpec:
        """The specification of the policy: observation, action and sampling."""
        return self._call.spec

    def act(
        self,
        obs: ArrayLike,
        *,
        seed: Seed = None,
        noise: NDArray[np.float32] | None = None,
        deterministic: bool = False,
    ) -> ActResult:
        """Sample actions for one control step; arguments and errors are those of `PolicyClient.act`."""
        started = time.perf_counter()
        rows, request = self._call.request(obs, seed, noise, deterministic)
        if self._closed:
            raise self._call.stream_closed()
        if self._responses is None:
            self._open()
        self._watchdog.arm(self._responses, self._timeout_s)
        try:
            self._requests.put(request)
            response = next(self._responses)
        except BaseException as error:
            expired = self._watchdog.disarm()
            self._drop()  # after an interrupt too: the next step must not read this late answer
            if expired:
                raise too_late(self._call.target, self._timeout_s) from None
            if isinstance(error, StopIteration):
                raise self._call.stream_ended() from None
            if isinstance(error, grpc.RpcError):
                raise self._call.failed(error, self._timeout_s) from None
            raise
        if self._watchdog.disarm():
            self._drop()  # the deadline passed after the answer: the answer is valid, the stream is not
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
        self._requests.put(None)  # ends gRPC's sending thread
        if self._responses is not None:
            self._responses.cancel()
            self._responses = None
