"""Requests to the HTTP port of a server."""

from __future__ import annotations

import urllib.error
import urllib.request

from rsm_serve.server import PolicyServer
from tests.hang import HANG_S
from tests.server_process import samples

ANY_PORT = "127.0.0.1:0"


def get(url: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    """(status, body, headers by lower-case name) of a GET request."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"http://{url}", headers=named), timeout=HANG_S
        ) as answer:
            return answer.status, answer.read().decode(), {k.lower(): v for k, v in answer.headers.items()}
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), {k.lower(): v for k, v in error.headers.items()}


def scrape(server: PolicyServer) -> dict[str, float]:
    return samples(get(f"{http_of(server)}/metrics")[1])


def http_of(server: PolicyServer) -> str:
    assert server.monitor is not None
    return server.monitor.address
