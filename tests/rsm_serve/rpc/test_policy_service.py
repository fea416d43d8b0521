"""Act and ActStream of a real server: answers, refusals and streams."""

from __future__ import annotations

import re
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from rsm_common.errors import (
    InvalidRequestError,
    PolicyNotFoundError,
)
from rsm_common.seeds import DETERMINISTIC_SEED, draw_noise
from rsm_serve.client import PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.engine.lane import Selection
from rsm_serve.local import open_policy
from rsm_serve.pb import oip_pb2
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.rpc.streams import STREAM_WINDOW
from rsm_serve.server import background_server
from tests.bundles import make_spec, write_bundle
from tests.hang import HANG_S
from tests.rsm_serve.test_server import ANY_PORT, ZEROS, raw_stub
from tests.server_process import wait_until as wait_until


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


@pytest.fixture
def client(address) -> Iterator[PolicyClient]:
    with PolicyClient(address, policy="tiny", version=1, timeout_s=HANG_S) as client:
        yield client


class TestAnswers:
    def test_they_equal_the_local_policys(self, client, bundle_repo):
        local = open_policy(bundle_repo / "tiny")
        obs = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
        for seed in (5, list(range(9))):
            remote, here = client.act(obs, seed=seed), local.act(obs, seed=seed)
            assert np.allclose(remote.action, here.action, atol=1e-6)
            assert np.allclose(np.asarray(remote.q), np.asarray(here.q), atol=1e-6)
            assert np.array_equal(np.asarray(remote.seed), np.asarray(here.seed))
        one, here = client.act(obs[3], seed=2**64 - 1), local.act(obs[3], seed=2**64 - 1)
        assert one.action.shape == (2,)
        assert np.allclose(one.action, here.action, atol=1e-6)
        assert one.version == "1"

    def test_the_server_draws_a_seed_and_returns_it(self, client):
        first, second = client.act(np.zeros((2, 4))), client.act(np.zeros((2, 4)))
        assert first.seed.tolist() != second.seed.tolist()
        assert np.allclose(client.act(np.zeros((2, 4)), seed=first.seed).action, first.action, atol=1e-6)

    def test_deterministic_and_given_noise(self, client):
        fixed = client.act(np.zeros(4), deterministic=True)
        assert fixed.seed == DETERMINISTIC_SEED
        noise = draw_noise(np.array([DETERMINISTIC_SEED], np.uint64), client.spec.noise_shape)[0]
        given = client.act(np.zeros(4), noise=noise)
        assert np.array_equal(given.action, fixed.action)
        assert given.seed is None

    def test_an_answer_may_be_changed_by_its_owner(self, client):
        result = client.act(np.zeros(4))
        action = result.action
        action += 1
        assert np.array_equal(result.action, action)

    def test_the_specification_travels(self, client):
        assert client.spec == make_spec("tiny", "1")
        assert client.max_batch_size == 64

    def test_versions_are_chosen_by_number_and_the_newest_by_default(self, address):
        with PolicyClient(address, policy="tiny") as newest, PolicyClient(f"grpc://{address}/tiny:1") as first:
            assert (newest.act(np.zeros(4)).version, first.act(np.zeros(4)).version) == ("2", "1")

    def test_timing_adds_up(self, client):
        timing = client.act(np.zeros(4)).timing
        assert min(timing.queue_us, timing.batch_us, timing.compute_us) > 0
        assert timing.queue_us + timing.batch_us + timing.compute_us < timing.total_us
        assert timing.batch_rows == 1


