"""The metrics of a real server."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from rsm_common.errors import (
    BackendError,
    BundleError,
    InvalidRequestError,
    QueueFullError,
)
from rsm_serve.bundle.contract import load_bundle
from rsm_serve.client import AsyncPolicyClient, PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.engine.registry import Registry
from rsm_serve.http.endpoints import Monitor
from rsm_serve.local import LocalPolicy, open_policy
from rsm_serve.observe.counts import Histogram, ServerCounts
from rsm_serve.observe.prometheus import Exposition, cumulative
from rsm_serve.pb import oip_pb2, oip_pb2_grpc, policy_pb2_grpc
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.server import PolicyServer, background_server
from rsm_serve.sessions.choice import open_session
from tests.hang import HANG_S
from tests.rsm_serve.http.ask import ANY_PORT, get, http_of, scrape
from tests.rsm_serve.test_server import Gated, miss_a_deadline, wait_until, watch_queue
from tests.rsm_serve.versions import settled
from tests.server_process import samples

ZEROS = np.zeros(4, "<f4").tobytes()


@pytest.fixture
def server(bundle_repo) -> Iterator[PolicyServer]:
    with background_server(
        ServerConfig.from_options(repo=bundle_repo, addresses=(ANY_PORT,), http=ANY_PORT)
    ) as server:
        yield server


class Unsound:
    """A session whose second row is not a number."""

    runtime = "a broken runtime"

    def __init__(self, session) -> None:
        self.session = session
        self.broken = False

    def run(self, obs_BO, noise_BTNA):
        action, q = self.session.run(obs_BO, noise_BTNA)
        if self.broken:
            action = action.copy()
            action[1:] = np.nan
        return action, q

    def close(self) -> None:
        self.session.close()


class TestMetrics:
    def test_histogram_buckets_include_their_upper_end(self):
        histogram = Histogram((1.0, 2.0))
        for value in (0.5, 1.0, 1.5, 2.0, 3.0):
            histogram.add(value)
        assert cumulative(histogram) == [("1.0", 2), ("2.0", 4), ("+Inf", 5)]
        assert histogram.total == 8

    def test_requests_rows_and_executions_are_counted(self, server):
        with PolicyClient(server.addresses[0], timeout_s=HANG_S) as client:
            for _ in range(3):
                client.act(np.zeros((2, 4)))
            with pytest.raises(InvalidRequestError):
                client.act(np.zeros((65, 4)))
            with client.stream() as stream:
                stream.act(np.zeros(4))
                assert scrape(server)["rsm_streams_open{}"] == 1
        with grpc.insecure_channel(server.addresses[0]) as channel:
            stub = policy_pb2_grpc.PolicyServiceStub(channel)
            for name in ("secret-one", "secret-two"):
                with pytest.raises(grpc.RpcError):
                    stub.Act(pb.ActRequest(policy=name, rows=1, obs=ZEROS), timeout=HANG_S)
        wait_until(lambda: scrape(server)["rsm_streams_open{}"] == 0, "the stream's end")
        found = scrape(server)
        requests = {name: value for name, value in found.items() if name.startswith("rsm_requests_total")}
        lane = "policy=tiny,reason={},version=1}}"
        assert requests == {
            "rsm_requests_total{code=OK,method=Act," + lane.format(""): 3,
            "rsm_requests_total{code=OK,method=ActStream," + lane.format(""): 1,
            "rsm_requests_total{code=INVALID_ARGUMENT,method=Act," + lane.format("invalid"): 1,
            # What a caller makes up is no label.
            "rsm_requests_total{code=NOT_FOUND,method=Act,policy=,reason=unknown_policy,version=}": 2,
        }
        one = "{policy=tiny,version=1}"
        assert found["rsm_rows_total" + one] == 7
        assert found["rsm_executions_total" + one] == 4
        assert found["rsm_batch_rows_sum" + one] == 7
        assert found["rsm_batch_rows_bucket{le=1.0,policy=tiny,version=1}"] == 1
        for stage in ("request", "queue", "compute"):
            assert found[f"rsm_{stage}_seconds_count{one}"] == 4
            assert 0 < found[f"rsm_{stage}_seconds_sum{one}"] < 4
        assert found["rsm_loads_total{policy=tiny,result=ok}"] == 1
        assert found["rsm_load_seconds{policy=tiny}"] > 0
        assert found["rsm_queue_rows" + one] == 0
        (runtime,) = (name for name in found if name.startswith("rsm_policy_info"))
        assert re.search(r"runtime=(onnxruntime|openvino) [\d.]+, CPU", runtime)

    def test_both_protocols_are_counted(self, server):
        with grpc.insecure_channel(server.addresses[0]) as channel:
            stub = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
            request = oip_pb2.ModelInferRequest(model_name="tiny", raw_input_contents=[ZEROS])
            request.inputs.add(name="obs", datatype="FP32", shape=[1, 4])
            stub.ModelInfer(request, timeout=HANG_S)
            list(stub.ModelStreamInfer(iter([request, request]), timeout=HANG_S))
            request.inputs[0].shape[1] = 5
            with pytest.raises(grpc.RpcError):
                stub.ModelInfer(request, timeout=HANG_S)
        found = {name: value for name, value in scrape(server).items() if name.startswith("rsm_requests_total")}
        lane = "policy=tiny,reason={},version=1}}"
        assert found == {
            "rsm_requests_total{code=OK,method=ModelInfer," + lane.format(""): 1,
            "rsm_requests_total{code=OK,method=ModelStreamInfer," + lane.format(""): 2,
            "rsm_requests_total{code=INVALID_ARGUMENT,method=ModelInfer," + lane.format("invalid"): 1,
        }

    def test_the_times_agree_with_those_of_the_answers(self, server):
        with PolicyClient(server.addresses[0], timeout_s=HANG_S) as client:
            timing = client.act(np.zeros(4)).timing
        found = scrape(server)
        one = "{policy=tiny,version=1}"
        assert found["rsm_queue_seconds_sum" + one] == pytest.approx(1e-6 * timing.queue_us, rel=1e-3)
        compute_s = 1e-6 * (timing.batch_us + timing.compute_us)
        assert compute_s <= found["rsm_compute_seconds_sum" + one] < compute_s + 5e-3
        assert found["rsm_request_seconds_sum" + one] < 1e-6 * timing.total_us

    def test_open_metrics_on_demand(self, server):
        _, text, headers = get(
            f"{http_of(server)}/metrics", Accept="application/openmetrics-text; version=1.0.0"
        )
        assert headers["content-type"].startswith("application/openmetrics-text")
        assert "rsm_requests" in {family.name for family in parse_openmetrics(text)}
        assert get(f"{http_of(server)}/metrics")[2]["content-type"].startswith("text/plain")

    @pytest.mark.parametrize(
        "accept",
        [
            "application/openmetrics-text; version=a.b.c",
            "application/openmetrics-text; version=1.x",
            "text/plain; version=1.0.x; escaping",
            "text/plain; version=" + 5000 * "9",
            ";;;=,=;version=",
        ],
    )
    def test_an_unknown_accept_header_gets_plain_text(self, server, accept, caplog):
        status, text, headers = get(f"{http_of(server)}/metrics", Accept=accept)
        assert status == 200
        assert headers["content-type"].startswith("text/plain; version=0.0.4")
        assert "# TYPE rsm_requests_total counter" in text
        assert "failed" not in caplog.text

    def test_every_way_to_fail_has_its_code_and_reason(self, bundle_repo):
        bundle = load_bundle(bundle_repo / "tiny")
        session = Gated(open_session(bundle))
        lane = Lane(LocalPolicy(bundle, session), BatchLimits(max_batch_size=4, max_queue_rows=4))
        config = ServerConfig.from_options(repo=bundle_repo, addresses=(ANY_PORT,), http=ANY_PORT)
        with background_server(config, [lane]) as server, ThreadPoolExecutor(4) as pool:
            address = server.addresses[0]
            with PolicyClient(address, timeout_s=HANG_S) as client:
                session.open.clear()
                while session.entered.acquire(blocking=False):
                    pass
                first = pool.submit(client.act, np.zeros(4))
                assert session.entered.acquire(timeout=HANG_S)

                waiting = watch_queue(lane.batcher)
                missed = miss_a_deadline(
                    lambda hasty: hasty.act(np.zeros((2, 4))), address, lambda: bool(waiting)
                )
                wait_until(lambda: lane.batcher.queued_rows == 0, "the deadline")

                async def cancel() -> None:
                    async with AsyncPolicyClient(address, timeout_s=HANG_S) as client:
                        task = asyncio.create_task(client.act(np.zeros((3, 4))))
                        await asyncio.to_thread(wait_until, lambda: lane.batcher.queued_rows == 3, "3 rows")
                        assert scrape(server)["rsm_queue_rows{policy=tiny,version=1}"] == 3
                        task.cancel()
                        await asyncio.to_thread(wait_until, lambda: lane.batcher.queued_rows == 0, "none")

                asyncio.run(cancel())
                queued = pool.submit(client.act, np.zeros((4, 4)))
                wait_until(lambda: lane.batcher.queued_rows == 4, "4 rows")
                with pytest.raises(QueueFullError):
                    client.act(np.zeros(4))
                session.open.set()
                first.result(HANG_S)
                queued.result(HANG_S)
                session.failure = RuntimeError("no")
                with pytest.raises(BackendError):
                    client.act(np.zeros(4))
            found = scrape(server)
        counts = {
            re.sub(r".*code=(\w+),.*reason=(\w*),.*", r"\1 \2", name): value
            for name, value in found.items()
            if name.startswith("rsm_requests_total")
        }
        assert 1 <= counts.pop("DEADLINE_EXCEEDED late") <= missed
        assert counts == {
            "OK ": 2,
            "CANCELLED cancelled": 1,
            "RESOURCE_EXHAUSTED queue_full": 1,
            "INTERNAL backend": 1,
        }
        one = "{policy=tiny,version=1}"
        assert found["rsm_failed_executions_total" + one] == 1
        assert found["rsm_executions_total" + one] == 2
        assert found["rsm_request_seconds_count" + one] == 2, "refusals would flatter the latency"

    def test_unsound_actions_are_counted(self, bundle_repo):
        bundle = load_bundle(bundle_repo / "tiny")
        session = Unsound(open_session(bundle))
        lane = Lane(LocalPolicy(bundle, session), BatchLimits())
        config = ServerConfig.from_options(repo=bundle_repo, addresses=(ANY_PORT,), http=ANY_PORT)
        with background_server(config, [lane]) as server:
            session.broken = True
            with PolicyClient(server.addresses[0], timeout_s=HANG_S) as client:
                with pytest.raises(BackendError):
                    client.act(np.zeros((2, 4)))
                client.act(np.zeros(4))
            found = scrape(server)
        assert found["rsm_unsound_answers_total{policy=tiny,version=1}"] == 1
        assert found["rsm_failed_executions_total{policy=tiny,version=1}"] == 0

    def test_a_version_that_leaves_takes_its_numbers_along(self, bundle_repo):
        counts = ServerCounts()
        shown = Exposition(counts)
        first, second = (Lane(open_policy(bundle_repo / "tiny"), BatchLimits()) for _ in range(2))
        registry = Registry([first], counts)
        assert registry.publish(second) is first, "the same version, loaded again"
        registry.drained(first)
        assert counts.lanes == [second.counts]
        assert 'rsm_rows_total{policy="tiny"' in shown.render()[0].decode()
        registry.drained(registry.withdraw("tiny", 1))
        assert "tiny" not in shown.render()[0].decode()

    def test_a_failed_load_is_counted(self, own_repo):
        (own_repo / "tiny" / "1" / "model.onnx").write_bytes(b"damaged")
        board = Monitor()
        with pytest.raises(BundleError, match="truncated"):
            PolicyServer(ServerConfig.from_options(repo=own_repo, http=ANY_PORT), monitor=board)
        assert (
            samples(Exposition(board.counts).render()[0].decode())["rsm_loads_total{policy=tiny,result=failed}"]
            == 1
        )

    def test_without_an_http_port_requests_are_counted_too(self, bundle_repo):
        with background_server(ServerConfig(repo=bundle_repo, addresses=(ANY_PORT,))) as server:
            assert server.monitor is None
            with PolicyClient(server.addresses[0], timeout_s=HANG_S) as client:
                client.act(np.zeros(4))
            settled(server)
            assert [lane.counts.requests for lane in server.registry.lanes] == [{("Act", "OK", ""): 1}]
