"""How a client reaches a server and shows who it is: address, TLS, token; and what a failed call means."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import grpc

from rsm_common.errors import (
    ConfigError,
    DeadlineExpiredError,
    InvalidRequestError,
    NotReadyError,
    RequestError,
    UnauthenticatedError,
    error_from_status,
)
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.security.tokens import bearer, check_token
from rsm_serve.wire.codec import ERROR_MARK, MAX_MESSAGE_BYTES, RETRY_AFTER, SERVICE

DATES_S = 1.0
"""Time to ask a server for its certificate, whose dates an error names."""
SCHEME, TLS_SCHEME = "grpc://", "grpcs://"
TOKEN_VARIABLE = "RSM_TOKEN"
CA_VARIABLE, CERT_VARIABLE, KEY_VARIABLE = "RSM_TLS_CA", "RSM_TLS_CERT", "RSM_TLS_KEY"

_CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
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
    tls: bool = False
    """The address began with grpcs://."""

    @classmethod
    def parse(cls, address: str, policy: str | None = None, version: int | str | None = None) -> Target:
        """From 'host:port', 'unix:/path' or 'grpc://host:port/NAME[:VERSION]', with TLS 'grpcs://...'.

        Raises:
            InvalidRequestError: none of these, not UTF-8, or two different policies or versions.
        """
        name, number = policy or "", "" if version is None else str(version)
        for text in (address, name, number):
            try:
                text.encode()
            except UnicodeEncodeError:  # a byte of the command line that is no UTF-8, which gRPC does not carry
                raise InvalidRequestError(
                    f"wanted an address, policy and version of UTF-8, got {text!r:.200}; check the terminal's "
                    "encoding"
                ) from None
        scheme = next((prefix for prefix in (SCHEME, TLS_SCHEME) if address.startswith(prefix)), "")
        if scheme:
            address, _, path = address.removeprefix(scheme).partition("/")
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
        return cls(address, name, number, scheme == TLS_SCHEME)

    def __str__(self) -> str:
        return self.address


@dataclass(frozen=True)
class Tls:
    """How a client trusts a server, and shows itself to it; files of PEM."""

    ca: str | Path | None = None
    """Certificates of the authorities that are trusted; None: the public ones that gRPC knows."""
    cert: str | Path | None = None
    """The client's own certificate chain, for a server with --tls-client-ca."""
    key: str | Path | None = None
    """The private key of it."""
    server_name: str | None = None
    """The name in the server's certificate, where it is not the one of the address."""

    @classmethod
    def from_environment(cls) -> Tls:
        """From RSM_TLS_CA, RSM_TLS_CERT and RSM_TLS_KEY, each of which may be missing."""
        ca, cert, key = (os.environ.get(name) or None for name in (CA_VARIABLE, CERT_VARIABLE, KEY_VARIABLE))
        return cls(ca, cert, key)

    def credentials(self) -> Any:
        """gRPC's.

        Raises:
            InvalidRequestError: a file cannot be used, or only one of cert and key is there.
        """
        from rsm_serve.security.pem import (
            read_pems,  # ssl, which plaintext does without, takes its time to import
        )

        if (self.cert is None) != (self.key is None):
            raise InvalidRequestError(
                f"wanted cert and key together, got only {self.cert or self.key}; give both, or neither"
            )
        try:
            pems = read_pems(self.ca, self.cert, self.key)
        except ConfigError as error:
            raise InvalidRequestError(str(error)) from None
        return grpc.ssl_channel_credentials(pems.ca, pems.key, pems.cert)

    def outside_dates(self) -> str:
        """The validity dates of the client's certificate as text, if it is not valid now; else empty."""
        from rsm_serve.security.x509 import first_certificate

        try:
            certificate = None if self.cert is None else first_certificate(Path(self.cert).read_bytes())
        except OSError:
            return ""
        return "" if certificate is None else certificate.outside(datetime.now(timezone.utc))


