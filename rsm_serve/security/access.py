"""The rules for bearer tokens: every method needs one, except those for probes.

This module does not know gRPC; a method is its full name, `/package.Service/Method`.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
from collections.abc import AsyncIterator, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rsm_common.errors import ConfigError, PermissionDeniedError, UnauthenticatedError
from rsm_serve.security.token_files import AUTHORIZATION, read_tokens, shown
from rsm_serve.security.watched_files import Watched, warn_if_public

Message = TypeVar("Message")

OPEN = ("/grpc.health.v1.Health/", "/grpc.reflection.")
"""Services without a token: health, and the description of the protocol."""
OPEN_METHODS = frozenset(
    f"/inference.GRPCInferenceService/{name}" for name in ("ServerLive", "ServerReady", "ModelReady")
)
ADMIN_METHODS = frozenset(
    f"/inference.GRPCInferenceService/{name}" for name in ("RepositoryModelLoad", "RepositoryModelUnload")
)


class Role(enum.IntEnum):
    """What a token allows; a higher role includes the lower ones."""

    NOBODY = 0
    ACT = 1
    ADMIN = 2


@dataclass(frozen=True)
class Grant:
    """The permission of one call."""

    role: Role
    needed: Role
    access: Access
    digest: bytes = field(repr=False)

    def check(self) -> None:
        """Check that the token is still in the file; for calls that last.

        Raises:
            UnauthenticatedError: the token was removed from the file.
        """
        if self.access.role(self.digest) < self.needed:
            raise UnauthenticatedError(
                "wanted a token of this server, got one that was removed from its file; use another token"
            )


GRANT: ContextVar[Grant | None] = ContextVar("GRANT", default=None)
"""The permission of the call that runs in this context; None on a server without tokens."""


class Access:
    """The rules of a server, over its token files.

    Args:
        act: file of tokens that may act; None: acting needs no token.
        admin: file of tokens that may also load and unload; None: no token may.

    Raises:
        ConfigError: a file cannot be used, or both have the same token.
    """

    def __init__(self, act: Path | None, admin: Path | None) -> None:
        self._act, self._admin = _watch(act), _watch(admin)
        if self._act and self._admin and {*self._act.value} & {*self._admin.value}:
            raise ConfigError(
                f"wanted different tokens in {act} and {admin}, got the same token in both; make one of "
                "them anew, in a file of its own, with: openssl rand -hex 32"
            )

    def grant(self, method: str, metadata: Iterable[tuple[str, Any]]) -> Grant:
        """Give a call its permission.

        Raises:
            UnauthenticatedError: it needs a token and has none, or one that is unknown.
            PermissionDeniedError: its token does not allow the method.
        """
        needed = self._needed(method)
        token = next((shown(str(value)) for key, value in metadata if key == AUTHORIZATION), "")
        digest = _digest(token)
        role = self.role(digest) if token else Role.NOBODY
        if role >= needed:
            return Grant(role, needed, self, digest)
        if role is not Role.NOBODY:
            raise PermissionDeniedError(
                "wanted an admin token to load or unload, got one that may only act; use one of "
                "--admin-token-file"
            )
        got = "one that this server does not know" if token else "none"
        raise UnauthenticatedError(
            f"wanted the metadata 'authorization: Bearer TOKEN' with a token of this server, got {got}; "
            "give the client one (RSM_TOKEN, token=)"
        )

    def role(self, digest: bytes) -> Role:
        """The role of a token, by its digest."""
        if self._admin is not None and _among(digest, self._admin.value):
            return Role.ADMIN
        return Role.ACT if self._act is not None and _among(digest, self._act.value) else Role.NOBODY

    def _needed(self, method: str) -> Role:
        if method.startswith(OPEN) or method in OPEN_METHODS:
            return Role.NOBODY
        if method in ADMIN_METHODS and self._admin is not None:
            return Role.ADMIN
        return Role.NOBODY if self._act is None else Role.ACT


def while_granted(messages: AsyncIterator[Message]) -> AsyncIterator[Message]:
    """The messages of a call, as long as its token is valid.

    Raises:
        UnauthenticatedError: while iterating, when the token was removed from its file.
    """
    grant = GRANT.get()
    return messages if grant is None else _checked(messages, grant)


async def _checked(messages: AsyncIterator[Message], grant: Grant) -> AsyncIterator[Message]:
    async for message in messages:
        grant.check()
        yield message


def _watch(path: Path | None) -> Watched[tuple[bytes, ...]] | None:
    if path is None:
        return None
    warn_if_public(path)
    return Watched([path], lambda: tuple(map(_digest, read_tokens(path))))


def _digest(token: str) -> bytes:
    # All digests have one length, so that the time of a comparison does not show the length of a token.
    return hashlib.sha256(token.encode()).digest()


def _among(digest: bytes, known: Iterable[bytes]) -> bool:
    """True if it is one of them. The time shows neither which one, nor how many bytes are right."""
    return sum([hmac.compare_digest(digest, other) for other in known]) > 0
