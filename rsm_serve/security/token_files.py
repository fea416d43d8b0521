"""Bearer tokens in files: one per line, `#` before comments, several while one replaces another."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from rsm_common.errors import ConfigError

MIN_TOKEN_CHARS = 16
MAX_TOKEN_CHARS = 1024
MAX_TOKENS = 1000
"""Tokens of one file; the token of a call is compared with each."""
_MAX_FILE_BYTES = 1 << 20
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750

AUTHORIZATION = "authorization"
"""Key of the metadata that carries a token."""
_SCHEME = "bearer "


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata for a token; empty for an empty token."""
    return ((AUTHORIZATION, f"Bearer {token}"),) if token else ()


def shown(authorization: str) -> str:
    """The token in the value of the metadata; empty if the value has another form."""
    scheme, token = authorization[: len(_SCHEME)], authorization[len(_SCHEME) :]
    return token.strip() if scheme.lower() == _SCHEME else ""


def read_tokens(path: Path, *, of_server: bool = True) -> tuple[str, ...]:
    """The tokens of a file, at least one. No error repeats the file's content.

    Args:
        path: the file.
        of_server: whether the file says what the tokens are; a client's file can only repeat one.

    Raises:
        ConfigError: the file cannot be read, is empty, or has a line that is not a token.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise ConfigError(f"wanted to read tokens in {path}, got: {error.strerror}; check the file") from None
    lines = [line.partition("#")[0].strip() for line in content.splitlines()]
    for number, line in enumerate(lines, 1):
        if line:
            check_token_format(line, f"in line {number} of {path}", of_server=of_server)
    tokens = tuple(filter(None, lines))
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise ConfigError(
            f"wanted 1 to {MAX_TOKENS} tokens in {path}, one a line, got {len(tokens)}; "
            + (
                "remove those that no client uses"
                if tokens
                else _remedy(of_server, f" > {shlex.quote(str(path))}")
            )
        )
    return tokens


def check_token_format(token: str, where: str, *, of_server: bool = True) -> str:
    """Return the token; `where` is for the error, `of_server` as in `read_tokens`.

    Raises:
        ConfigError: it is not a token, or too short to be a secret.
    """
    if not (MIN_TOKEN_CHARS <= len(token) <= MAX_TOKEN_CHARS and _TOKEN.fullmatch(token)):
        raise ConfigError(
            f"wanted {MIN_TOKEN_CHARS} to {MAX_TOKEN_CHARS} letters, digits and . _ ~ + / - as token {where}, "
            f"got {len(token)} characters, or others; {_remedy(of_server)}"
        )
    return token


def _remedy(of_server: bool, into: str = "") -> str:
    return f"make one with: openssl rand -hex 32{into}" if of_server else "give a token of the server's file"
