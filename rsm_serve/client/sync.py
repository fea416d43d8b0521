"""The synchronous client of `rsm.v1.PolicyService`: a remote policy is a `Policy` like any other.

    with PolicyClient("127.0.0.1:8001", policy="pendulum") as policy:
        action = policy.act(obs).action

Needs only numpy, grpcio and protobuf. Every call has a deadline, and no call is retried: a late action is worse
than an error for a control loop. Create clients after fork, not before.
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
    """A policy on a server, as a `Policy`; connects when constructed, and may be used from several threads.

    Takes the arguments of `Client`. The constructor waits up to `connect_timeout_s` for a server that is
    starting, not there yet, or loading.

    Raises:
        InvalidRequestError: an argument is out of range.
        UnauthenticatedError: the server does not know the token, or its certificate is not to be trusted.
        NotReadyError: no server answers at the address, or it is shutting down.
        DeadlineExpiredError: a server took the connection and did not answer.
        PolicyNotFoundError: no such policy or version.
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
            raise self._call.failed(error, self.timeout_s) from None
        return self._call.result(rows, request, response, started)

    def stream(self, *, timeout_s: float | None = None) -> PolicyStream:
        """A stream to the policy, for a control loop: less overhead per step than `act`.

        Args:
            timeout_s: deadline of every step in seconds; None for the client's.

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
    """One step after the other over one bidirectional stream; a `Policy` for one thread.

    The next step after an expired deadline or a lost connection opens a new stream. The server keeps nothing
    between steps, and a late answer is never taken for the answer to a later step.
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
            raise self._call.stream_closed()
        if self._responses is None:
            self._open()
        self._watchdog.arm(self._responses, self._timeout_s)
        try:
            self._requests.put(request)
            response = next(self._responses)
        except BaseException as error:
            expired = self._watchdog.disarm()
            self._drop()  # also when interrupted: the next step must not read the answer that is under way
            if expired:
                raise too_late(self._call.target, self._timeout_s) from None
            if isinstance(error, StopIteration):
                raise self._call.stream_ended() from None
            if isinstance(error, grpc.RpcError):
                raise self._call.failed(error, self._timeout_s) from None
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
