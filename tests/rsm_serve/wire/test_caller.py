"""What a request says of its caller, through a real server: priority, client_id, and advice to try again."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from rsm_common.errors import (
    InvalidRequestError,
    QueueFullError,
    SupersededError,
)
from rsm_serve.bundle.contract import load_bundle
from rsm_serve.client import AsyncPolicyClient, PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.local import LocalPolicy
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.server import background_server
from rsm_serve.sessions.choice import open_session
from tests.hang import HANG_S
from tests.rsm_serve.test_server import ANY_PORT, ZEROS, Gated, Rig, raw_stub


@pytest.fixture
def rig(bundle_repo):
    """As in test_server, with latest-wins."""
    bundle = load_bundle(bundle_repo / "tiny")
    session = Gated(open_session(bundle, "onnxruntime"))
    lane = Lane(LocalPolicy(bundle, session), BatchLimits(4, 8, latest_wins=True))
    config = ServerConfig.from_options(repo=bundle_repo, addresses=ANY_PORT, drain_seconds=HANG_S)
    with background_server(config, [lane]) as server:
        rig = Rig(server, session, lane)
        try:
            yield rig
        finally:
            rig.open()
            rig.pool.shutdown()


class TestThroughTheServer:
    def test_a_clients_newer_request_supersedes_its_waiting_one(self, rig):
        with (
            PolicyClient(rig.address, timeout_s=HANG_S) as other,
            PolicyClient(rig.address, timeout_s=HANG_S, client_id="r2") as robot,
        ):
            first = rig.hold_worker(other)
            unary = rig.pool.submit(robot.act, np.zeros(4), seed=1)
            rig.wait_queued(1)
            stream = robot.stream()
            older = rig.pool.submit(stream.act, np.zeros((2, 4)), seed=2)
            with pytest.raises(SupersededError, match="newer request of this client_id"):
                unary.result(HANG_S)
            rig.wait_queued(2)
            newer = rig.pool.submit(robot.act, np.zeros((3, 4)), seed=3)
            with pytest.raises(SupersededError):
                older.result(HANG_S)
            rig.open()
            assert first.result(HANG_S).action.shape == (2,)
            assert newer.result(HANG_S).action.shape == (3, 2)
            assert stream.act(np.zeros(4)).action.shape == (2,), "the stream goes on"
            stream.close()
        assert rig.session.batches == [1, 3, 1]

    def test_priority_decides_what_is_computed_next(self, rig):
        with (
            PolicyClient(rig.address, timeout_s=HANG_S) as usual,
            PolicyClient(rig.address, timeout_s=HANG_S, priority=3) as urgent,
        ):
            first = rig.hold_worker(usual)
            second = rig.pool.submit(usual.act, np.zeros((3, 4)))
            rig.wait_queued(3)
            third = rig.pool.submit(urgent.act, np.zeros((4, 4)))
            rig.wait_queued(7)
            rig.open()
            for future in (first, second, third):
                future.result(HANG_S)
        assert rig.session.batches == [1, 4, 3]

    def test_the_hint_reaches_the_client_alone_and_in_a_stream(self, rig):
        with PolicyClient(rig.address, timeout_s=HANG_S) as client:
            client.act(np.zeros(4))
            first = rig.hold_worker(client)
            others = [rig.pool.submit(client.act, np.zeros((4, 4))) for _ in range(2)]
            rig.wait_queued(8)
            with client.stream() as stream:
                for act in (client.act, stream.act):
                    with pytest.raises(QueueFullError, match="8 of at most 8.*try again in about") as caught:
                        act(np.zeros(4))
                    assert (caught.value.retry_after_s or 0) >= 0.001
            rig.open()
            for future in (first, *others):
                future.result(HANG_S)

    def test_what_a_request_says_of_itself_is_checked_on_both_sides(self, rig):
        for arguments in ({"client_id": "x" * 129}, {"client_id": "é" * 65}, {"priority": 11}):
            with pytest.raises(InvalidRequestError, match="wanted a"):
                PolicyClient(rig.address, **arguments)
            with pytest.raises(InvalidRequestError, match="wanted a"):
                AsyncPolicyClient(rig.address, **arguments)
            with raw_stub(rig.address) as stub:
                (answer,) = stub.ActStream(
                    iter([pb.ActRequest(rows=1, obs=ZEROS, **arguments)]), timeout=HANG_S
                )
            assert answer.error.code == "INVALID_ARGUMENT"

    def test_the_asynchronous_client_says_it_too(self, rig):
        async def main():
            async with (
                AsyncPolicyClient(rig.address, timeout_s=HANG_S, client_id="r") as robot,
                AsyncPolicyClient(rig.address, timeout_s=HANG_S) as other,
            ):
                rig.shut()
                first = asyncio.create_task(other.act(np.zeros(4)))
                assert await asyncio.to_thread(rig.session.entered.acquire, True, HANG_S)
                older = asyncio.create_task(robot.act(np.zeros(4)))
                await asyncio.to_thread(rig.wait_queued, 1)
                async with robot.stream() as stream:
                    newer = asyncio.create_task(stream.act(np.zeros(4)))
                    with pytest.raises(SupersededError):
                        await older
                    rig.open()
                    await asyncio.gather(first, newer)

        asyncio.run(main())
