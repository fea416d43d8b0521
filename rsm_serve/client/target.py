"""How a client names a policy: the server's address, the policy and its version."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rsm_common.errors import AddressError, InvalidRequestError
from rsm_serve.addresses import UNIX, is_loopback, split_address, unix_path

SCHEME, TLS_SCHEME = "grpc://", "grpcs://"
_UNIX_SCHEME = f"grpc:{UNIX}"
_UNIX_SOURCE = re.compile(rf"grpc:(?P<address>{UNIX}.*[^/])/(?P<policy>[^/:]+)(?::(?P<version>[^/:]+))?")


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
        """Read an address and what stands beside it.

        Args:
            address: 'host:port', '[v6 host]:port', 'unix:/path', 'grpc://host:port/NAME[:VERSION]', with TLS
                'grpcs://...', or 'grpc:unix:/path/NAME[:VERSION]'.
            policy: its name, if the address has none.
            version: its version, if the address has none.

        Raises:
            InvalidRequestError: none of these, a port above 65535, not UTF-8, or two different policies or
                versions.
        """
        name, number = _text("policy", policy), _text("version", version)
        bare, url_name, url_number, tls = _split_url(_text("address", address))
        if (url_name and name not in ("", url_name)) or (url_number and number not in ("", url_number)):
            raise InvalidRequestError(
                f"wanted one policy, got {':'.join(filter(None, (url_name, url_number)))!r} in the address and "
                f"{':'.join(filter(None, (name, number)))!r} beside it; leave one of them out"
            )
        _check_reachable(bare)
        return cls(bare, name or url_name, number or url_number, tls)

    @property
    def host(self) -> str:
        """The host's name or number without brackets; empty for a unix socket."""
        return "" if self.is_unix else split_address(self.address)[0]

    @property
    def is_unix(self) -> bool:
        """Whether the address is a unix socket."""
        return self.address.startswith(UNIX)

    @property
    def is_local(self) -> bool:
        """Whether the address is a unix socket or a loopback address of this machine."""
        return self.is_unix or is_loopback(self.host)

    def __str__(self) -> str:
        return self.address


def _text(what: str, value: object) -> str:
    """The argument as text; empty for None."""
    if value is None and what != "address":
        return ""
    if isinstance(value, int) and not isinstance(value, bool) and what == "version":
        return str(value)
    if not isinstance(value, str):
        raise InvalidRequestError(f"wanted the {what} as text, got {type(value).__name__}; give a str")
    try:
        value.encode()
    except UnicodeEncodeError:  # a byte of the command line that is not UTF-8, which gRPC does not carry
        raise InvalidRequestError(
            f"wanted an address, policy and version of UTF-8, got {value!r:.200}; check the terminal's encoding"
        ) from None
    return value


def _split_url(address: str) -> tuple[str, str, str, bool]:
    """(bare address, policy, version, TLS) of an address with or without a scheme."""
    if address.startswith(_UNIX_SCHEME):
        match = _UNIX_SOURCE.fullmatch(address)
        if match is None:
            raise InvalidRequestError(
                f"wanted a unix socket and a policy as {_UNIX_SCHEME}/path/NAME, got {address!r:.200}; "
                f"give {UNIX}/path for a socket alone"
            )
        return match["address"], match["policy"], match["version"] or "", False
    scheme = next((prefix for prefix in (SCHEME, TLS_SCHEME) if address.startswith(prefix)), "")
    if not scheme:
        return address, "", "", False
    bare, _, path = address.removeprefix(scheme).partition("/")
    if bare.startswith(UNIX):
        raise InvalidRequestError(
            f"wanted a unix socket as {UNIX}/path or {_UNIX_SCHEME}/path/NAME, got {address!r:.200}; "
            f"leave out the slashes of {scheme}"
        )
    name, _, number = path.partition(":")
    return bare, name, number, scheme == TLS_SCHEME


def _check_reachable(address: str) -> None:
    """Make sure that a client can connect to an address of this form."""
    try:
        if unix_path(address) is not None:
            return
        port = split_address(address)[1]
    except AddressError as error:
        hint = f"; a policy's name goes into {SCHEME}127.0.0.1:8001/NAME" if "/" in address else ""
        raise InvalidRequestError(f"{error}{hint}") from None
    if port == 0:
        raise InvalidRequestError(
            f"wanted a port from 1 to 65535, got {address!r}; rsm-serve prints its port when it is ready"
        )