@dataclass(frozen=True)
class Connection:
    """A way to a server; opens channels and says in our words what went wrong on them."""

    target: Target
    tls: Tls | None
    """None: plaintext."""
    metadata: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """What travels with every call: the token."""

    @classmethod
    def to(cls, target: Target, tls: Tls | None = None, token: str | None = None) -> Connection:
        """Decide on TLS and token.

        Args:
            target: where to.
            tls: switches TLS on; None: for grpcs:// what the environment says, else plaintext.
            token: None: that of the environment variable RSM_TOKEN; empty: none.

        Raises:
            InvalidRequestError: TLS for an address that has none, or something that is no token.
        """
        if tls is None and target.tls:
            tls = Tls.from_environment()
        if tls is not None and target.address.startswith("unix:"):
            raise InvalidRequestError(
                f"wanted host:port together with TLS, got {target}; a unix socket has none, leave tls out"
            )
        where = "of this client" if token is not None else f"in {TOKEN_VARIABLE}"
        secret = os.environ.get(TOKEN_VARIABLE, "").strip() if token is None else token
        try:
            return cls(target, tls, bearer(check_token(secret, where) if secret else ""))
        except ConfigError as error:
            raise InvalidRequestError(str(error)) from None

    def channel(self) -> Any:
        """A new `grpc.Channel`."""
        return self._open(grpc.insecure_channel, grpc.secure_channel)

    def aio_channel(self) -> Any:
        """A new `grpc.aio.Channel`, of the event loop that is running."""
        import grpc.aio

        return self._open(grpc.aio.insecure_channel, grpc.aio.secure_channel)

    def _open(self, insecure: Callable[..., Any], secure: Callable[..., Any]) -> Any:
        if self.tls is None:
            return insecure(self.target.address, options=_CHANNEL_OPTIONS)
        name = self.tls.server_name
        options = (*_CHANNEL_OPTIONS, *((("grpc.ssl_target_name_override", name),) if name else ()))
        return secure(self.target.address, self.tls.credentials(), options=options)

    def too_late(self, timeout_s: float) -> DeadlineExpiredError:
        """What a missed deadline is."""
        return DeadlineExpiredError(
            f"no answer from {self.target} within {timeout_s:g} s; allow more time (timeout_s) or send less"
        )

    def error(self, error: Any, timeout_s: float) -> RequestError:
        """The typed error for a failed call: the server's own, or a sentence about the connection."""
        code, details = error.code().name, error.details() or ""
        metadata = [tuple(pair) for pair in error.trailing_metadata() or ()]
        if ERROR_MARK in metadata:
            hint = str(dict(metadata).get(RETRY_AFTER, ""))
            return error_from_status(code, details, int(hint) if hint.isdecimal() else None)
        target = self.target
        if code == "UNAVAILABLE":
            return self._unreachable(details)
        if code == "DEADLINE_EXCEEDED":
            return self.too_late(timeout_s)
        if code == "CANCELLED":  # not by us: a server that closes cuts off the calls that come too late
            return NotReadyError(
                f"the server at {target} has closed, or more calls wait than it reads ({details}); "
                "connect to another, or again later"
            )
        if code == "RESOURCE_EXHAUSTED":  # by gRPC itself: the message is too large
            return InvalidRequestError(
                f"the message to or from {target} is too large ({details}); send fewer rows"
            )
        if code == "UNIMPLEMENTED":
            return NotReadyError(f"the server at {target} is not an rsm-serve ({details}); check the address")
        return RequestError(f"the call to {target} failed: {code}: {details}")

    def _unreachable(self, details: str) -> RequestError:
        target = self.target
        if "Hostname Verification" in details:
            name = (self.tls and self.tls.server_name) or target.address.rpartition(":")[0]
            return UnauthenticatedError(
                f"wanted a certificate for {name} from the server at {target}, got one for another name; "
                "connect by the name in its certificate, or give it as server_name"
            )
        if "certificate has expired" in details or "certificate is not yet valid" in details:
            return UnauthenticatedError(
                f"wanted a certificate that is valid now from the server at {target}, got one "
                f"{_server_dates(target.address)}; set the clock of this machine, or renew the certificate"
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
        if closed and self.tls is not None and (dates := self.tls.outside_dates()):
            return UnauthenticatedError(
                f"the server at {target} closed the connection ({details}), and the client's certificate in "
                f"{self.tls.cert} is {dates}; set the clock of this machine, or renew the certificate"
            )
        hint = "start one with rsm-serve, or check the address"
        if closed:
            hint += (
                f"; if it serves TLS, connect with {TLS_SCHEME}"
                if self.tls is None
                else f"; if it wants a client's certificate, give cert and key ({CERT_VARIABLE}, ...)"
            )
        return NotReadyError(f"no policy server answers at {target} ({details}); {hint}")


def _server_dates(address: str) -> str:
    """The validity dates of a server's certificate as text, as far as the server shows one."""
    from rsm_serve.security.x509 import server_certificate

    host, _, port = address.rpartition(":")
    certificate = server_certificate(host.strip("[]"), int(port), DATES_S) if port.isdecimal() else None
    now = datetime.now(timezone.utc)
    dates = "" if certificate is None else certificate.outside(now)
    return dates or f"whose chain is expired or not yet valid at {now:%Y-%m-%d %H:%M} (UTC)"


def methods(channel: Any, connection: Connection) -> tuple[Callable[..., Any], ...]:
    """GetSpec, Act and ActStream of `rsm.v1.PolicyService` over a channel of either kind."""

    def method(make: Callable[..., Any], name: str, request: Any, response: Any) -> Callable[..., Any]:
        call: Callable[..., Any] = make(f"/{SERVICE}/{name}", request.SerializeToString, response.FromString)
        if not connection.metadata:
            return call
        # Not a partial, whose repr would show the token.
        return lambda *requests, **settings: call(*requests, metadata=connection.metadata, **settings)

    return (
        method(channel.unary_unary, "GetSpec", pb.GetSpecRequest, pb.GetSpecResponse),
        method(channel.unary_unary, "Act", pb.ActRequest, pb.ActResponse),
        method(channel.stream_stream, "ActStream", pb.ActRequest, pb.ActResponse),
    )
