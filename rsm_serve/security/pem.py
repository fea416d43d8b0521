"""Certificates and keys from files of PEM, checked before gRPC gets them, which hardly says what is wrong."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsm_common.errors import ConfigError

_EC = bytes.fromhex("06072a8648ce3d0201")
_KEY_KINDS = (
    bytes.fromhex("06092a864886f70d010101"),  # rsaEncryption
    _EC + bytes.fromhex("06082a8648ce3d030107"),  # P-256
    _EC + bytes.fromhex("06052b81040022"),  # P-384
)
"""How a certificate names the kind of its key: object identifiers (RFC 3279 and 5480), in DER."""


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
        ConfigError: a file cannot be read, is something else, or the key is not the certificate's, or of a
            kind that gRPC does not take.
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
        if not _usable(pems.cert):
            raise ConfigError(
                f"wanted a certificate for an RSA, P-256 or P-384 key in {cert}, got one for another "
                "kind, which gRPC does not take; make another key"
            )
    return pems


def _usable(chain: bytes | None) -> bool:
    """Whether gRPC's TLS takes the first certificate's kind of key; Python's takes more."""
    first = re.search(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", chain or b"", re.DOTALL)
    if first is None:
        return False
    encoded = ssl.PEM_cert_to_DER_cert(first[0].decode("ascii", "replace"))
    return any(kind in encoded for kind in _KEY_KINDS)


def _content(path: str | Path | None) -> bytes | None:
    try:
        return None if path is None else Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"wanted to read {path}, got: {error.strerror}; check the path") from None


def _reason(error: Any) -> str:
    return getattr(error, "strerror", None) or str(error)
