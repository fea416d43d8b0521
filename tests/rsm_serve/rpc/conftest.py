"""Servers for the tests of the gRPC services."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tritonclient.grpc as triton

from rsm_serve.bundle.contract import load_bundle
from rsm_serve.config import ServerConfig
from rsm_serve.engine.lane import Lane, Selection
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.local import LocalPolicy, open_policy
from rsm_serve.server import PolicyServer, background_server
from rsm_serve.sessions.choice import open_session
from tests.bundles import make_spec, write_bundle
from tests.hang import HANG_S
from tests.rsm_serve.rpc.oip.ask import (
    CLIENTS,
    Infer,
    Rig,
)
from tests.rsm_serve.test_server import ANY_PORT, Gated


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[PolicyServer]:
    """The policies tiny:1, tiny:2 and other:3, which has no critic."""
    repo = tmp_path_factory.mktemp("repository")
    for spec in (
        make_spec("tiny", "1"),
        make_spec("tiny", "2"),
        make_spec("other", "3", obs_size=6, has_q=False),
    ):
        write_bundle(repo, spec)
    policies = (Selection("tiny", 1), Selection("tiny"), Selection("other"))
    config = ServerConfig.from_options(repo=repo, addresses=ANY_PORT, policies=policies, backend="onnxruntime")
    with background_server(config) as server:
        yield server


@pytest.fixture
def address(server) -> str:
    return str(server.addresses[0])


@pytest.fixture
def client(address) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address) as client:
        yield client


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> LocalPolicy:
    repo = tmp_path_factory.mktemp("local")
    return open_policy(write_bundle(repo, make_spec("tiny", "2")), "onnxruntime")


@pytest.fixture(params=CLIENTS, ids=lambda function: function.__name__.removeprefix("infer_"))
def infer(request, address) -> Infer:
    """Each way in which tritonclient asks."""
    return lambda *arguments, **options: request.param(address, *arguments, **options)


@pytest.fixture
def rig(bundle_repo) -> Iterator[Rig]:
    bundle = load_bundle(bundle_repo / "tiny")
    session = Gated(open_session(bundle, "onnxruntime"))
    lane = Lane(LocalPolicy(bundle, session), BatchLimits(max_batch_size=4, max_queue_rows=6))
    session.batches.clear()
    while session.entered.acquire(blocking=False):
        pass
    config = ServerConfig.from_options(repo=bundle_repo, addresses=ANY_PORT, drain_seconds=HANG_S)
    with background_server(config, [lane]) as server:
        rig = Rig(server, session, lane)
        try:
            yield rig
        finally:
            session.open.set()
            rig.client.close()
