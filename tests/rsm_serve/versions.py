"""What tests of versions share: a repository that changes, and a server that follows it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsm_common.atomic import write_file
from rsm_common.errors import (
    NotReadyError,
    PolicyNotFoundError,
)
from rsm_serve.bundle.contract import CURRENT_FILE, MODEL_FILE
from rsm_serve.client import PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.engine.lifecycle import IndexEntry
from rsm_serve.server import PolicyServer, background_server
from tests.bundles import make_spec, write_bundle
from tests.hang import HANG_S
from tests.rsm_serve.test_server import ANY_PORT, wait_until

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's accounts of processes")


def add_version(repo: Path, version: int, name: str = "tiny") -> Path:
    """A version that acts unlike the others (its noise has another shape), and appears complete."""
    path = write_bundle(repo / ".new", make_spec(name, str(version), steps=1 + version))
    (repo / name).mkdir(exist_ok=True)
    return path.rename(repo / name / str(version))


def damage(version_dir: Path) -> Path:
    with (version_dir / MODEL_FILE).open("r+b") as file:
        file.write(b"damaged")
    return version_dir


def point(repo: Path, version: object, name: str = "tiny") -> None:
    write_file(repo / name / CURRENT_FILE, f"{version}\n".encode())


@contextlib.contextmanager
def serve(repo: Path, **settings: Any) -> Iterator[PolicyServer]:
    config = ServerConfig.from_options(
        repo=repo, addresses=ANY_PORT, backend="onnxruntime", max_batch_size=8, drain_seconds=HANG_S, **settings
    )
    with background_server(config) as server:
        yield server


def run(server: PolicyServer, work: Any) -> Any:
    """A coroutine in the server's event loop."""
    loop = server.lifecycle.loop
    assert loop is not None
    return asyncio.run_coroutine_threadsafe(work, loop).result(HANG_S)


def acting_version(server: PolicyServer, policy: str = "tiny", **arguments: Any) -> str:
    with PolicyClient(server.addresses[0], policy=policy, timeout_s=HANG_S, **arguments) as client:
        return client.act(np.zeros(4)).version


def wait_for_version(server: PolicyServer, version: str, policy: str = "tiny") -> None:
    def acts() -> bool:
        with contextlib.suppress(PolicyNotFoundError, NotReadyError):
            return acting_version(server, policy) == version
        return False

    wait_until(acts, f"version {version}")


def settled(server: PolicyServer) -> list[IndexEntry]:
    """The index when nothing drains any more and every answer is counted."""
    wait_until(lambda: not server.registry.draining, "drained lanes")
    run(server, asyncio.sleep(0))  # answers are counted after they leave, in the next turn of the event loop
    return list(server.lifecycle.index())
