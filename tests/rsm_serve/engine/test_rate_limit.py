"""What one caller, or all of them together, may take of a server."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import grpc
import numpy as np
import pytest

from rsm_common.errors import (
    ConfigError,
    InvalidRequestError,
    LimitReachedError,
    NotReadyError,
    QueueFullError,
    RequestError,
)
from rsm_serve.client import PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.engine.rate_limit import RateLimiter
from rsm_serve.pb import oip_pb2, oip_pb2_grpc, policy_pb2_grpc
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.rpc import endpoint
from rsm_serve.server import PolicyServer, background_server
from rsm_serve.wire.codec import ERROR_MARK, MAX_MESSAGE_BYTES
from tests.hang import HANG_S
from tests.rsm_serve.test_server import ANY_PORT, ZEROS, raw_stub
from tests.server_process import wait_until


def configured(repo: Any, **settings: Any) -> ServerConfig:
    return ServerConfig.from_options(repo=repo, addresses=ANY_PORT, **settings)


@pytest.fixture(scope="module")
def address(bundle_repo):
    with background_server(configured(bundle_repo)) as server:
        yield server.addresses[0]


class TestRateLimiter:
    """The pure core."""

    def test_a_burst_then_the_rate(self):
        limiter = RateLimiter(10)
        for _ in range(10):
            limiter.take("arm", "", 0.0)
        with pytest.raises(LimitReachedError, match=r"at most 10 requests a second .*in 100 ms") as refused:
            limiter.take("arm", "", 0.0)
        assert refused.value.retry_after_s == pytest.approx(0.1)
        limiter.take("other", "", 0.0)
        limiter.take("arm", "", 0.1)
        with pytest.raises(LimitReachedError):
            limiter.take("arm", "", 0.1)

    def test_refused_requests_cost_nothing_and_idleness_saves_one_second(self):
        limiter = RateLimiter(2)
        passed = 0
        for step in range(1000):  # a thousand a second
            with contextlib.suppress(LimitReachedError):
                limiter.take("arm", "", step / 1000)
                passed += 1
        assert passed in (3, 4)
        for _ in range(2):
            limiter.take("arm", "", 1e6)
        with pytest.raises(LimitReachedError):
            limiter.take("arm", "", 1e6)

    def test_less_than_one_a_second(self):
        limiter = RateLimiter(0.1)
        limiter.take("arm", "", 0.0)
        with pytest.raises(LimitReachedError) as refused:
            limiter.take("arm", "", 5.0)
        assert refused.value.retry_after_s == pytest.approx(5.0)
        limiter.take("arm", "", 10.0)

    def test_without_a_client_id_the_machine_counts_not_its_ports(self):
        limiter = RateLimiter(1)
        limiter.take("", "ipv4:10.0.0.1:1000", 0.0)
        with pytest.raises(LimitReachedError, match="from this address"):
            limiter.take("", "ipv4:10.0.0.1:2000", 0.0)
        for client_id, peer in (("", "ipv4:10.0.0.2:1000"), ("", "ipv6:%5B::1%5D:7"), ("ipv4:10.0.0.1", "x")):
            limiter.take(client_id, peer, 0.0)

    def test_its_memory_is_bounded(self):
        limiter = RateLimiter(1, clients=100)
        for number in range(1000):
            limiter.take(str(number), "", 0.0)
            limiter.take("steady", "", float(number)) if number % 50 == 0 else None
        assert len(limiter) == 100
        with pytest.raises(LimitReachedError):  # who keeps asking is not forgotten
            limiter.take("steady", "", 950.0)


class Clock:
    """A time that passes when the test says so."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def clock_of(server: PolicyServer) -> Clock:
    """Give the server's rate limit a clock that stands still."""
    server._endpoint._policies._intake.clock = clock = Clock()
    return clock


