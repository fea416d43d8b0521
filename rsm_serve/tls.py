"""The server's side of TLS: certificates from files, used anew when the files change."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from rsm_serve.config import ServerConfig
from rsm_serve.errors import ConfigError
from rsm_serve.watched import Watched, warn_if_public


@dataclass(frozen=True)
class _Pems:
    """The content of the files."""

    cert: bytes
    key: bytes
    client_ca: bytes | None


def server_credentials(config: ServerConfig) -> Any | None:
    """gRPC's credentials for the certificates of a configuration; None if it has none.

    Renewed files are noticed at the next connection, at most once a second; connections that are open stay.
    Where the new ones are wrong, or only half of them is there yet, the old ones go on.

    Raises:
        ConfigError: the files cannot be read, are not PEM, or do not belong together.
    """
    cert, key, client_ca = config.tls_cert, config.tls_key, config.tls_client_ca
    if cert is None or key is None:
        return None
    warn_if_public(key)
    paths = [path for path in (cert, key, client_ca) if path is not None]
    watched = Watched(paths, lambda: _read(cert, key, client_ca))
    used = watched.value

    def renewed() -> Any | None:
        nonlocal used
        before, used = used, watched.value
        return None if used is before else _configuration(used)  # None: go on with what is there

    return grpc.dynamic_ssl_server_credentials(
        _configuration(used), renewed, require_client_authentication=client_ca is not None
    )


def _configuration(pems: _Pems) -> Any:
    return grpc.ssl_server_certificate_configuration([(pems.key, pems.cert)], root_certificates=pems.client_ca)


def _read(cert: Path, key: Path, client_ca: Path | None) -> _Pems:
    pems = _Pems(_content(cert), _content(key), None if client_ca is None else _content(client_ca))
    # gRPC itself says nothing about a pair that it cannot use but that it could not bind.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, password=lambda: b"")  # otherwise the terminal is asked for one
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"wanted a PEM certificate chain in {cert} and its private key, without a password, in {key}, "
            f"got: {_reason(error)}; check both files"
        ) from None
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"wanted certificates of authorities, as PEM, in {client_ca}, got: {_reason(error)}; "
                "check the file"
            ) from None
    return pems


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"wanted to read {path}, got: {error.strerror}; check --tls-...") from None


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
