"""Addresses: how they are written, and whether one is free to listen on."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
from pathlib import Path
from typing import Any

from rsm_common.errors import AddressError

UNIX = "unix:"
MAX_PORT = 65_535
_UNIX_PATH_BYTES = 107
"""What sockaddr_un holds."""


def split_address(address: str, *, unix: bool = True) -> tuple[str, int]:
    """(host, port) of 'host:port' or '[v6 host]:port'.

    Args:
        address: the text.
        unix: whether 'unix:/path' is possible in its place, for the error.

    Raises:
        AddressError: it is neither, or the port is above 65535.
    """
    if _is_v6(address):
        raise AddressError(f"wanted brackets around an IPv6 host, such as [::1]:8001, got {address!r:.200}")
    host, _, port = address.rpartition(":")
    inner = host[1:-1] if host.startswith("[") and host.endswith("]") else ""
    if not host or (":" in host and not inner) or (inner and not _is_v6(inner)) or not _is_number(port):
        forms = "127.0.0.1:8001, [::1]:8001 or unix:/path" if unix else "127.0.0.1:8002 or [::1]:8002"
        raise AddressError(f"wanted an address such as {forms}, got {address!r:.200}")
    if len(port) > 5 or int(port) > MAX_PORT:
        raise AddressError(
            f"wanted a port from 0 to {MAX_PORT} in an address such as 127.0.0.1:8001, got {address!r:.200}"
        )
    return inner or host, int(port)


def _is_v6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def _is_number(port: str) -> bool:
    return port.isascii() and port.isdecimal()


def with_port(address: str, port: int) -> str:
    """'host:port' with another port."""
    return f"{address.rpartition(':')[0]}:{port}"


def unix_path(address: str) -> Path | None:
    """The path of 'unix:/path', or None for another kind of address.

    Raises:
        AddressError: the path is empty, or longer than a socket's may be.
    """
    if not address.startswith(UNIX):
        return None
    path = address.removeprefix(UNIX)
    if not path or len(os.fsencode(path)) > _UNIX_PATH_BYTES:
        raise AddressError(
            f"wanted a socket path of 1 to {_UNIX_PATH_BYTES} bytes, got {address!r:.200}; choose a shorter one"
        )
    return Path(path)


def is_loopback(host: str) -> bool:
    """Whether a host name or number, brackets or not, stays on this machine; names are not looked up."""
    host = host.strip("[]").lower()
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_unexposed(address: str) -> None:
    """Make sure that other machines cannot reach a server at the address.

    Raises:
        AddressError: other machines reach it, the name cannot be looked up, or it is not an address.
    """
    if unix_path(address) is not None:
        return
    host, port = split_address(address)
    if not all(is_loopback(str(info[4][0])) for info in _look_up(address, host, port)):
        raise AddressError(
            f"wanted TLS, because other machines reach {address} and could read every message; "
            "give --tls-cert and --tls-key, choose 127.0.0.1, or accept that with --insecure"
        )


def check_free(address: str) -> None:
    """Make sure that a server can listen on the address, with the reason if not.

    gRPC alone would give no reason, would take over the unix socket of a live server, and for a name
    with several numbers (localhost) would be content with one of them.

    Raises:
        AddressError: in use, not of this machine, not permitted, or not an address.
    """
    path = unix_path(address)
    if path is not None:
        _check_unix(address, path)
        return
    host, port = split_address(address)
    found = _look_up(address, host, port)
    failures = [failure for info in found if (failure := _try_bind(info[0], info[4])) is not None]
    busy = [failure for failure in failures if failure.errno == errno.EADDRINUSE]
    if busy:
        raise AddressError(
            f"wanted to listen on {address}, but the port is in use; "
            "stop the other server or choose another --address"
        )
    if len(failures) == len(found):
        raise AddressError(
            f"wanted to listen on {address}, got: {failures[0].strerror}; choose another --address"
        )


def _look_up(address: str, host: str, port: int) -> list[tuple[Any, ...]]:
    try:
        return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE))
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AddressError(
            f"wanted to listen on {address}, got: {reason}; use a host name or number of this machine"
        ) from None


def _try_bind(family: int, where: tuple[object, ...]) -> OSError | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As gRPC does: connections of a server that has just left do not count as in use.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(where)
            probe.listen(1)
    except OSError as error:
        return error
    return None


def _check_unix(address: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise AddressError(f"wanted to listen on {address}, but {path.parent} is no directory; create it first")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise AddressError(f"wanted to listen on {address}, but there is a file at {path}; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return  # left behind by a server that is gone; gRPC replaces it
    raise AddressError(
        f"wanted to listen on {address}, but another server does; stop it or choose another --address"
    )