class TestRate:
    def test_a_client_that_asks_too_fast(self, bundle_repo):
        with background_server(configured(bundle_repo, max_rate=5)) as server:
            address, clock = server.addresses[0], clock_of(server)
            with (
                PolicyClient(address, client_id="fast", timeout_s=HANG_S) as fast,
                PolicyClient(address, client_id="slow", timeout_s=HANG_S) as slow,
                fast.stream() as stream,
            ):
                for _ in range(4):
                    fast.act(np.zeros(4))
                stream.act(np.zeros(4))
                for act in (fast.act, stream.act):
                    with pytest.raises(QueueFullError, match="at most 5 requests a second") as refused:
                        act(np.zeros(4))
                    assert refused.value.retry_after_s == pytest.approx(0.2)
                slow.act(np.zeros(4))
                clock.now_s += 0.2
                stream.act(np.zeros(4))
                with pytest.raises(QueueFullError):
                    stream.act(np.zeros(4))

    def test_both_protocols_and_nameless_clients(self, bundle_repo):
        with (
            background_server(configured(bundle_repo, max_rate=2, http="127.0.0.1:0")) as server,
            grpc.insecure_channel(server.addresses[0]) as channel,
        ):
            clock_of(server)
            act = policy_pb2_grpc.PolicyServiceStub(channel).Act
            infer = oip_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
            for _ in range(2):
                act(pb.ActRequest(rows=1, obs=ZEROS), timeout=HANG_S)
            with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED") as refused:
                infer(oip_pb2.ModelInferRequest(model_name="tiny"), timeout=HANG_S)
            assert dict(refused.value.trailing_metadata())["retry-after-ms"].isdecimal()
            assert server.monitor is not None
            assert server.monitor.counts.refusals == {("ModelInfer", "RESOURCE_EXHAUSTED", "limit"): 1}


class TestStreams:
    def test_no_more_than_were_allowed_over_both_protocols(self, bundle_repo):
        with background_server(configured(bundle_repo, max_streams=2)) as server:
            address = server.addresses[0]
            with PolicyClient(address, timeout_s=HANG_S) as client, grpc.insecure_channel(address) as channel:
                first, second, third = client.stream(), client.stream(), client.stream()
                first.act(np.zeros(4))
                second.act(np.zeros(4))
                with pytest.raises(QueueFullError, match="wanted at most 2 open streams"):
                    third.act(np.zeros(4))
                theirs = oip_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer
                with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
                    next(theirs(iter([oip_pb2.ModelInferRequest()]), timeout=HANG_S))
                client.act(np.zeros(4))  # a call is no stream
                first.close()

                def third_acts() -> bool:
                    with contextlib.suppress(QueueFullError):
                        third.act(np.zeros(4))
                        return True
                    return False

                wait_until(third_acts, "the first stream to be closed")
                second.close()
                third.close()

    def test_those_of_one_connection_wait_for_each_other(self, bundle_repo):
        with (
            background_server(configured(bundle_repo, max_calls_per_connection=2)) as server,
            PolicyClient(server.addresses[0], timeout_s=HANG_S) as client,
            PolicyClient(server.addresses[0], timeout_s=HANG_S) as other,
        ):
            streams = [client.stream() for _ in range(2)]
            for stream in streams:
                stream.act(np.zeros(4))
            third = client.stream(timeout_s=0.3)
            with pytest.raises(RequestError, match="no answer"):
                third.act(np.zeros(4))
            other.act(np.zeros(4))
            streams[0].close()
            client.act(np.zeros(4))
            streams[1].close()
            third.close()


