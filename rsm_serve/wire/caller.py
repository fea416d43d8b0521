"""What a request may say about itself to the scheduler; the same limits on both sides of the wire."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from rsm_common.errors import InvalidRequestError

MAX_PRIORITY = 10
"""Priorities go from -MAX_PRIORITY to MAX_PRIORITY; 0 is usual, higher goes first."""
PRIORITY_STEP_S = 0.1
"""A request is queued as if it had come this much earlier for each step of its priority. So every request gets
its turn: 2 * MAX_PRIORITY * PRIORITY_STEP_S = 2 s after it came, it goes before all new requests."""
MAX_CLIENT_ID_BYTES = 128


@dataclass(frozen=True)
class Caller:
    """What a request says about its caller, known before it is decoded; see `Registry.find`."""

    client_id: str
    """Empty: none was given."""
    priority: int
    """Higher goes first, 0 is usual."""
    seed: int | None
    """The first seed of the request; None if it has none, or if it is invalid, which a later check reports."""
    fixed: bool
    """The request is deterministic, or brings its noise."""


def check_priority(priority: int) -> int:
    """Return the priority.

    Raises:
        InvalidRequestError: not an integer, or out of range.
    """
    try:
        number = operator.index(priority)
    except TypeError:
        number = MAX_PRIORITY + 1
    if not -MAX_PRIORITY <= number <= MAX_PRIORITY:
        raise InvalidRequestError(
            f"wanted an integer priority from {-MAX_PRIORITY} to {MAX_PRIORITY}, got {priority!r:.60}; "
            "0 is usual"
        )
    return number


def check_rows(rows: int, limit: int) -> int:
    """Return the number of rows of a request.

    Raises:
        InvalidRequestError: none, or more than one batch holds.
    """
    if not 1 <= rows <= limit:
        raise InvalidRequestError(
            f"wanted 1 to {limit} rows in one request, got {rows}; "
            "split it, or raise --max-batch-size of the server"
        )
    return rows


def check_client_id(client_id: str) -> str:
    """Return the name by which a client wants to be known; empty for none.

    Raises:
        InvalidRequestError: not text, too long, or not UTF-8.
    """
    if not isinstance(client_id, str):
        raise InvalidRequestError(f"wanted a client_id as text, got {type(client_id).__name__}; give a str")
    try:
        # A character has one byte at least: a name of megabytes need not be encoded to be judged.
        too_long = len(client_id) > MAX_CLIENT_ID_BYTES or len(client_id.encode()) > MAX_CLIENT_ID_BYTES
    except UnicodeEncodeError:
        raise InvalidRequestError(f"wanted a client_id of UTF-8, got {client_id!r}; choose another") from None
    if too_long:
        raise InvalidRequestError(
            f"wanted a client_id of at most {MAX_CLIENT_ID_BYTES} bytes, got one of {len(client_id)} "
            "characters; use a short name or a UUID"
        )
    return client_id
