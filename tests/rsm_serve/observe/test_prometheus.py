"""What a real server counts, and what its HTTP port says of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from rsm_common.errors import (
    AddressError,
    BackendError,
    BundleError,
    DeadlineExpiredError,
    InvalidRequestError,
    QueueFullError,
)
from rsm_common.seeds import expand_seed
from rsm_serve.addresses import is_loopback
from rsm_serve.bundle.contract import load_bundle
from rsm_serve.client import AsyncPolicyClient, PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.engine.registry import Registry
from rsm_serve.http import server as http_server
from rsm_serve.http.endpoints import Monitor
from rsm_serve.http.server import HttpServer, Request, Response
from rsm_serve.local import LocalPolicy, open_policy
from rsm_serve.observe.counts import LATENCY_BOUNDS_S, Histogram, ServerCounts
from rsm_serve.observe.prometheus import Exposition, cumulative
from rsm_serve.pb import oip_pb2, oip_pb2_grpc, policy_pb2_grpc
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.server import PolicyServer, background_server
from rsm_serve.sessions.choice import open_session
from tests.bundles import make_probe, make_spec, write_bundle
from tests.rsm_serve.test_server import Gated, wait_until
from tests.server_process import samples

ANY_PORT = "127.0.0.1:0"
ZEROS = np.zeros(4, "<f4").tobytes()


def get(url: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    """(status, body, headers by lower-case name) of a GET request."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"http://{url}", headers=named), timeout=30
        ) as answer:
            return answer.status, answer.read().decode(), {k.lower(): v for k, v in answer.headers.items()}
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), {k.lower(): v for k, v in error.headers.items()}


def scrape(server: PolicyServer) -> dict[str, float]:
    return samples(get(f"{http_of(server)}/metrics")[1])