class TestConnections:
    def test_no_more_than_were_allowed(self, bundle_repo, one_attempt):
        with background_server(configured(bundle_repo, max_connections=2)) as server:
            address = server.addresses[0]
            with PolicyClient(address, timeout_s=HANG_S) as first:
                second = PolicyClient(address, timeout_s=HANG_S)
                with pytest.raises(NotReadyError):
                    PolicyClient(address, connect_timeout_s=HANG_S)
                first.act(np.zeros(4))
                second.close()

                def another_acts() -> bool:
                    with contextlib.suppress(NotReadyError), PolicyClient(address, timeout_s=HANG_S) as third:
                        third.act(np.zeros(4))
                        return True
                    return False

                wait_until(another_acts, "the second connection to be closed")

    def test_one_that_says_nothing_is_closed(self, bundle_repo, monkeypatch):
        monkeypatch.setattr(endpoint, "HANDSHAKE_MS", 300)
        with background_server(configured(bundle_repo)) as server:
            host, _, port = server.addresses[0].rpartition(":")
            with socket.create_connection((host, int(port)), timeout=HANG_S) as silent:
                while silent.recv(4096):  # the server's settings, then the end
                    pass


class TestSizes:
    def test_a_message_that_is_too_large(self, address):
        with raw_stub(address) as stub:
            with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
                stub.Act(pb.ActRequest(rows=1, obs=bytes(MAX_MESSAGE_BYTES)), timeout=HANG_S)
            stub.Act(pb.ActRequest(rows=1, obs=ZEROS), timeout=HANG_S)  # the connection is none the worse
        with (
            PolicyClient(address, timeout_s=HANG_S) as client,
            pytest.raises(InvalidRequestError, match="too large"),
        ):
            client.act(np.zeros((2**20, 4), np.float32))

    def test_metadata_that_is_too_large(self, address):
        with raw_stub(address) as stub:
            request = pb.ActRequest(rows=1, obs=ZEROS)
            with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
                stub.Act(request, timeout=HANG_S, metadata=(("x", "y" * 20_000),))
            stub.Act(request, timeout=HANG_S, metadata=(("x", "y" * 4000),))

    @pytest.mark.parametrize("length", [3000, 5_000_000])
    def test_what_a_caller_wrote_comes_back_shortened(self, address, length):
        long = "n" * length
        with grpc.insecure_channel(address) as channel:
            ours = policy_pb2_grpc.PolicyServiceStub(channel)
            theirs = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
            calls = [
                (ours.GetSpec, pb.GetSpecRequest(policy=long)),
                (ours.GetSpec, pb.GetSpecRequest(version=long)),
                (ours.Act, pb.ActRequest(policy=long)),
                (ours.Act, pb.ActRequest(version=long)),
                (ours.Act, pb.ActRequest(client_id=long)),
                (theirs.ModelInfer, oip_pb2.ModelInferRequest(model_name=long)),
                (theirs.ModelInfer, oip_pb2.ModelInferRequest(model_version=long)),
                (theirs.ModelConfig, oip_pb2.ModelConfigRequest(name=long)),
                (theirs.ModelStatistics, oip_pb2.ModelStatisticsRequest(version=long)),
                (theirs.RepositoryIndex, oip_pb2.RepositoryIndexRequest(repository_name=long)),
            ]
            for call, request in calls:
                with pytest.raises(grpc.RpcError) as refused:
                    call(request, timeout=HANG_S)
                assert ERROR_MARK in [tuple(pair) for pair in refused.value.trailing_metadata()]
                assert len(refused.value.details()) < 400
            request = oip_pb2.ModelInferRequest(model_name=long, model_version=long, id="7")
            answer = next(theirs.ModelStreamInfer(iter([request]), timeout=HANG_S))
            assert answer.infer_response.id == "7"
            assert answer.ByteSize() < 1000
            with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
                channel.unary_unary("/grpc.health.v1.Health/Check")(
                    oip_pb2.ModelReadyRequest(name=long).SerializeToString(), timeout=HANG_S
                )


@pytest.mark.parametrize(
    "setting",
    [{"max_connections": 0}, {"max_streams": 0}, {"max_calls_per_connection": 0}, {"max_rate": 0.0}],
)
def test_a_limit_of_nothing_is_refused(tmp_path, setting):
    with pytest.raises(ConfigError, match="got 0"):
        configured(tmp_path, **setting)
