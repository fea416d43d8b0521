"""A real server under load: deadlines, batches, health and draining."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rsm_common.errors import (
    BackendError,
    DeadlineExpiredError,
    NotReadyError,
    QueueFullError,
    RequestError,
)
from rsm_serve.bundle.contract import load_bundle
from rsm_serve.client import AsyncPolicyClient, PolicyClient, check_health
from rsm_serve.config import ServerConfig
from rsm_serve.engine.batcher import Batcher
from rsm_serve.engine.lane import Lane, Selection
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.local import LocalPolicy, open_policy
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.pb import policy_pb2_grpc
from rsm_serve.server import PolicyServer, background_server
from rsm_serve.sessions.choice import open_session
from tests.bundles import make_spec, write_bundle
from tests.hang import HANG_S
from tests.server_process import wait_until as wait_until

ANY_PORT = ("127.0.0.1:0",)


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """A server with the policies tiny:1, tiny:2 and other:3."""
    repo = tmp_path_factory.mktemp("repository")
    for spec in (
        make_spec("tiny", "1"),
        make_spec("tiny", "2"),
        make_spec("other", "3", obs_size=6, has_q=False),
    ):
        write_bundle(repo, spec)

    config = ServerConfig.from_options(
        repo=repo, addresses=ANY_PORT, policies=(Selection("tiny", 1), Selection("tiny"), Selection("other"))
    )
    with background_server(config) as server:
        yield server.addresses[0]


@contextlib.contextmanager
def raw_stub(address: str) -> Iterator[policy_pb2_grpc.PolicyServiceStub]:
    with grpc.insecure_channel(address) as channel:
        yield policy_pb2_grpc.PolicyServiceStub(channel)


ZEROS = np.zeros(4, "<f4").tobytes()


class Gated:
    """A real session that waits until the test opens the gate, and records its batches."""

    def __init__(self, session) -> None:
        self.session = session
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Semaphore(0)
        self.batches: list[int] = []
        self.failure: Exception | None = None
        self.closed = False

    @property
    def runtime(self) -> str:
        return str(self.session.runtime)

    def close(self) -> None:
        self.closed = True

    def run(self, obs_BO, noise_BTNA):
        self.batches.append(len(obs_BO))
        self.entered.release()
        assert self.open.wait(HANG_S)
        if self.failure is not None:
            raise self.failure
        return self.session.run(obs_BO, noise_BTNA)


class Rig:
    """A server whose only policy computes when the test says so."""

    def __init__(self, server: PolicyServer, session: Gated, lane: Lane) -> None:
        self.server, self.session, self.lane = server, session, lane
        self.address = server.addresses[0]
        self.pool = ThreadPoolExecutor(16)

    def shut(self) -> None:
        self.session.batches.clear()
        self.session.open.clear()
        while self.session.entered.acquire(blocking=False):
            pass

    def open(self) -> None:
        self.session.open.set()

    def hold_worker(self, client):
        """Let one request occupy the worker."""
        self.shut()
        future = self.pool.submit(client.act, np.zeros(4))
        assert self.session.entered.acquire(timeout=HANG_S)
        return future

    def wait_queued(self, rows: int) -> None:
        wait_until(lambda: self.lane.batcher.queued_rows == rows, f"{rows} queued rows")


def miss_a_deadline(act: Callable[[PolicyClient], Any], address: str, waited: Callable[[], bool]) -> int:
    """Ask with ever longer deadlines, all of which pass, until a request has waited in the server's queue.

    On a busy machine the first deadlines may pass before the request has reached the server.

    Args:
        act: sends one request that is not answered before its deadline.
        address: of the server.
        waited: whether a request has been in the queue.

    Returns:
        The number of requests.
    """
    for attempt in range(1, 12):
        limit_s = 0.05 * 2**attempt
        with (
            PolicyClient(address, timeout_s=limit_s, connect_timeout_s=HANG_S) as hasty,
            pytest.raises(DeadlineExpiredError, match=f"within {limit_s:g} s"),
        ):
            act(hasty)
        if waited():
            return attempt
    raise AssertionError("no request reached the queue")


def watch_queue(batcher: Batcher[Any, Any]) -> list[int]:
    """The rows that wait after each request that comes from now on."""
    rows: list[int] = []
    put = batcher._queue.put

    def watched(*arguments: Any, **options: Any) -> Any:
        entry = put(*arguments, **options)
        rows.append(batcher._queue.rows)
        return entry

    batcher._queue.put = watched  # type: ignore[method-assign]
    return rows


@pytest.fixture
def rig(bundle_repo) -> Iterator[Rig]:
    bundle = load_bundle(bundle_repo / "tiny")
    session = Gated(open_session(bundle))
    lane = Lane(LocalPolicy(bundle, session), BatchLimits(max_batch_size=4, max_queue_rows=6))
    config = ServerConfig.from_options(repo=bundle_repo, addresses=ANY_PORT, drain_seconds=HANG_S)
    with background_server(config, [lane]) as server:
        rig = Rig(server, session, lane)
        try:
            yield rig
        finally:
            rig.open()
            rig.pool.shutdown()


@pytest.fixture
def slow_client(rig) -> Iterator[PolicyClient]:
    with PolicyClient(rig.address, timeout_s=HANG_S) as client:
        yield client


class TestLoad:
    def test_concurrent_requests_are_computed_together_and_answered_apart(self, rig, slow_client, bundle_repo):
        first = rig.hold_worker(slow_client)
        obs = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
        others = [rig.pool.submit(slow_client.act, row, seed=n) for n, row in enumerate(obs)]
        rig.wait_queued(5)
        rig.open()
        answers = [other.result(HANG_S) for other in others]
        assert first.result(HANG_S).timing.batch_rows == 1
        assert rig.session.batches == [1, 4, 1]
        assert sorted(answer.timing.batch_rows for answer in answers) == [1, 4, 4, 4, 4]
        local = open_policy(bundle_repo / "tiny")
        for n, answer in enumerate(answers):
            assert np.allclose(answer.action, local.act(obs[n], seed=n).action, atol=1e-6)

    def test_a_full_queue_sheds_load_and_recovers(self, rig, slow_client):
        first = rig.hold_worker(slow_client)
        others = [rig.pool.submit(slow_client.act, np.zeros((3, 4))) for _ in range(2)]
        rig.wait_queued(6)
        with pytest.raises(QueueFullError, match="6 of at most 6"):
            slow_client.act(np.zeros(4))
        rig.open()
        assert [other.result(HANG_S).timing.batch_rows for other in others] == [3, 3]
        first.result(HANG_S)
        slow_client.act(np.zeros(4))

    def test_an_expired_request_is_never_computed(self, rig, slow_client):
        first = rig.hold_worker(slow_client)
        waiting = watch_queue(rig.lane.batcher)
        miss_a_deadline(lambda hasty: hasty.act(np.zeros((2, 4))), rig.address, lambda: 2 in waiting)
        rig.wait_queued(0)
        rig.open()
        first.result(HANG_S)
        slow_client.act(np.zeros(4))
        assert rig.session.batches == [1, 1]

    def test_a_cancelled_request_is_never_computed(self, rig, slow_client):
        first = rig.hold_worker(slow_client)

        async def main():
            async with AsyncPolicyClient(rig.address, timeout_s=HANG_S) as client:
                task = asyncio.create_task(client.act(np.zeros((2, 4))))
                await asyncio.to_thread(rig.wait_queued, 2)
                task.cancel()
                await asyncio.to_thread(rig.wait_queued, 0)
                with pytest.raises(asyncio.CancelledError):
                    await task

        asyncio.run(main())
        rig.open()
        first.result(HANG_S)
        assert rig.session.batches == [1]

    def test_a_client_that_leaves_its_stream_leaves_the_queue(self, rig, slow_client):
        first = rig.hold_worker(slow_client)
        with raw_stub(rig.address) as stub:
            call = stub.ActStream(iter([pb.ActRequest(rows=1, obs=ZEROS) for _ in range(3)]))
            rig.wait_queued(3)
            call.cancel()
            rig.wait_queued(0)
        rig.open()
        first.result(HANG_S)
        assert rig.session.batches == [1]

    def test_a_backend_failure_says_nothing_about_itself_and_passes(self, rig, slow_client, caplog):
        rig.session.failure = RuntimeError("secret path /etc/model")
        with pytest.raises(BackendError, match="server's log") as caught:
            slow_client.act(np.zeros(4))
        assert "secret" not in str(caught.value)
        assert "secret path" in caplog.text
        with slow_client.stream() as stream:
            with pytest.raises(BackendError, match="server's log") as caught:
                stream.act(np.zeros(4))
            assert "secret" not in str(caught.value)
            rig.session.failure = None
            assert stream.act(np.zeros(4)).action.shape == (2,)
        assert slow_client.act(np.zeros(4)).action.shape == (2,)

    def test_a_late_step_is_an_error_and_never_the_next_steps_answer(self, rig, slow_client, bundle_repo):
        local = open_policy(bundle_repo / "tiny")
        with slow_client.stream(timeout_s=0.2) as stream:
            rig.shut()
            with pytest.raises(DeadlineExpiredError, match=r"within 0.2 s"):
                stream.act(np.zeros(4), seed=1)
            rig.open()
        with slow_client.stream(timeout_s=HANG_S) as stream:
            assert stream.act(np.ones(4), seed=2).seed == 2
            stream._timeout_s = 0.2
            rig.shut()
            with pytest.raises(DeadlineExpiredError):
                stream.act(np.zeros(4), seed=3)
            rig.open()
            stream._timeout_s = HANG_S
            answer = stream.act(np.ones(4), seed=4)
            assert answer.seed == 4
            assert np.allclose(answer.action, local.act(np.ones(4), seed=4).action, atol=1e-6)


def probe_health(address: str, service: str = "") -> str:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        response = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=HANG_S)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


class TestHealthAndReflection:
    def test_health_of_the_server_and_of_each_policy(self, address):
        for service in ("", "tiny", "other", "rsm.v1.PolicyService"):
            assert probe_health(address, service) == "SERVING"
            assert check_health(address, service, timeout_s=HANG_S) == "SERVING"
        assert check_health(address, "nope", timeout_s=HANG_S) == "SERVICE_UNKNOWN"

    def test_reflection_lists_the_services(self, address):
        with grpc.insecure_channel(address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=HANG_S)
        names = {service.name for service in answer.list_services_response.service}
        assert names == {
            "rsm.v1.PolicyService",
            "inference.GRPCInferenceService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }


class TestDrain:
    def test_what_is_queued_is_answered_what_is_new_is_refused(self, rig, slow_client):
        first = rig.hold_worker(slow_client)
        second = rig.pool.submit(slow_client.act, np.zeros((2, 4)))
        rig.wait_queued(2)
        with slow_client.stream(timeout_s=HANG_S) as stream:
            third = rig.pool.submit(stream.act, np.zeros(4))
            rig.wait_queued(3)
            drained = asyncio.run_coroutine_threadsafe(rig.server.drain(), rig.lane.batcher._loop)
            wait_until(lambda: probe_health(rig.address) == "NOT_SERVING", "NOT_SERVING")
            assert check_health(rig.address, "tiny", timeout_s=HANG_S) == "NOT_SERVING"
            with pytest.raises(NotReadyError, match="shutting down"):
                slow_client.act(np.zeros(4))
            assert not drained.done()
            rig.open()
            assert first.result(HANG_S).action.shape == (2,)
            assert second.result(HANG_S).action.shape == (2, 2)
            assert third.result(HANG_S).action.shape == (2,)
            assert drained.result(HANG_S) is True
            assert rig.session.closed
            with pytest.raises(NotReadyError):
                stream.act(np.zeros(4))

    def test_a_backend_that_hangs_does_not_hold_the_server_for_ever(self, rig, slow_client):
        first = rig.hold_worker(slow_client)
        drained = asyncio.run_coroutine_threadsafe(rig.server.drain(0.1), rig.lane.batcher._loop)
        assert drained.result(HANG_S) is False
        assert not rig.session.closed, "its worker is in the midst of a run"
        with pytest.raises(RequestError):
            first.result(HANG_S)


@pytest.mark.parametrize("in_loop", [0, 2**20], ids=["worker", "event loop"])
def test_noise_does_not_depend_on_who_draws_it(bundle_repo, monkeypatch, in_loop):
    monkeypatch.setattr("rsm_serve.local.MAX_NOISE_AT_ONCE", in_loop)
    obs = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    expected = open_policy(bundle_repo / "tiny").act(obs, seed=11)
    with (
        background_server(ServerConfig(repo=bundle_repo, addresses=ANY_PORT)) as server,
        PolicyClient(server.addresses[0], timeout_s=HANG_S) as client,
    ):
        answer = client.act(obs, seed=11)
    assert np.allclose(answer.action, expected.action, atol=1e-6)
    assert answer.seed is not None
    assert expected.seed is not None
    assert np.array_equal(answer.seed, expected.seed)


def test_an_idle_server_has_nothing_left_to_answer_however_little_time_it_is_given(bundle_repo):
    config = ServerConfig.from_options(repo=bundle_repo, addresses=ANY_PORT, drain_seconds=0)

    async def main() -> bool:
        server = PolicyServer(config)
        await server.start()
        return await server.drain()

    assert asyncio.run(main())
