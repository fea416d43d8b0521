"""The health of a server, asked without a token."""

from __future__ import annotations

import grpc

from rsm_common.errors import InvalidRequestError
from rsm_serve.client.call import check_timeout
from rsm_serve.client.connection import Connection, Tls
from rsm_serve.client.failure import request_error
from rsm_serve.client.target import Target

_HEALTH_STATES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")


def check_health(address: str, policy: str = "", *, timeout_s: float = 1.0, tls: Tls | None = None) -> str:
    """Ask `grpc.health.v1.Health/Check`, which needs no token.

    Args:
        address: as for `PolicyClient`.
        policy: empty for the whole server.
        timeout_s: how long to wait, in seconds.
        tls: as for `PolicyClient`.

    Returns:
        "SERVING", "NOT_SERVING", "UNKNOWN", or "SERVICE_UNKNOWN" if there is no such policy.

    Raises:
        InvalidRequestError: an argument is out of range.
        UnauthenticatedError: the server's certificate is not to be trusted.
        NotReadyError: no server is at the address.
        DeadlineExpiredError: no answer within `timeout_s`.
    """
    check_timeout(timeout_s)
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
            raise request_error(connection, error, timeout_s, look=True) from None
    state = response[1] if len(response) >= 2 and response[0] == 0x08 else 0
    return _HEALTH_STATES[state] if state < len(_HEALTH_STATES) else "UNKNOWN"
