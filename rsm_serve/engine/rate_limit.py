"""The rate limit of each client; pure, because the caller passes the time."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from rsm_common.errors import LimitReachedError

MAX_CLIENTS = 16_384
"""Most clients whose rate is remembered; the client with the oldest last request is forgotten first."""


class _Bucket(NamedTuple):
    tokens: float
    at_s: float


class RateLimiter:
    """A token bucket per client: `rate_hz` on average, and the requests of up to one second at once.

    Args:
        rate_hz: requests a second of one client, > 0.
        clients: see `MAX_CLIENTS`.
    """

    def __init__(self, rate_hz: float, clients: int = MAX_CLIENTS) -> None:
        self._rate_hz = rate_hz
        self._size = max(1.0, rate_hz)
        self._clients = clients
        self._buckets: OrderedDict[tuple[str, str], _Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, client_id: str, peer: str, now: float) -> None:
        """Count one request of a client.

        Args:
            client_id: of the caller; empty if the request has none.
            peer: address of the caller, as gRPC writes it; without its port it stands for a missing client_id.
            now: seconds, monotonic.

        Raises:
            LimitReachedError: the client has sent too many; says when the next may come.
        """
        client = (client_id, "" if client_id else peer.rpartition(":")[0])
        tokens, at_s = self._buckets.pop(client, _Bucket(self._size, now))
        tokens = min(self._size, tokens + self._rate_hz * (now - at_s))
        allowed = tokens >= 1
        self._buckets[client] = _Bucket(tokens - allowed, now)
        if len(self._buckets) > self._clients:
            self._buckets.popitem(last=False)
        if not allowed:
            wait_s = (1 - tokens) / self._rate_hz
            who = "of this client_id" if client_id else "from this address without a client_id"
            raise LimitReachedError(
                f"wanted at most {self._rate_hz:g} requests a second {who}, got more; "
                f"try again in {1e3 * wait_s:.0f} ms",
                wait_s,
            )