def http_of(server: PolicyServer) -> str:
    assert server.monitor is not None
    return server.monitor.address


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

    def test_latency_buckets_reach_from_50_microseconds_to_a_second(self):
        bounds = LATENCY_BOUNDS_S
        assert (bounds[0], bounds[-1]) == (50e-6, 1.0)
        assert list(bounds) == sorted(set(bounds))

    def test_requests_rows_and_executions_are_counted(self, server):
        with PolicyClient(server.addresses[0], timeout_s=30) as client:
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
                    stub.Act(pb.ActRequest(policy=name, rows=1, obs=ZEROS), timeout=30)
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
            stub.ModelInfer(request, timeout=30)
            list(stub.ModelStreamInfer(iter([request, request]), timeout=30))
            request.inputs[0].shape[1] = 5
            with pytest.raises(grpc.RpcError):
                stub.ModelInfer(request, timeout=30)
        found = {name: value for name, value in scrape(server).items() if name.startswith("rsm_requests_total")}
        lane = "policy=tiny,reason={},version=1}}"
        assert found == {
            "rsm_requests_total{code=OK,method=ModelInfer," + lane.format(""): 1,
            "rsm_requests_total{code=OK,method=ModelStreamInfer," + lane.format(""): 2,
            "rsm_requests_total{code=INVALID_ARGUMENT,method=ModelInfer," + lane.format("invalid"): 1,
        }

    def test_the_times_agree_with_those_of_the_answers(self, server):
        with PolicyClient(server.addresses[0], timeout_s=30) as client:
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
    def test_an_accept_header_that_nobody_understands_gets_plain_text(self, server, accept, caplog):
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
            with PolicyClient(address, timeout_s=60) as client:
                session.open.clear()
                while session.entered.acquire(blocking=False):
                    pass
                first = pool.submit(client.act, np.zeros(4))
                assert session.entered.acquire(timeout=30)

                with PolicyClient(address, timeout_s=0.1) as hasty, pytest.raises(DeadlineExpiredError):
                    hasty.act(np.zeros((2, 4)))

                async def cancel() -> None:
                    async with AsyncPolicyClient(address, timeout_s=60) as client:
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
                first.result(30)
                queued.result(30)
                session.failure = RuntimeError("no")
                with pytest.raises(BackendError):
                    client.act(np.zeros(4))
            found = scrape(server)
        counts = {
            re.sub(r".*code=(\w+),.*reason=(\w*),.*", r"\1 \2", name): value
            for name, value in found.items()
            if name.startswith("rsm_requests_total")
        }
        assert counts == {
            "OK ": 2,
            "DEADLINE_EXCEEDED late": 1,
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
            with PolicyClient(server.addresses[0], timeout_s=30) as client:
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
            with PolicyClient(server.addresses[0], timeout_s=30) as client:
                client.act(np.zeros(4))
            assert [lane.counts.requests for lane in server.registry.lanes] == [{("Act", "OK", ""): 1}]


class TestHealth:
    def test_of_the_server_and_of_each_policy(self, server):
        http = http_of(server)
        assert get(f"{http}/healthz")[:2] == (200, "serving\n")
        assert get(f"{http}/healthz/tiny")[:2] == (200, "serving\n")
        assert get(f"{http}/healthz/nope")[0] == 404

    def test_loading_and_draining_are_503(self):
        async def main() -> None:
            board = Monitor()
            await board.open(ANY_PORT)
            for path in ("/healthz", "/healthz/tiny"):
                assert (await asyncio.to_thread(get, board.address + path))[:2] == (503, "loading\n")
            status, body, _ = await asyncio.to_thread(get, f"{board.address}/api/sample?policy=tiny")
            assert (status, "being loaded" in body) == (503, True)
            board.draining()
            assert (await asyncio.to_thread(get, f"{board.address}/healthz"))[:2] == (503, "draining\n")
            board.close()

        asyncio.run(main())

    def test_a_draining_server_says_so_while_it_answers_what_is_queued(self, bundle_repo):
        bundle = load_bundle(bundle_repo / "tiny")
        session = Gated(open_session(bundle))
        lane = Lane(LocalPolicy(bundle, session), BatchLimits())
        config = ServerConfig.from_options(repo=bundle_repo, addresses=(ANY_PORT,), http=ANY_PORT)
        with background_server(config, [lane]) as server, ThreadPoolExecutor(1) as pool:
            with PolicyClient(server.addresses[0], timeout_s=60) as client:
                session.open.clear()
                while session.entered.acquire(blocking=False):
                    pass
                held = pool.submit(client.act, np.zeros(4))
                assert session.entered.acquire(timeout=30)
                assert lane.batcher._loop is not None
                drained = asyncio.run_coroutine_threadsafe(server.drain(), lane.batcher._loop)
                wait_until(lambda: get(f"{http_of(server)}/healthz")[:2] == (503, "draining\n"), "draining")
                session.open.set()
                assert held.result(30).action.shape == (2,)
                assert drained.result(30)
            with pytest.raises(OSError):
                get(f"{http_of(server)}/healthz")


class TestPort:
    """The HTTP server's limits."""

    def test_in_use_is_one_sentence(self, server, bundle_repo):
        config = ServerConfig.from_options(repo=bundle_repo, addresses=(ANY_PORT,), http=http_of(server))
        with pytest.raises(AddressError, match="in use; choose another --http"), background_server(config):
            pass
        with (
            pytest.raises(AddressError, match="wanted an address such as"),
            background_server(
                ServerConfig.from_options(repo=bundle_repo, addresses=(ANY_PORT,), http="nonsense")
            ),
        ):
            pass

    @pytest.mark.parametrize("host", ["a" * 70, "a..b"])
    def test_a_host_name_that_is_none_is_one_sentence(self, bundle_repo, host):
        config = ServerConfig.from_options(
            repo=bundle_repo, addresses=(ANY_PORT,), http=f"{host}:0", insecure=True
        )
        with (
            pytest.raises(AddressError, match=rf"wanted to listen on {host}:0 for HTTP, got: .*--http"),
            background_server(config),
        ):
            pass

    @pytest.mark.parametrize(
        ("sent", "status"),
        [
            (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
            (b"GET /metrics\r\n\r\n", 400),
            (b"GET http://elsewhere/ HTTP/1.1\r\n\r\n", 400),
            (b"\x16\x03\x01\x02\x00\x01\x00 \r\n\r\n", 400),
            (b"GET /?" + b"&".join(b"a%d=1" % i for i in range(99)) + b" HTTP/1.1\r\n\r\n", 400),
            (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n", 431),
            (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
            (b"GET //metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        ],
    )
    def test_what_is_no_proper_request_is_refused(self, server, sent, status):
        host, _, port = http_of(server).rpartition(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(sent)
            assert connection.recv(4096).startswith(b"HTTP/1.1 %d " % status)

    def test_a_slow_writer_and_a_slow_reader_block_nobody_and_are_cut_off(self, monkeypatch):
        async def answer(request: Request) -> Response:
            return Response(bytes(50_000_000) if request.path == "/large" else b"small")

        async def be_slow(address: str) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
            host, _, port = address.rpartition(":")
            silent = await asyncio.open_connection(host, int(port))
            silent[1].write(b"GET / HT")
            deaf = await asyncio.open_connection(host, int(port), limit=1024)
            deaf[1].write(b"GET /large HTTP/1.1\r\n\r\n")
            return [silent, deaf]

        async def main() -> None:
            server = HttpServer(answer)
            address = await server.listen(ANY_PORT)
            monkeypatch.setattr(http_server, "READ_S", 300.0)
            monkeypatch.setattr(http_server, "WRITE_S", 300.0)
            first = await be_slow(address)
            assert (await asyncio.to_thread(get, address))[1] == "small"
            assert len(server._open) >= 2, "the slow ones are still there"
            monkeypatch.setattr(http_server, "READ_S", 0.3)
            monkeypatch.setattr(http_server, "WRITE_S", 0.3)
            (silent, writer), (deaf, another) = await be_slow(address)
            assert await asyncio.wait_for(silent.read(), 60) == b""
            await asyncio.to_thread(wait_until, lambda: len(server._open) == 2, "the second two to be cut off")
            with pytest.raises((OSError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(deaf.readexactly(50_000_000), 60)
            server.close()
            for open_writer in (writer, another, *(slow[1] for slow in first)):
                open_writer.close()

        asyncio.run(main())

    def test_connections_are_limited_and_grpc_goes_on(self, server):
        host, _, port = http_of(server).rpartition(":")
        idle = [socket.create_connection((host, int(port)), timeout=30) for _ in range(32)]
        try:
            time.sleep(0.2)
            another = socket.create_connection((host, int(port)), timeout=30)
            with another, contextlib.suppress(ConnectionResetError):
                assert another.recv(1) == b""
            with PolicyClient(server.addresses[0], timeout_s=30) as client:
                assert client.act(np.zeros(4)).action.shape == (2,)
        finally:
            for connection in idle:
                connection.close()
        wait_until(lambda: _answers(http_of(server)), "room for a connection")

    def test_a_fault_of_ours_is_logged_without_the_query(self, caplog):
        async def fail(request: Request) -> Response:
            raise RuntimeError("broken")

        async def main() -> tuple[int, str, dict[str, str]]:
            server = HttpServer(fail)
            address = await server.listen(ANY_PORT)
            answer = await asyncio.to_thread(get, f"{address}/api/sample?obs=123.456")
            server.close()
            return answer

        status, body, _ = asyncio.run(main())
        assert status == 500
        assert "broken" not in body
        assert "GET /api/sample failed" in caplog.text
        assert "123.456" not in caplog.text

    def test_other_sites_get_nothing(self, server):
        http = http_of(server)
        for path in ("/", "/api/status", "/api/spec?policy=tiny", "/api/sample?policy=tiny"):
            assert get(http + path, Host="evil.example")[0] == 403
        for site in ("cross-site", "same-site"):
            assert get(f"{http}/api/status", Sec_Fetch_Site=site)[0] == 403
        assert get(f"{http}/api/status", Sec_Fetch_Site="same-origin")[0] == 200
        assert get(f"{http}/", Host="localhost:9000")[0] == 200
        assert get(f"{http}/metrics", Host="rsm.example")[0] == 200, "scrapers use a name"

    def test_a_public_address_shows_neither_page_nor_samples(self, bundle_repo):
        config = ServerConfig.from_options(repo=bundle_repo, addresses=(ANY_PORT,), http="0.0.0.0:0")
        with background_server(config) as server:
            http = http_of(server).replace("0.0.0.0", "127.0.0.1")
            assert [get(f"{http}{path}")[0] for path in ("/metrics", "/healthz", "/", "/api/status")] == [
                *(200, 200),
                *(404, 404),
            ]

    def test_loopback(self):
        for host in ("127.0.0.1", "127.3.2.1", "[::1]", "::1", "localhost", "LocalHost"):
            assert is_loopback(host)
        for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", "", "127.0.0.1.evil.example"):
            assert not is_loopback(host)


def _answers(http: str) -> bool:
    try:
        return get(f"{http}/healthz")[0] == 200
    except OSError:
        return False


class TestSample:
    def test_it_is_the_policys_answer_to_as_many_seeds(self, server, bundle_repo):
        answer = json.loads(get(f"{http_of(server)}/api/sample?policy=tiny:1&obs=1,2,-3,0.5&n=21&seed=7")[1])
        local = open_policy(bundle_repo / "tiny")
        expected = local.act(np.tile([1, 2, -3, 0.5], (21, 1)), seed=expand_seed(7, 21))
        assert np.allclose(answer["action"], expected.action, atol=1e-5)
        assert np.allclose(answer["q"], np.asarray(expected.q), atol=1e-5)
        assert (answer["seed"], answer["version"], answer["obs"]) == ("7", "1", [1, 2, -3, 0.5])

    def test_observations_are_zeros_probe_rows_or_numbers(self, server):
        def obs(text: str) -> list[float]:
            found: list[float] = json.loads(get(f"{http_of(server)}/api/sample?n=1&obs={text}")[1])["obs"]
            return found

        assert obs("zeros") == obs("") == [0, 0, 0, 0]
        assert np.allclose(obs("probe:2"), make_probe(make_spec("tiny")).obs[2], atol=1e-5)
        assert obs("1e3%20-2.5,%203,4") == [1000, -2.5, 3, 4]

    @pytest.mark.parametrize(
        ("query", "status", "message"),
        [
            ("obs=1,2", 400, r"shape \[4\].*got \[2\]"),
            ("obs=1,2,3,nan", 400, "finite"),
            ("obs=1,2,3,four", 400, "wanted numbers"),
            ("obs=probe:4", 400, "K below 4"),
            ("obs=probe:-1", 400, "K below 4"),
            ("n=0", 400, "n as a whole number from 1 to 512"),
            ("n=513", 400, "from 1 to 512, got '513'"),
            ("n=x", 400, "got 'x'"),
            (f"seed={2**64}", 400, "seed as a whole number"),
            ("policy=nope", 404, "'nope'"),
            ("policy=tiny:9", 404, "version '9'"),
        ],
    )
    def test_a_mistake_is_one_sentence(self, server, query, status, message):
        found, body, _ = get(f"{http_of(server)}/api/sample?{query}")
        assert found == status
        assert re.search(message, json.loads(body)["error"])

    def test_one_at_a_time_and_robots_wait_for_a_few_rows_only(self, bundle_repo):
        bundle = load_bundle(bundle_repo / "tiny")
        session = Gated(open_session(bundle))
        lane = Lane(LocalPolicy(bundle, session), BatchLimits())
        config = ServerConfig.from_options(repo=bundle_repo, addresses=(ANY_PORT,), http=ANY_PORT)
        with background_server(config, [lane]) as server, ThreadPoolExecutor(2) as pool:
            session.open.clear()
            session.batches.clear()
            while session.entered.acquire(blocking=False):
                pass
            drawn = pool.submit(get, f"{http_of(server)}/api/sample?n=20")
            assert session.entered.acquire(timeout=30)
            status, body, _ = get(f"{http_of(server)}/api/sample?n=20")
            assert (status, "one sample at a time" in body) == (429, True)
            session.open.set()
            assert drawn.result(30)[0] == 200
            assert session.batches == [8, 8, 4]

    def test_no_observation_is_logged(self, server, caplog):
        caplog.set_level(logging.DEBUG)
        get(f"{http_of(server)}/api/sample?n=1&obs=123.456,1,2,3")
        get(f"{http_of(server)}/api/sample?n=1&obs=123.456,1,2,nan")
        lane = server.registry.lanes[0]

        def fail(*_: object) -> object:
            raise RuntimeError("no")

        lane._policy._graph._session.run = fail
        assert get(f"{http_of(server)}/api/sample?n=1&obs=123.456,1,2,3")[0] == 500
        with PolicyClient(server.addresses[0], timeout_s=30) as client, pytest.raises(BackendError):
            client.act([123.456, 1, 2, 3])
        assert "a batch of 1 rows failed" in caplog.text
        assert "123.4" not in caplog.text


def test_the_status_has_what_the_page_shows(tmp_path):
    for spec in (make_spec("tiny", "1"), make_spec("tiny", "2"), make_spec("other", "3", has_q=False)):
        write_bundle(tmp_path, spec)
    with background_server(
        ServerConfig.from_options(repo=tmp_path, addresses=(ANY_PORT,), http=ANY_PORT)
    ) as server:
        with PolicyClient(server.addresses[0], policy="tiny", timeout_s=30) as client:
            client.act(np.zeros((3, 4)))
        status = json.loads(get(f"{http_of(server)}/api/status")[1])
        spec = json.loads(get(f"{http_of(server)}/api/spec?policy=other:3")[1])
        sample = json.loads(get(f"{http_of(server)}/api/sample?policy=other&n=2")[1])
    assert status["state"] == "serving"
    assert status["addresses"] == list(server.addresses)
    assert [(policy["name"], policy["version"]) for policy in status["policies"]] == [
        ("other", "3"),
        ("tiny", "2"),
    ]
    tiny = status["policies"][1]
    assert tiny["rows"] == 3
    assert tiny["default"] is True
    assert tiny["probe_rows"] == 4
    assert sum(tiny["request_s"]["counts"]) == 1
    assert len(tiny["request_s"]["counts"]) == len(status["latency_bounds_s"]) + 1
    assert tiny["batch_rows"]["counts"][status["rows_bounds"].index(3)] == 1
    assert spec["env_id"] == "Tiny-v0"
    assert sample["q"] is None
