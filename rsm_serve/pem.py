"""Certificates and keys from files of PEM, checked before gRPC gets them, which hardly says what is wrong."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsm_serve.errors import ConfigError


@dataclass(frozen=True)
class Pems:
    """The content of the files; None for each that was not given."""

    ca: bytes | None
    cert: bytes | None
    key: bytes | None


def read_pems(ca: str | Path | None, cert: str | Path | None, key: str | Path | None) -> Pems:
    """Read the files and make sure that they belong together.

    Args:
        ca: certificates of authorities.
        cert: a chain of certificates; only with `key`.
        key: the private key of the first of them, without a password.

    Raises:
        ConfigError: a file cannot be read, is something else, or the key is not the certificate's.
    """
    pems = Pems(*map(_content, (ca, cert, key)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if ca is not None:
        try:
            context.load_verify_locations(ca)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"wanted certificates of authorities, as PEM, in {ca}, got: {_reason(error)}; check the file"
            ) from None
    if cert is not None and key is not None:
        try:
            # Without a password of ours the terminal would be asked for one.
            context.load_cert_chain(cert, key, password=lambda: b"")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"wanted a PEM certificate chain in {cert} and its private key, without a password, in {key}, "
                f"got: {_reason(error)}; check both files"
            ) from None
    return pems


def _content(path: str | Path | None) -> bytes | None:
    try:
        return None if path is None else Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"wanted to read {path}, got: {error.strerror}; check the path") from None


def _reason(error: Any) -> str:
    return getattr(error, "strerror", None) or str(error)