INVALID = "INVALID_ARGUMENT"


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "code", "message"),
        [
            (
                {"rows": 1, "obs": b""},
                INVALID,
                r"wanted 16 bytes of obs \(float32 \[1, 4\]\), got 0",
            ),
            ({"rows": 2, "obs": ZEROS}, INVALID, "wanted 32 bytes of obs.*got 16"),
            ({"rows": 1, "obs": ZEROS + b"x"}, INVALID, "got 17"),
            ({"rows": 0, "obs": b""}, INVALID, "rows >= 1, got 0"),
            ({"rows": 2**32 - 1, "obs": ZEROS}, INVALID, "got 16"),
            ({"rows": 65, "obs": ZEROS * 65}, INVALID, "1 to 64 rows in one request, got 65"),
            (
                {"rows": 1, "obs": np.full(4, np.nan, "<f4").tobytes()},
                INVALID,
                "finite numbers, got nan",
            ),
            (
                {"rows": 1, "obs": np.full(4, np.inf, "<f4").tobytes()},
                INVALID,
                "finite numbers, got inf",
            ),
            ({"rows": 1, "obs": ZEROS, "seeds": [1, 2]}, INVALID, r"wanted 1 seeds.*got 2"),
            ({"rows": 1, "obs": ZEROS, "seeds": [1], "deterministic": True}, INVALID, "got both"),
            (
                {"rows": 1, "obs": ZEROS, "noise": b"1234"},
                INVALID,
                "wanted 48 bytes of noise.*got 4",
            ),
            ({"rows": 1, "obs": ZEROS, "noise": bytes(48), "seeds": [1]}, INVALID, "got both"),
            ({"policy": "nope", "rows": 1, "obs": ZEROS}, "NOT_FOUND", "'nope'.*other, tiny"),
            ({"policy": "", "rows": 1, "obs": ZEROS}, "NOT_FOUND", "a policy name.*other, tiny"),
            ({"version": "7", "rows": 1, "obs": ZEROS}, "NOT_FOUND", "version '7'.*has 1, 2"),
            ({"version": "x", "rows": 1, "obs": ZEROS}, "NOT_FOUND", "version 'x'"),
        ],
    )
    def test_a_wrong_message_gets_its_status_alone_and_in_a_stream(self, address, fields, code, message):
        request = pb.ActRequest(**{"policy": "tiny", "request_id": 7} | fields)
        good = pb.ActRequest(policy="tiny", rows=1, obs=ZEROS, request_id=8)
        with raw_stub(address) as stub:
            with pytest.raises(grpc.RpcError) as caught:
                stub.Act(request, timeout=HANG_S)
            assert caught.value.code().name == code
            assert re.search(message, caught.value.details())
            answers = list(stub.ActStream(iter([request, good]), timeout=HANG_S))
        assert [answer.request_id for answer in answers] == [7, 8]
        assert (answers[0].error.code, answers[0].error.message) == (code, caught.value.details())
        assert len(answers[1].action) == 8
        assert not answers[1].HasField("error")

    def test_the_client_checks_before_it_sends(self, client):
        with pytest.raises(InvalidRequestError, match=r"got \[3\]"):
            client.act(np.zeros(3))
        with pytest.raises(InvalidRequestError, match="nan"):
            client.act([0, 0, 0, np.nan])

    def test_errors_come_back_as_their_types(self, address, client):
        with pytest.raises(PolicyNotFoundError, match="'nope'"):
            PolicyClient(address, policy="nope")
        with pytest.raises(PolicyNotFoundError, match="version '9'"):
            PolicyClient(address, policy="tiny", version=9)
        with pytest.raises(InvalidRequestError, match="1 to 64 rows"):
            client.act(np.zeros((65, 4)))

    def test_too_large_a_message_is_told_as_such(self, client):
        with pytest.raises(InvalidRequestError, match="too large"):
            client.act(np.zeros((2_000_000, 4)))
        assert client.act(np.zeros(4)).action.shape == (2,)


class TestStream:
    @pytest.mark.parametrize(
        ("method", "good"),
        [
            ("rsm.v1.PolicyService/ActStream", pb.ActRequest(policy="tiny", rows=1, obs=ZEROS)),
            (
                "inference.GRPCInferenceService/ModelStreamInfer",
                oip_pb2.ModelInferRequest(model_name="tiny", id="1"),
            ),
        ],
    )
    @pytest.mark.parametrize("before", [0, 1, STREAM_WINDOW + 6])
    @pytest.mark.parametrize("after", [0, 3])
    def test_a_message_that_cannot_be_read_ends_the_stream_with_an_error(
        self, address, method, good, before, after
    ):
        message = good.SerializeToString()
        sent = iter([*[message] * before, b"\xff" * 9, *[message] * after])
        with grpc.insecure_channel(address) as channel:
            answers = channel.stream_stream(f"/{method}")(sent, timeout=HANG_S)
            for _ in range(before):
                assert next(answers), "every message before it is answered"
            with pytest.raises(grpc.RpcError) as caught:
                next(answers)
        assert caught.value.code().name == INVALID
        assert "one that cannot be read" in caught.value.details()

    def test_answers_equal_the_local_policys_in_the_order_of_the_requests(self, address, bundle_repo):
        local = open_policy(bundle_repo / "tiny")
        obs = np.random.default_rng(0).normal(size=(200, 4)).astype("<f4")
        requests = [
            pb.ActRequest(policy="tiny", version="1", rows=1, obs=row.tobytes(), seeds=[n], request_id=1000 + n)
            for n, row in enumerate(obs)
        ]
        with raw_stub(address) as stub:  # all at once: many are in flight
            answers = list(stub.ActStream(iter(requests), timeout=HANG_S))
        assert [answer.request_id for answer in answers] == [1000 + n for n in range(200)]
        actions = np.array([np.frombuffer(answer.action, "<f4") for answer in answers])
        assert np.allclose(actions, local.act(obs, seed=list(range(200))).action, atol=1e-6)
        assert max(answer.timing.batch_rows for answer in answers) > 1

    def test_the_client_steps(self, client, bundle_repo):
        local = open_policy(bundle_repo / "tiny")
        with client.stream() as stream:
            assert stream.spec == client.spec
            for seed in range(20):
                obs = np.full(4, seed / 10)
                answer = stream.act(obs, seed=seed)
                assert np.allclose(answer.action, local.act(obs, seed=seed).action, atol=1e-6)
            with pytest.raises(InvalidRequestError, match="1 to 64 rows"):
                stream.act(np.zeros((65, 4)))
            assert stream.act(np.zeros((2, 4))).action.shape == (2, 2)
