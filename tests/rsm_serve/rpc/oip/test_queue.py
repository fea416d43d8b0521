"""Priorities, deadlines and refusals of requests that wait."""

from __future__ import annotations

import asyncio
import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from rsm_serve.client import PolicyClient
from tests.rsm_serve.rpc.oip.ask import (
    OBS,
    TIMEOUT_S,
    parameters,
    raw_stub,
    tensor,
)
from tests.rsm_serve.test_server import wait_until


class TestQueue:
    def test_a_timeout_in_the_request_is_a_deadline(self, rig):
        rig.hold_worker()
        rig.ask(2, timeout=1)
        rig.ask(3, timeout=60_000_000)
        rig.wait_queued(5)
        rig.session.open.set()
        outcomes = [rig.outcome() for _ in range(3)]
        (late,) = [outcome for outcome in outcomes if isinstance(outcome, InferenceServerException)]
        assert "DEADLINE_EXCEEDED" in late.status()
        assert "the deadline passed" in late.message()
        assert rig.session.batches == [1, 3], "the late one was not computed"

    def test_a_full_queue_sheds_load(self, rig):
        rig.hold_worker()
        rig.ask(4)
        rig.wait_queued(4)
        rig.ask(3)
        refused = rig.outcome()
        assert "RESOURCE_EXHAUSTED" in refused.status()
        rig.session.open.set()
        assert sorted(parameters(rig.outcome())["batch_rows"] for _ in range(2)) == [1, 4]

    def test_who_cancels_frees_the_queue(self, rig):
        rig.hold_worker()
        waiting = rig.ask(2)
        rig.wait_queued(2)
        waiting.cancel()
        rig.wait_queued(0)
        rig.client.start_stream(lambda result, error: None)
        rig.client.async_stream_infer("tiny", [tensor(triton, "obs", OBS[:3])])
        rig.client.async_stream_infer("tiny", [tensor(triton, "obs", OBS[:2])])
        rig.wait_queued(5)
        rig.client.stop_stream(cancel_requests=True)
        rig.wait_queued(0)
        rig.session.open.set()
        wait_until(lambda: rig.lane.counts.request_s.count == 1, "the first answer")
        assert rig.session.batches == [1]

    def test_requests_of_both_protocols_share_batches(self, rig):
        rig.hold_worker()
        with PolicyClient(rig.address, timeout_s=TIMEOUT_S) as own, ThreadPoolExecutor(1) as pool:
            rig.ask(2)
            rig.wait_queued(2)
            other = pool.submit(own.act, OBS[:2])
            rig.wait_queued(4)
            rig.session.open.set()
            assert other.result(TIMEOUT_S).timing.batch_rows == 4
        assert rig.session.batches == [1, 4]

    def test_draining_answers_what_is_queued_and_is_no_longer_ready(self, rig):
        rig.hold_worker()
        streamed: queue.Queue[Any] = queue.Queue()
        rig.client.start_stream(lambda result, error: streamed.put(error or result))
        rig.client.async_stream_infer("tiny", [tensor(triton, "obs", OBS[:2])], request_id="queued")
        rig.wait_queued(2)
        drained = asyncio.run_coroutine_threadsafe(rig.server.drain(), rig.lane.batcher._loop)
        wait_until(lambda: not rig.client.is_server_ready(), "draining")
        assert rig.client.is_server_live()
        assert not rig.client.is_model_ready("tiny")
        (entry,) = rig.client.get_model_repository_index().models
        assert (entry.state, "shutting down" in entry.reason) == ("UNAVAILABLE", True)
        with pytest.raises(InferenceServerException, match="UNAVAILABLE.*shutting down"):
            rig.client.infer("tiny", [tensor(triton, "obs", OBS[:1])])
        with raw_stub(rig.address) as stub, pytest.raises(grpc.RpcError) as caught:
            list(stub.ModelStreamInfer(iter([]), timeout=TIMEOUT_S))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        rig.session.open.set()
        assert streamed.get(timeout=TIMEOUT_S).get_response().id == "queued"
        assert rig.outcome().as_numpy("action").shape == (1, 2)
        end = streamed.get(timeout=TIMEOUT_S)
        assert ("UNAVAILABLE" in end.status(), "shutting down" in end.message()) == (True, True)
        assert drained.result(TIMEOUT_S) is True
