"""Certificates and keys from PEM files, checked before gRPC gets them: gRPC does not say what is wrong."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsm_common.errors import ConfigError
from rsm_serve.security.x509 import first_certificate

_EC = bytes.fromhex("06072a8648ce3d0201")
_KEY_KINDS = (
    bytes.fromhex("06092a864886f70d010101"),  # rsaEncryption
    _EC + bytes.fromhex("06082a8648ce3d030107"),  # P-256
    _EC + bytes.fromhex("06052b81040022"),  # P-384
)
"""Kinds of keys that gRPC takes, as in `Certificate.key_kind` (RFC 3279 and 5480)."""


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
        ConfigError: a file cannot be read, is not PEM, the key does not belong to the certificate, or its kind
            is one that gRPC does not take.
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
            # An empty password keeps ssl from asking for one on the terminal.
            context.load_cert_chain(cert, key, password=lambda: b"")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"wanted a PEM certificate chain in {cert} and its private key, without a password, in {key}, "
                f"got: {_reason(error)}; check both files"
            ) from None
        if not _usable(pems.cert):
            raise ConfigError(
                f"wanted a certificate for an RSA, P-256 or P-384 key in {cert}, got one for another "
                "kind, which gRPC does not take; make another key and a certificate for it"
            )
    return pems


def _usable(chain: bytes | None) -> bool:
    """True if gRPC's TLS takes the first certificate's kind of key; Python's TLS takes more kinds."""
    certificate = first_certificate(chain or b"")
    return certificate is not None and certificate.key_kind.startswith(_KEY_KINDS)


def _content(path: str | Path | None) -> bytes | None:
    try:
        return None if path is None else Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"wanted to read {path}, got: {error.strerror}; check the path") from None


def _reason(error: Any) -> str:
    return getattr(error, "strerror", None) or str(error)
