"""The action guard: its decisions as a pure function of time, and what clients of a real server get."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from rsm_common.errors import (
    BackendError,
    ConfigError,
    DeadlineExpiredError,
    InvalidRequestError,
    NotReadyError,
    QueueFullError,
    SupersededError,
)
from rsm_common.policy import ActResult, ActRows, Adjustment, Timing
from rsm_common.spec import BoxSpec
from rsm_serve.bundle.contract import load_bundle
from rsm_serve.client import AsyncPolicyClient, PolicyClient
from rsm_serve.commands import client_cli
from rsm_serve.config import ServerConfig
from rsm_serve.engine.action_guard import IDLE_S, ActionGuard, GuardLimits
from rsm_serve.engine.guarded_answers import GuardedAnswers
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.local import LocalPolicy
from rsm_serve.observe.counts import LaneCounts
from rsm_serve.observe.settled import Answered
from rsm_serve.recording.format import read
from rsm_serve.server import PolicyServer, background_server
from rsm_serve.sessions.choice import open_session
from tests.bundles import make_spec, write_bundle
from tests.rsm_serve.http.ask import scrape
from tests.rsm_serve.observe.test_prometheus import Unsound
from tests.rsm_serve.test_server import ANY_PORT, wait_until

SPEC = make_spec()  # two action elements in [-3, 1]
LOW, HIGH = np.array([10.0, 0, 0, 0]), np.array([-10.0, 0, 0, 0])  # observations with actions near the bounds
NONE, LIMITED, HELD, CENTERED = Adjustment


def actions(*rows: tuple[float, float]) -> np.ndarray:
    return np.array(rows, np.float32)


def make_guard(limits: GuardLimits, **settings: int) -> Any:
    """Untyped: the tests know which answers are None."""
    return ActionGuard(limits, **settings)


def recorded(directory: Path) -> list[Any]:
    return list(read(directory))


class TestCore:
    def test_an_action_is_clipped_towards_the_one_before_element_by_element(self):
        guard = make_guard(GuardLimits(0.1))  # 0.4 per step
        first = actions((0, -2))
        given, adjusted = guard.limit(SPEC, "arm", first, 0.0)
        assert given is first
        assert adjusted is None
        given, adjusted = guard.limit(SPEC, "arm", actions((1, -2.25)), 0.1)
        assert np.allclose(given, [[0.4, -2.25]])
        assert adjusted.tolist() == [LIMITED]
        given, _ = guard.limit(SPEC, "arm", actions((1, -2.25)), 0.2)
        assert np.allclose(given, [[0.8, -2.25]])
        given, adjusted = guard.limit(SPEC, "arm", actions((1, -2.25)), 0.3)
        assert np.allclose(given, [[1, -2.25]])
        assert adjusted is None

    def test_the_result_never_leaves_the_bounds(self):
        guard, rng = make_guard(GuardLimits(0.03)), np.random.default_rng(0)
        before = None
        for step in range(300):
            wanted = rng.uniform(-3, 1, (1, 2)).astype(np.float32)
            given, _ = guard.limit(SPEC, "arm", wanted, 0.01 * step)
            assert (given >= SPEC.action_low).all()
            assert (given <= SPEC.action_high).all()
            assert before is None or np.abs(given - before).max() <= 0.03 * 4 * (1 + 1e-5)
            before = given

    def test_clients_policies_and_rows_have_their_own_last_actions(self):
        guard = make_guard(GuardLimits(0.1))
        guard.limit(SPEC, "arm", actions((0, 0), (-3, -3)), 0.0)
        assert guard.limit(SPEC, "leg", actions((1, 1)), 0.0)[1] is None
        assert guard.limit(make_spec("other"), "arm", actions((1, 1)), 0.0)[1] is None
        given, adjusted = guard.limit(SPEC, "arm", actions((1, 1), (-3, -3), (1, 1)), 0.1)
        assert np.allclose(given, actions((0.4, 0.4), (-3, -3), (1, 1)))
        assert adjusted.tolist() == [LIMITED, NONE, NONE]
        guard.limit(SPEC, "arm", actions((0.4, 0.4)), 0.2)  # the other rows are not forgotten by that
        given, _ = guard.limit(SPEC, "arm", actions((0.4, 0.4), (1, 1)), 0.3)
        assert np.allclose(given[1], [-2.6, -2.6])

    def test_an_old_action_is_no_longer_the_last_step(self):
        guard = make_guard(GuardLimits(0.1))
        guard.limit(SPEC, "arm", actions((0, 0)), 0.0)
        assert guard.limit(SPEC, "arm", actions((0, 1)), IDLE_S)[1] is not None
        assert guard.limit(SPEC, "arm", actions((1, -3)), 2 * IDLE_S + 0.1)[1] is None
        slow = dataclasses.replace(SPEC, control_dt_s=1.0)
        guard.limit(slow, "slow", actions((0, 0)), 0.0)
        assert guard.limit(slow, "slow", actions((1, 1)), 9.0)[1] is not None

    def test_the_limit_survives_a_reload_unless_the_action_space_is_another(self):
        guard = make_guard(GuardLimits(0.1))
        guard.limit(SPEC, "arm", actions((0, 0)), 0.0)
        assert guard.limit(make_spec(version="2"), "arm", actions((1, 1)), 0.1)[1] is not None
        wider = dataclasses.replace(SPEC, action=BoxSpec(SPEC.action.names, (-9.0, -9.0), (9.0, 9.0)))
        assert guard.limit(wider, "arm", actions((9, 9)), 0.2)[1] is None

    def test_the_number_of_clients_is_bounded_and_the_silent_one_goes_first(self):
        guard = make_guard(GuardLimits(0.1), max_clients=2)
        for client in ("a", "b", "a", "c"):
            guard.limit(SPEC, client, actions((0, 0)), 0.0)
        assert guard.clients == 2
        assert guard.limit(SPEC, "a", actions((1, 1)), 0.1)[1] is not None
        assert guard.limit(SPEC, "b", actions((1, 1)), 0.1)[1] is None

    def test_who_cannot_be_limited_is_refused(self):
        with pytest.raises(InvalidRequestError, match="give every robot its own client_id, or use a stream"):
            make_guard(GuardLimits(0.1)).admit(None)
        make_guard(GuardLimits(0.1)).admit("arm")
        make_guard(GuardLimits(fallback="hold")).admit(None)

    def test_hold_gives_the_last_action_for_the_idle_time_and_no_longer(self):
        guard = make_guard(GuardLimits(fallback="hold"))
        assert guard.substitute(SPEC, "arm", 1, 0.0) is None
        assert guard.substitute(SPEC, None, 1, 0.0) is None
        guard.limit(SPEC, "arm", actions((0, -1)), 0.0)
        for now in (0.1, 1.0, IDLE_S):
            given, adjusted = guard.substitute(SPEC, "arm", 1, now)
            assert given.tolist() == [[0, -1]]
            assert adjusted.tolist() == [HELD]
        assert guard.substitute(SPEC, "arm", 1, IDLE_S + 0.01) is None
        assert guard.substitute(SPEC, "arm", 2, 0.1) is None

    def test_center_is_reached_by_steps_where_they_are_limited(self):
        assert make_guard(GuardLimits()).substitute(SPEC, "arm", 1, 0.0) is None
        given, adjusted = make_guard(GuardLimits(fallback="center")).substitute(SPEC, None, 2, 0.0)
        assert given.tolist() == [[-1, -1], [-1, -1]]
        assert adjusted.tolist() == [CENTERED, CENTERED]
        guard = make_guard(GuardLimits(0.25, "center"))
        guard.limit(SPEC, "arm", actions((1, -1)), 0.0)
        assert guard.substitute(SPEC, "arm", 1, 0.1)[0].tolist() == [[0, -1]]
        assert guard.substitute(SPEC, "arm", 1, 0.2)[0].tolist() == [[-1, -1]]

    @pytest.mark.parametrize("step", [0.0, -1.0, 1.01, float("nan")])
    def test_a_step_is_a_fraction(self, step):
        with pytest.raises(ConfigError, match="wanted max_action_step above 0 and at most 1"):
            GuardLimits(step)


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

    def test_an_action_that_nobody_got_is_not_the_last_one(self):
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
            await asyncio.sleep(0.01)
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
            with PolicyClient(address, client_id="arm", timeout_s=30) as client:
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
            with PolicyClient(address, timeout_s=30) as client, client.stream() as one, client.stream() as two:
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
                PolicyClient(server.addresses[0], timeout_s=30) as client,
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
            PolicyClient(server.addresses[0], client_id="arm", timeout_s=30) as client,
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
            with PolicyClient(server.addresses[0], client_id="arm", timeout_s=30) as client:
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
            with PolicyClient(server.addresses[0], timeout_s=30) as client, pytest.raises(BackendError):
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
            async with AsyncPolicyClient(address, client_id="arm", timeout_s=30) as client:
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
            PolicyClient(server.addresses[0], timeout_s=30) as client,
        ):
            session.broken = True
            with pytest.raises(BackendError):
                client.act(LOW)

    def test_records_have_the_policys_own_action_beside_the_one_given_out(self, bundle_repo, tmp_path):
        with (
            guarded(bundle_repo, max_action_step=0.25, fallback="hold", record=tmp_path) as (server, session),
            PolicyClient(server.addresses[0], client_id="arm", timeout_s=30) as client,
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
