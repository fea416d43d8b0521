"""What the synchronous and the asyncio client share: settings, connecting, messages and their answers."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsm_common.errors import DeadlineExpiredError, InvalidRequestError, NotReadyError, RequestError
from rsm_common.policy import ActResult, ActRows, Seed, act_rows
from rsm_common.spec import PolicySpec, check_env
from rsm_serve.client.connection import Connection, Tls
from rsm_serve.client.failure import may_pass, request_error
from rsm_serve.client.target import Target
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.wire.caller import check_client_id, check_priority
from rsm_serve.wire.codec import decode_response, encode_request

CONNECT_TIMEOUT_S = 5.0
RETRY_S = 0.1
"""Pause between two attempts to connect. gRPC itself connects again after at most a second."""
MAX_TIMEOUT_S = 86_400
"""A day, the longest deadline: longer ones overflow the timers of gRPC and Python."""


class Client:
    """A client that checks its arguments; `PolicyClient` and `AsyncPolicyClient` connect.

    Args:
        address: 'host:port', '[v6 host]:port', 'unix:/path', 'grpc://host:port/NAME[:VERSION]',
            'grpcs://...' for TLS, or 'grpc:unix:/path/NAME[:VERSION]'.
        policy: its name; may be left out if the server has exactly one.
        version: a number; None for the current one.
        timeout_s: deadline of every call in seconds; more than 0 and at most a day, like every timeout here.
        connect_timeout_s: how long to wait, in seconds, for a server that is starting or loading.
        client_id: who asks, a name of this robot alone. While canaries run, one client always meets the same
            version. A server that limits the step of an action counts from this client's last action.
        priority: from -10 to 10; requests of higher priority go first.
        tls: how to trust the server, and the client's own certificate; None: for grpcs:// the files of
            RSM_TLS_CA, RSM_TLS_CERT and RSM_TLS_KEY, else plaintext.
        token: for a server with --act-token-file; None: the one in RSM_TOKEN, if set.

    Raises:
        InvalidRequestError: an argument is out of range.
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
        self.timeout_s = check_timeout(timeout_s)
        self._connect_timeout_s = check_timeout(connect_timeout_s, "connect_timeout_s")
        self.client_id = check_client_id(client_id)
        self.priority = check_priority(priority)
        self._connected: Call | None = None
        self.max_batch_size = 0
        """Most rows of one call; 0 before the client is connected."""
        self.server_version = ""
        """Version of the toolkit on the server; empty before the client is connected."""
        self._start()

    def _start(self) -> None:
        """The end of the constructor; a synchronous client connects here."""

    @property
    def spec(self) -> PolicySpec:
        """What the policy takes and gives, fetched on connecting."""
        return self._call.spec

    def check_env(self, env: object) -> None:
        """Make sure that policy and environment belong together; see `rsm_common.spec.check_env`.

        Raises:
            UnsupportedEnvError: they do not.
        """
        check_env(self.spec, env)

    @property
    def _call(self) -> Call:
        if self._connected is None:
            raise NotReadyError(
                f"the client of {self.target} is not connected; use 'async with' or await connect() first"
            )
        return self._connected

    def _spec_request(self) -> pb.GetSpecRequest:
        return pb.GetSpecRequest(policy=self.target.policy, version=self.target.version)

    def _take(self, info: pb.GetSpecResponse) -> None:
        """Store the server's answer to `_spec_request`; the client is then connected."""
        spec = PolicySpec.from_json(info.spec_json)
        self._connected = Call(self._connection, spec, self.client_id, self.priority)
        self.max_batch_size = info.max_batch_size
        self.server_version = info.server_version

    def _limit_s(self, timeout_s: float | None) -> float:
        """Return the deadline in seconds of a stream's steps."""
        return self.timeout_s if timeout_s is None else check_timeout(timeout_s)

    def _let_go(self) -> None:
        """Close the client for further requests, on its streams too."""
        if self._connected is not None:
            self._connected.closed = True


class Attempts:
    """The attempts to connect; they end with a success, a permanent error or the deadline.

    Args:
        connection: to the server.
        timeout_s: total time of all attempts in seconds.
    """

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._ends_s = time.monotonic() + timeout_s
        self._last: RequestError | None = None

    @property
    def left_s(self) -> float:
        """Deadline of the next attempt in seconds."""
        return max(self._ends_s - time.monotonic(), 1e-3)

    def failed(self, error: Any) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            RequestError: there is no next attempt.
        """
        reason = request_error(self._connection, error, self._timeout_s, look=True)
        if isinstance(reason, DeadlineExpiredError) and self._last is not None:
            raise self._last from None  # says more than that the time is over
        self._last = reason
        if not (isinstance(reason, NotReadyError) and may_pass(error)) or self.left_s <= RETRY_S:
            raise reason from None
        return RETRY_S


class Call:
    """What the four kinds of call share: arguments to message, message to answer."""

    def __init__(self, connection: Connection, spec: PolicySpec, client_id: str, priority: int) -> None:
        self.connection = connection
        self.target = connection.target
        self.spec = spec
        self._client_id = client_id
        self._priority = priority
        self.closed = False
        """The client was closed: it sends nothing any more, on no stream either."""
        self._last_id = 0

    def request(
        self,
        obs: ArrayLike,
        seed: Seed,
        noise: NDArray[np.float32] | None,
        deterministic: bool,
        client_id: str | None = None,
    ) -> tuple[ActRows, pb.ActRequest]:
        """The validated arguments and their message.

        Raises:
            InvalidRequestError: see `rsm_common.policy.Policy.act`.
            NotReadyError: the client was closed.
        """
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
        """The answer in the shape that the caller used.

        Raises:
            RequestError: the answer carries an error, is damaged, or belongs to another request.
        """
        if response.request_id != request.request_id:
            raise RequestError(
                f"wanted the answer to request {request.request_id} from {self.target}, got that to "
                f"{response.request_id}; the server is not an rsm-serve"
            )
        total_us = 1e6 * (time.perf_counter() - started)
        return decode_response(self.spec, rows, response, total_us=total_us)

    def failed(self, error: Any, timeout_s: float) -> RequestError:
        """The typed error for a failed call."""
        return request_error(self.connection, error, timeout_s)

    def stream_closed(self) -> NotReadyError:
        """The error for a step on a stream that was closed here."""
        return NotReadyError(f"the stream to {self.target} was closed here; open another")

    def stream_ended(self) -> NotReadyError:
        """The error for a stream that the server ended."""
        return NotReadyError(f"the server at {self.target} ended the stream; connect again")


def check_timeout(timeout_s: float, name: str = "timeout_s") -> float:
    """Return the deadline in seconds.

    Raises:
        InvalidRequestError: not a number, not above 0, or more than a day.
    """
    if not isinstance(timeout_s, int | float | np.number) or not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequestError(
            f"wanted {name} > 0 and at most {MAX_TIMEOUT_S} s, a day, got {timeout_s!r}; "
            "every call has a deadline"
        )
    return float(timeout_s)
