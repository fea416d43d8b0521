"""What a failed call means: the typed error for a gRPC status, with a sentence about the connection."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from typing import Any
from urllib.parse import urlsplit

from rsm_common.errors import (
    DeadlineExpiredError,
    InvalidRequestError,
    NotReadyError,
    RequestError,
    UnauthenticatedError,
    error_from_status,
)
from rsm_serve.addresses import split_address
from rsm_serve.client.connection import CA_VARIABLE, CERT_VARIABLE, Connection
from rsm_serve.client.target import SCHEME, TLS_SCHEME, Target
from rsm_serve.wire.codec import ERROR_MARK, RETRY_AFTER

DATES_S = 1.0
"""Time to ask a server for its certificate, whose dates an error names."""


def too_late(target: Target, timeout_s: float) -> DeadlineExpiredError:
    """The error for a missed deadline."""
    return DeadlineExpiredError(
        f"no answer from {target} within {timeout_s:g} s; allow more time (timeout_s) or send less"
    )


def request_error(connection: Connection, error: Any, timeout_s: float, *, look: bool = False) -> RequestError:
    """The typed error for a failed call: the server's own error, or a sentence about the connection.

    Args:
        connection: to the server.
        error: the `grpc.RpcError`.
        timeout_s: deadline of the call.
        look: whether to ask the server for the dates of a certificate that was refused, for up to a second.
    """
    code, details = error.code().name, error.details() or ""
    metadata = [tuple(pair) for pair in error.trailing_metadata() or ()]
    if ERROR_MARK in metadata:
        hint = str(dict(metadata).get(RETRY_AFTER, ""))
        return error_from_status(code, details, int(hint) if hint.isdecimal() else None)
    target = connection.target
    if code == "UNAVAILABLE":
        return _unreachable(connection, details, look)
    if code == "DEADLINE_EXCEEDED":
        return too_late(target, timeout_s)
    if code == "CANCELLED":  # by the server: it closes and cuts off the calls that come too late
        return NotReadyError(
            f"the server at {target} has closed, or has too many waiting calls ({details}); "
            "connect to another server, or try again later"
        )
    if code == "RESOURCE_EXHAUSTED":  # by gRPC itself: the message is too large
        return InvalidRequestError(f"the message to or from {target} is too large ({details}); send fewer rows")
    if code == "UNIMPLEMENTED":
        return NotReadyError(f"the server at {target} is not an rsm-serve ({details}); check the address")
    return RequestError(f"the call to {target} failed: {code}: {details}")


def may_pass(error: Any) -> bool:
    """Whether a later call may succeed: the server is starting, loading or away."""
    details = error.details() or ""
    refused = "CERTIFICATE_VERIFY_FAILED", "Hostname Verification", "WRONG_VERSION_NUMBER"
    return error.code().name == "UNAVAILABLE" and not any(reason in details for reason in refused)


def _unreachable(connection: Connection, details: str, look: bool) -> RequestError:
    target, tls = connection.target, connection.tls
    if "Hostname Verification" in details:
        return UnauthenticatedError(
            f"wanted a certificate for {(tls and tls.server_name) or target.host} from the server at {target}, "
            "got one for another name; connect by the name in its certificate, or give it as server_name"
        )
    if "certificate has expired" in details or "certificate is not yet valid" in details:
        return UnauthenticatedError(
            f"wanted a certificate that is valid now from the server at {target}, got one "
            f"{_server_dates(target.address, look)}; set the clock of this machine, or renew the certificate"
        )
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return UnauthenticatedError(
            f"wanted a certificate signed by an authority that is known here from the server at {target}, "
            f"got another ({details.rpartition('OPENSSL_internal:')[2]}); give the authority's file as ca "
            f"(--tls-ca, {CA_VARIABLE})"
        )
    if "WRONG_VERSION_NUMBER" in details:
        return NotReadyError(f"the server at {target} does not serve TLS; connect with {SCHEME}")
    closed = "Socket closed" in details or "reset" in details
    if closed and tls is not None and (dates := tls.outside_dates()):
        return UnauthenticatedError(
            f"the server at {target} closed the connection ({details}), and the client's certificate in "
            f"{tls.cert} is {dates}; set the clock of this machine, or renew the certificate"
        )
    hint = "start one with rsm-serve, or check the address"
    if closed:
        hint += (
            f"; if it serves TLS, connect with {TLS_SCHEME}"
            if tls is None
            else f"; if it wants a client's certificate, give cert and key ({CERT_VARIABLE}, ...)"
            if tls.cert is None
            else f"; the authority that signed {tls.cert} may not be the server's, so give another cert and key"
        )
    if variable := connection.proxy_variable:
        hint += (
            f"; the call went through the proxy {_without_password(os.environ.get(variable, ''))} of the "
            f"environment variable {variable}, so add {target.host} to no_proxy if it needs none"
        )
    return NotReadyError(f"no policy server answers at {target} ({details}); {hint}")


def _without_password(url: str) -> str:
    """The proxy's host and port."""
    return urlsplit(url if "://" in url else f"//{url}").netloc.rpartition("@")[2]


def _server_dates(address: str, look: bool) -> str:
    """The validity dates of a server's certificate as text, as far as the server shows one."""
    from rsm_serve.security.x509 import server_certificate

    host, port = split_address(address)
    certificate = server_certificate(host, port, DATES_S) if look else None
    now = datetime.now(timezone.utc)
    dates = "" if certificate is None else certificate.outside(now)
    return dates or f"whose chain is expired or not yet valid at {now:%Y-%m-%d %H:%M} (UTC)"
