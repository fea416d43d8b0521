"""The two parts of a certificate that the standard library does not show: validity dates and kind of key.

A certificate is DER (X.690) of the structure in RFC 5280, section 4.1. Nothing is verified here.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone

_VERSION, _UTC_TIME, _GENERALIZED_TIME = 0xA0, 0x17, 0x18
_VALIDITY, _KEY_INFO = 3, 5  # places in tbsCertificate, the optional version left out


@dataclass(frozen=True)
class Certificate:
    """What a certificate says about itself."""

    not_before: datetime
    not_after: datetime
    key_kind: bytes
    """Kind of the public key, as the DER of the identifiers in its AlgorithmIdentifier."""

    def outside(self, now: datetime) -> str:
        """The validity dates as text if `now` is not within them, else an empty text."""
        if self.not_before <= now <= self.not_after:
            return ""
        return (
            f"valid from {_shown(self.not_before)} to {_shown(self.not_after)}, while the clock of this "
            f"machine says {_shown(now)} (UTC)"
        )


def first_certificate(pem: bytes) -> Certificate | None:
    """The first certificate of a PEM file; None if there is none that can be read."""
    block = re.search(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", pem, re.DOTALL)
    if block is None:
        return None
    try:
        return read_certificate(ssl.PEM_cert_to_DER_cert(block[0].decode("ascii", "replace")))
    except ValueError:
        return None


def server_certificate(host: str, port: int, timeout_s: float) -> Certificate | None:
    """The certificate that a server shows, valid or not; None if the server shows none in time.

    Args:
        host: a name or number.
        port: of the server.
        timeout_s: for each step of the connection, > 0.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # no secret is sent
    context.set_alpn_protocols(["h2"])  # gRPC's server wants it
    try:
        with (
            socket.create_connection((host, port), timeout_s) as connection,
            context.wrap_socket(connection, server_hostname=host) as tls,
        ):
            return read_certificate(tls.getpeercert(binary_form=True) or b"")
    except (OSError, ValueError):
        return None


def read_certificate(der: bytes) -> Certificate:
    """Read a certificate.

    Raises:
        ValueError: it is not DER of a certificate.
    """
    try:
        (_, certificate), *_ = _elements(der)
        (_, signed), *_ = _elements(certificate)
        fields = [content for tag, content in _elements(signed) if tag != _VERSION]
        not_before, not_after = (_time(tag, content) for tag, content in _elements(fields[_VALIDITY]))
        (_, key_kind), *_ = _elements(fields[_KEY_INFO])
    except IndexError as error:
        raise ValueError(f"a certificate with too few fields: {error}") from None
    return Certificate(not_before, not_after, key_kind)


def _elements(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(tag, content) of each element in a row.

    Raises:
        ValueError: an element is longer than the content.
    """
    at = 0
    while at < len(content):
        tag, size, at = content[at], content[at + 1], at + 2
        if size & 0x80:  # the length has so many bytes of its own
            digits = size & 0x7F
            size, at = int.from_bytes(content[at : at + digits], "big"), at + digits
        if at + size > len(content):
            raise ValueError(f"an element of {size} bytes where {len(content) - at} are left")
        yield tag, content[at : at + size]
        at += size


def _time(tag: int, content: bytes) -> datetime:
    text = content.decode("ascii")
    if tag == _UTC_TIME:  # two digits of the year: 1950 to 2049
        text = ("19" if text[:2] >= "50" else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError(f"a date of kind {tag}")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=timezone.utc)


def _shown(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M}"
