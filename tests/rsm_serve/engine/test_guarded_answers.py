"""The action guard between policies and clients: futures of answers, and a real server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from rsm_common.errors import (
    BackendError,
    DeadlineExpiredError,
    InvalidRequestError,
    NotReadyError,
    QueueFullError,
    SupersededError,
)
from rsm_common.policy import ActResult, ActRows, Timing
from rsm_serve.bundle.contract import load_bundle
from rsm_serve.client import AsyncPolicyClient, PolicyClient
from rsm_serve.commands import client_cli
from rsm_serve.config import ServerConfig
from rsm_serve.engine.action_guard import GuardLimits
from rsm_serve.engine.guarded_answers import GuardedAnswers
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.local import LocalPolicy
from rsm_serve.observe.counts import LaneCounts
from rsm_serve.observe.settled import Answered
from rsm_serve.server import PolicyServer, background_server
from rsm_serve.sessions.choice import open_session
from tests.bundles import make_spec, write_bundle
from tests.hang import HANG_S
from tests.rsm_serve.engine.test_action_guard import HELD, LIMITED, SPEC, actions
from tests.rsm_serve.http.ask import scrape
from tests.rsm_serve.observe.test_prometheus import Unsound
from tests.rsm_serve.recording.records import recorded
from tests.rsm_serve.test_server import ANY_PORT, wait_until

LOW, HIGH = np.array([10.0, 0, 0, 0]), np.array([-10.0, 0, 0, 0])  # observations with actions near the bounds


class TestAnswers:
    """In an event loop, with futures as a batcher gives them."""

    rows = ActRows(np.zeros((1, 4), np.float32), None, None, single=False)
    counts = LaneCounts("tiny", "1", "a runtime", lambda: 0)

    def answered(self, action: tuple[float, float]) -> Answered[ActResult]:
        return Answered(ActResult(actions(action), None, None, "1", Timing()), 5.0)

    @pytest.mark.parametrize("kind", [QueueFullError, DeadlineExpiredError, SupersededError, NotReadyError])
    def test_a_fallback_hides_the_policys_failures_alone(self, kind):
        async def main() -> None:
            guard = GuardedAnswers(GuardLimits(fallback="center"))
            sampled: asyncio.Future[Answered[ActResult]] = asyncio.get_running_loop().create_future()
            given = guard.follow(sampled, SPEC, "arm", self.rows, self.counts)
            sampled.set_exception(kind("too bad"))
            with pytest.raises(kind, match="too bad"):
                await given

        asyncio.run(main())

    def test_an_action_whose_caller_has_left_is_not_the_last_one(self):
        async def main() -> None:
            guard = GuardedAnswers(GuardLimits(0.1), clock=lambda: 0.0)
            loop = asyncio.get_running_loop()
            for action, expected in (((0, 0), 0), ((-3, 0), None), ((1, 0), 0.4)):
                sampled: asyncio.Future[Answered[ActResult]] = loop.create_future()
                given = guard.follow(sampled, SPEC, "arm", self.rows, self.counts)
                sampled.set_result(self.answered(action))
                if expected is None:  # given up just as the answer comes
                    given.cancel()
                    await asyncio.sleep(0)
                    continue
                answered = await given
                assert answered.answer.action[0, 0] == pytest.approx(expected)
                assert answered.queue_us == 5

        asyncio.run(main())

    def test_a_stream_is_limited_in_the_order_in_which_it_is_answered(self):
        async def main() -> None:
            guard = GuardedAnswers(GuardLimits(0.1), clock=lambda: 0.0)
            loop = asyncio.get_running_loop()
            sampled = [loop.create_future() for _ in range(4)]
            given = [guard.follow(one, SPEC, "arm", self.rows, self.counts, stream="s") for one in sampled]
            actions = ((0, 0), (3, 0), (3, 0), (3, 0))
            for index in (3, 1):  # sampled first, by another version or a higher priority
                sampled[index].set_result(self.answered(actions[index]))
            for _ in range(10):  # more rounds of the loop than any answer takes
                await asyncio.sleep(0)
            assert not any(one.done() for one in given)
            given[2].cancel()
            sampled[0].set_result(self.answered(actions[0]))
            found = [(await given[index]).answer.action[0, 0] for index in (0, 1, 3)]
            assert found == pytest.approx([0, 0.4, 0.8])
            assert not guard._unsettled

        asyncio.run(main())

    def test_giving_up_takes_the_request_out_of_the_queue(self):
        async def main() -> None:
            guard = GuardedAnswers(GuardLimits(0.1))
            sampled: asyncio.Future[Answered[ActResult]] = asyncio.get_running_loop().create_future()
            guard.follow(sampled, SPEC, "arm", self.rows, self.counts).cancel()
            await asyncio.sleep(0)
            assert sampled.cancelled()

        asyncio.run(main())


class Switched(Unsound):
    """Is unsound in every row, or fails, when told."""

    failing = False

    def run(self, obs_BO, noise_BTNA):
        if self.failing:
            raise RuntimeError("the graph failed")
        action, q = self.session.run(obs_BO, noise_BTNA)
        return (np.full_like(action, np.nan) if self.broken else action), q


@contextlib.contextmanager
def guarded(repo: Path, **settings) -> Iterator[tuple[PolicyServer, Switched]]:
    config = ServerConfig.from_options(repo=repo, addresses=ANY_PORT, http="127.0.0.1:0", **settings)
    bundle = load_bundle(repo / "tiny" / "1")
    session = Switched(open_session(bundle, "onnxruntime"))
    with background_server(config, [Lane(LocalPolicy(bundle, session), BatchLimits())]) as server:
        yield server, session


LANE = "{policy=tiny,version=1}"


class TestServer:
    def test_every_protocol_and_stream_is_limited(self, bundle_repo, caplog):
        with guarded(bundle_repo, max_action_step=0.25) as (server, _):
            address = server.addresses[0]
            with PolicyClient(address, client_id="arm", timeout_s=HANG_S) as client:
                first, second = client.act(LOW, seed=1), client.act(HIGH, seed=1)
                assert first.adjusted is None
                assert second.adjusted == LIMITED
                assert np.allclose(second.action, first.action + 1)
                with client.stream() as stream:  # the same client
                    third = stream.act(HIGH, seed=1)
                assert np.allclose(third.action, first.action + 2)
            with triton.InferenceServerClient(address) as other:
                tensor = triton.InferInput("obs", [1, 4], "FP32")
                tensor.set_data_from_numpy(HIGH[None].astype(np.float32))
                result = other.infer("tiny", [tensor], parameters={"client_id": "arm", "seed": 1})
                assert np.allclose(result.as_numpy("action"), first.action + 3)
                assert result.get_response().parameters["adjusted"].string_param == "limited"
            with (
                PolicyClient(address, timeout_s=HANG_S) as client,
                client.stream() as one,
                client.stream() as two,
            ):
                low = one.act(LOW, seed=1).action
                assert np.allclose(two.act(HIGH, seed=1).action, 1, atol=1e-3)
                assert np.allclose(one.act(HIGH, seed=1).action, low + 1)
            assert scrape(server)[f"rsm_limited_actions_total{LANE}"] == 4
        assert "tiny:1: 1 of 1 actions were limited to a step" in caplog.text

    def test_from_the_shell(self, bundle_repo, capsys):
        with guarded(bundle_repo, max_action_step=0.25) as (server, _):
            address = ("--address", server.addresses[0])
            assert client_cli.main(["act", *address]) == 2
            assert "wanted a client_id" in capsys.readouterr().err
            for obs, adjusted in (([0.0] * 4, None), (HIGH, "limited")):
                numbers = ("--obs", ",".join(map(str, obs)), "--seed", "1")
                assert client_cli.main(["act", *address, *numbers, "--client-id", "arm"]) == 0
                assert json.loads(capsys.readouterr().out).get("adjusted") == adjusted
            steps = ("--steps", "5", "--warm-up", "0", "--client-id", "bench", "--json")
            assert client_cli.main(["bench", *address, *steps]) == 0

    def test_who_cannot_be_limited_is_told(self, bundle_repo):
        with guarded(bundle_repo, max_action_step=0.25) as (server, _):
            with (
                PolicyClient(server.addresses[0], timeout_s=HANG_S) as client,
                pytest.raises(InvalidRequestError, match="wanted a client_id"),
            ):
                client.act(LOW)
            with triton.InferenceServerClient(server.addresses[0]) as other:
                tensor = triton.InferInput("obs", [1, 4], "FP32")
                tensor.set_data_from_numpy(LOW[None].astype(np.float32))
                with pytest.raises(InferenceServerException, match="wanted a client_id"):
                    other.infer("tiny", [tensor])

    def test_it_holds_across_a_reload(self, own_repo):
        config = ServerConfig.from_options(repo=own_repo, addresses=ANY_PORT, max_action_step=0.25, poll=0.05)
        with (
            background_server(config) as server,
            PolicyClient(server.addresses[0], client_id="arm", timeout_s=HANG_S) as client,
        ):
            write_bundle(own_repo / ".new", make_spec("tiny", "2"))
            (own_repo / ".new" / "tiny" / "2").rename(own_repo / "tiny" / "2")
            before = client.act(LOW, seed=1)
            wait_until(lambda: client.act(LOW, seed=1).version == "2", "version 2")
            after = client.act(HIGH, seed=1)
            assert (before.version, after.version) == ("1", "2")
            assert after.adjusted == LIMITED

    @pytest.mark.parametrize("kind", ["unsound", "failing"])
    def test_hold(self, bundle_repo, kind, caplog):
        with guarded(bundle_repo, fallback="hold") as (server, session):
            with PolicyClient(server.addresses[0], client_id="arm", timeout_s=HANG_S) as client:
                good = client.act(LOW, seed=1)
                session.broken, session.failing = kind == "unsound", kind == "failing"
                held = client.act(HIGH, seed=2)
                assert np.array_equal(held.action, good.action)
                assert held.adjusted == HELD
                assert held.q is not None
                assert np.isnan(held.q)
                assert held.seed == 2
                with pytest.raises(InvalidRequestError):  # what the caller got wrong is still told
                    client.act(np.zeros((65, 4)))
            with PolicyClient(server.addresses[0], timeout_s=HANG_S) as client, pytest.raises(BackendError):
                client.act(LOW)
            found = scrape(server)
            assert found[f"rsm_fallback_answers_total{LANE}"] == 1
            assert found[f"rsm_unsound_answers_total{LANE}"] == (2 if kind == "unsound" else 0)
        assert "tiny:1: answered by a held action instead of: " in caplog.text

    def test_center(self, bundle_repo):
        with guarded(bundle_repo, fallback="center") as (server, session):
            session.broken = True
            with triton.InferenceServerClient(server.addresses[0]) as other:
                tensor = triton.InferInput("obs", [2, 4], "FP32")
                tensor.set_data_from_numpy(np.zeros((2, 4), np.float32))
                result = other.infer("tiny", [tensor])
            assert (result.as_numpy("action") == -1).all()
            assert np.isnan(result.as_numpy("q")).all()
            assert result.get_response().parameters["adjusted"].string_param == "centered,centered"

    def test_the_command_line_shows_a_fallback(self, bundle_repo, capsys):
        with guarded(bundle_repo, fallback="center") as (server, session):
            assert client_cli.main(["act", "--address", server.addresses[0]]) == 0
            assert "adjusted" not in json.loads(capsys.readouterr().out)
            session.broken = True
            assert client_cli.main(["act", "--address", server.addresses[0]]) == 0
            shown = json.loads(capsys.readouterr().out)
        assert (shown["action"], shown["adjusted"], shown["q"]) == ([-1, -1], "centered", None)

    def test_one_connection_may_ask_for_several(self, bundle_repo):
        async def main(address: str) -> list[float]:
            async with AsyncPolicyClient(address, client_id="arm", timeout_s=HANG_S) as client:
                calls = [
                    client.act(LOW, seed=1),
                    client.act(HIGH, seed=1, client_id="leg"),
                    client.act(HIGH, seed=1),
                ]
                return [float((await call).action[0]) for call in calls]

        with guarded(bundle_repo, max_action_step=0.25) as (server, _):
            arm, leg, arm_again = asyncio.run(main(server.addresses[0]))
        assert leg == pytest.approx(1, abs=1e-3)
        assert arm_again == pytest.approx(arm + 1)

    def test_fail_is_the_default(self, bundle_repo):
        with (
            guarded(bundle_repo) as (server, session),
            PolicyClient(server.addresses[0], timeout_s=HANG_S) as client,
        ):
            session.broken = True
            with pytest.raises(BackendError):
                client.act(LOW)

    def test_records_have_the_policys_own_action_beside_the_one_given_out(self, bundle_repo, tmp_path):
        with (
            guarded(bundle_repo, max_action_step=0.25, fallback="hold", record=tmp_path) as (server, session),
            PolicyClient(server.addresses[0], client_id="arm", timeout_s=HANG_S) as client,
        ):
            first, second = client.act(LOW, seed=1), client.act(HIGH, seed=1)
            session.broken = True
            client.act(HIGH)
        one, two, three = recorded(tmp_path)
        assert one.adjusted is None
        assert two.adjusted.tolist() == [LIMITED]
        assert np.array_equal(two.action[0], second.action)
        assert np.allclose(two.policy_action[0], 1, atol=1e-3)
        assert (three.ok, three.policy_action, three.adjusted.tolist()) == (True, None, [HELD])
        assert np.array_equal(three.action[0], second.action)
        assert first.adjusted is None
