"""A server with an HTTP port."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rsm_serve.config import ServerConfig
from rsm_serve.server import PolicyServer, background_server
from tests.rsm_serve.http.ask import ANY_PORT


@pytest.fixture
def server(bundle_repo) -> Iterator[PolicyServer]:
    with background_server(
        ServerConfig.from_options(repo=bundle_repo, addresses=(ANY_PORT,), http=ANY_PORT)
    ) as server:
        yield server
