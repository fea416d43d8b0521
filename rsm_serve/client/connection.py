"""How a client reaches a server and shows who it is: channel options, TLS, token."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import grpc

from rsm_common.errors import ConfigError, InvalidRequestError
from rsm_serve.client.target import Target
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.security.token_files import bearer, check_token_format
from rsm_serve.wire.codec import MAX_MESSAGE_BYTES, SERVICE

TOKEN_VARIABLE = "RSM_TOKEN"
CA_VARIABLE, CERT_VARIABLE, KEY_VARIABLE = "RSM_TLS_CA", "RSM_TLS_CERT", "RSM_TLS_KEY"

RECONNECT_OPTIONS = (
    # By default gRPC waits longer after each failed attempt, up to two minutes. A robot must not wait longer
    # than a second for a server that is back.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Under this name gRPC keeps the time limit of one attempt, 20 s by default. A machine that is off drops the
    # attempt without an answer. Within 5 s the kernel repeats it after 1 s and 3 s, so that no pause is longer
    # than 2 s; a slow TLS handshake still fits.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    # By default a host name is looked up at most every 30 s, but a container may return with another address.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
)
CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A silent network loss is noticed within 30 s even while no call is open.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.enable_retries", 0),
    # Each client has its own connection, so a dead connection is never shared.
    ("grpc.use_local_subchannel_pool", 1),
    *RECONNECT_OPTIONS,
)
PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Where gRPC looks for a proxy, in this order."""
_EXCEPTION_VARIABLES = ("no_grpc_proxy", "no_proxy")


@dataclass(frozen=True)
class Tls:
    """The PEM files by which a client trusts a server and shows who it is."""

    ca: str | Path | None = None
    """Certificates of the trusted authorities; None: the public authorities that gRPC knows."""
    cert: str | Path | None = None
    """The client's own certificate chain, for a server with --tls-client-ca."""
    key: str | Path | None = None
    """The private key of `cert`."""
    server_name: str | None = None
    """The name in the server's certificate, if it differs from the host of the address."""

    @classmethod
    def from_environment(cls) -> Tls:
        """From RSM_TLS_CA, RSM_TLS_CERT and RSM_TLS_KEY, each of which may be missing."""
        ca, cert, key = (os.environ.get(name) or None for name in (CA_VARIABLE, CERT_VARIABLE, KEY_VARIABLE))
        return cls(ca, cert, key)

    def credentials(self) -> Any:
        """The credentials in gRPC's form.

        Raises:
            InvalidRequestError: a file cannot be used, or only one of cert and key is there.
        """
        from rsm_serve.security.pem import read_pems  # imports ssl, which is slow and only TLS needs

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
    """A way to a server; opens channels."""

    target: Target
    tls: Tls | None
    """None: plaintext."""
    metadata: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Metadata of every call: the token."""

    @classmethod
    def to(cls, target: Target, tls: Tls | None = None, token: str | None = None) -> Connection:
        """Decide on TLS and token.

        Args:
            target: where to.
            tls: switches TLS on; None: the settings of the environment for grpcs://, else plaintext.
            token: None: the environment variable RSM_TOKEN; empty: no token.

        Raises:
            InvalidRequestError: TLS for a unix socket, or a malformed token.
        """
        if tls is not None and not isinstance(tls, Tls):
            raise InvalidRequestError(f"wanted tls as a Tls, got {type(tls).__name__}; give Tls(ca=...)")
        if tls is None and target.tls:
            tls = Tls.from_environment()
        if tls is not None and target.is_unix:
            raise InvalidRequestError(
                f"wanted host:port together with TLS, got {target}; leave tls out for a unix socket"
            )
        where = "of this client" if token is not None else f"in {TOKEN_VARIABLE}"
        secret = os.environ.get(TOKEN_VARIABLE, "").strip() if token is None else token
        if not isinstance(secret, str):
            raise InvalidRequestError(f"wanted a token as text, got {type(secret).__name__}; give a str")
        try:
            return cls(
                target, tls, bearer(check_token_format(secret, where, of_server=False) if secret else "")
            )
        except ConfigError as error:
            raise InvalidRequestError(str(error)) from None

    def channel(self) -> Any:
        """A new `grpc.Channel`."""
        return self._open(grpc.insecure_channel, grpc.secure_channel)

    def aio_channel(self) -> Any:
        """A new `grpc.aio.Channel`, of the event loop that is running."""
        import grpc.aio

        return self._open(grpc.aio.insecure_channel, grpc.aio.secure_channel)

    @property
    def proxy_variable(self) -> str:
        """The environment variable whose proxy gRPC uses for this address; empty if it uses none."""
        name = next((name for name in PROXY_VARIABLES if os.environ.get(name)), "")
        if not name or self.target.is_local:
            return ""
        exceptions = next((os.environ[other] for other in _EXCEPTION_VARIABLES if other in os.environ), "")
        hosts = [host.strip() for host in exceptions.split(",") if host.strip()]
        return "" if any(self.target.host.endswith(host) for host in hosts) else name

    def options(self) -> tuple[tuple[str, int | str], ...]:
        """The channel options."""
        name = None if self.tls is None else self.tls.server_name
        return (
            *CHANNEL_OPTIONS,
            # A proxy reaches its own loopback addresses, not those of this machine.
            *((("grpc.enable_http_proxy", 0),) if self.target.is_local else ()),
            *((("grpc.ssl_target_name_override", name),) if name else ()),
        )

    def _open(self, insecure: Callable[..., Any], secure: Callable[..., Any]) -> Any:
        if self.tls is None:
            return insecure(self.target.address, options=self.options())
        return secure(self.target.address, self.tls.credentials(), options=self.options())


def methods(channel: Any, metadata: tuple[tuple[str, str], ...]) -> tuple[Callable[..., Any], ...]:
    """GetSpec, Act and ActStream of `rsm.v1.PolicyService` over a channel of either kind."""

    def method(make: Callable[..., Any], name: str, request: Any, response: Any) -> Callable[..., Any]:
        call: Callable[..., Any] = make(f"/{SERVICE}/{name}", request.SerializeToString, response.FromString)
        if not metadata:
            return call
        # Not a partial, whose repr would show the token.
        return lambda *requests, **settings: call(*requests, metadata=metadata, **settings)

    return (
        method(channel.unary_unary, "GetSpec", pb.GetSpecRequest, pb.GetSpecResponse),
        method(channel.unary_unary, "Act", pb.ActRequest, pb.ActResponse),
        method(channel.stream_stream, "ActStream", pb.ActRequest, pb.ActResponse),
    )
