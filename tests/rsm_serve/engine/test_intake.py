"""The intake: every request is counted once, and every listener is told once how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rsm_common.errors import BackendError, InvalidRequestError, LimitReachedError, PolicyNotFoundError
from rsm_common.policy import ActResult, ActRows, act_rows
from rsm_serve.bundle.contract import load_bundle
from rsm_serve.engine.action_guard import GuardLimits
from rsm_serve.engine.guarded_answers import GuardedAnswers
from rsm_serve.engine.intake import Future, Intake
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.engine.registry import Registry
from rsm_serve.local import LocalPolicy
from rsm_serve.observe.counts import ServerCounts
from rsm_serve.observe.settled import Answered, Settled
from rsm_serve.sessions.choice import open_session
from rsm_serve.wire.caller import Caller
from tests.hang import HANG_S
from tests.rsm_serve.test_server import Gated

SERVICE = "rsm.v1.PolicyService"
CALLER = Caller("arm-7", 0, None, fixed=False)


class Call:
    """A caller without a deadline."""

    def time_remaining(self) -> None:
        """No deadline."""

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def invocation_metadata(self) -> list[tuple[str, Any]]:
        return [("key", "value"), ("authorization", "Bearer secret")]


class Rig:
    """A lane with a session that the test opens and closes, behind an intake whose events are kept."""

    def __init__(self, repo, **settings: Any) -> None:
        bundle = load_bundle(repo / "tiny")
        self.session = Gated(open_session(bundle))
        self.lane = Lane(LocalPolicy(bundle, self.session), BatchLimits(max_batch_size=4, max_queue_rows=4))
        self.counts = ServerCounts()
        self.events: list[Settled] = []
        registry = Registry([self.lane], self.counts)
        self.intake = Intake(registry, self.counts, [self.events.append], **settings)

    def ask(self, decode: Callable[[Lane], ActRows], policy: str = "tiny", caller: Caller = CALLER) -> Future:
        with self.intake.receive(SERVICE, "Act", Call(), policy, "") as arrival:
            return arrival.submit(decode(arrival.find(caller)))

    async def answer(self, decode: Callable[[Lane], ActRows]) -> Answered[ActResult]:
        """Ask, and return the answer when it is counted."""
        answered = await self.ask(decode)
        await asyncio.sleep(0)
        return answered

    def run(self, scenario: Callable[[], Any]) -> None:
        async def main() -> None:
            self.lane.batcher.start()
            try:
                await scenario()
            finally:
                self.session.open.set()
                self.lane.batcher.close()
                await asyncio.wait_for(self.lane.batcher.drained(), HANG_S)

        asyncio.run(main())

    @property
    def ended(self) -> list[tuple[str, str]]:
        return [(event.code, event.reason) for event in self.events]


@pytest.fixture
def rig(bundle_repo) -> Rig:
    return Rig(bundle_repo)


def rows(count: int) -> Callable[[Lane], ActRows]:
    return lambda lane: act_rows(lane.spec, np.zeros((count, 4)), seed=1)


def refuse(lane: Lane) -> ActRows:
    raise InvalidRequestError("not like this")


def test_an_answer_is_one_event_with_the_request_and_both_answers(rig):
    async def scenario() -> None:
        answered = await rig.answer(rows(2))
        (event,) = rig.events
        assert event.given is event.sampled is answered
        assert (event.service, event.method, event.policy, event.version) == (SERVICE, "Act", "tiny", "1")
        assert (event.code, event.reason, event.client_id) == ("OK", "", "arm-7")
        assert event.rows is not None
        assert event.rows.noise_BTNA is None, "the noise that the server drew is not the caller's"
        assert event.seconds > 0
        assert event.metadata == ()
        counts = rig.lane.counts
        assert (counts.requests, counts.rows) == ({("Act", "OK", ""): 1}, 2)
        assert counts.request_s.count == counts.queue_s.count == counts.network.count == counts.executions == 1
        assert counts.last_arrival_ns == event.arrived_unix_ns

    rig.run(scenario)


def test_a_refusal_is_one_event_wherever_it_happens(rig):
    async def scenario() -> None:
        for error, decode, policy in (
            (PolicyNotFoundError, rows(1), "nope"),
            (InvalidRequestError, refuse, "tiny"),
            (AssertionError, rows(5), "tiny"),
        ):
            with pytest.raises(error):
                rig.ask(decode, policy)

    rig.run(scenario)
    assert rig.ended == [
        ("NOT_FOUND", "unknown_policy"),
        ("INVALID_ARGUMENT", "invalid"),
        ("INTERNAL", "fault"),
    ]
    assert [event.policy for event in rig.events] == ["nope", "tiny", "tiny"]
    assert all(event.rows is None and event.given is None for event in rig.events)
    assert rig.counts.refusals == {("Act", "NOT_FOUND", "unknown_policy"): 1}
    assert sum(rig.lane.counts.requests.values()) == rig.lane.counts.failed.count == 2


def test_an_answer_does_not_wait_until_it_is_counted(rig):
    async def scenario() -> None:
        await rig.ask(rows(2))
        assert (rig.events, rig.lane.counts.requests, rig.lane.counts.compute_s.count) == ([], {}, 0)
        await asyncio.sleep(0)
        assert (rig.ended, rig.lane.counts.rows, rig.lane.counts.compute_s.count) == ([("OK", "")], 2, 1)

    rig.run(scenario)


def test_a_request_that_is_given_up_is_neither_answered_nor_failed(rig):
    async def scenario() -> None:
        rig.session.open.clear()
        while rig.session.entered.acquire(blocking=False):
            pass
        first, second = rig.ask(rows(1)), rig.ask(rows(2))
        assert await asyncio.to_thread(rig.session.entered.acquire, True, HANG_S)
        second.cancel()
        rig.session.open.set()
        await first

    rig.run(scenario)
    assert sorted(rig.ended) == [("CANCELLED", "cancelled"), ("OK", "")]
    assert (rig.lane.counts.request_s.count, rig.lane.counts.failed.count) == (1, 0)


def test_a_batch_is_counted_once_however_many_requests_it_has(rig):
    async def scenario() -> None:
        rig.session.open.clear()
        while rig.session.entered.acquire(blocking=False):
            pass
        first = rig.ask(rows(1))
        assert await asyncio.to_thread(rig.session.entered.acquire, True, HANG_S)
        others = [rig.ask(rows(1)) for _ in range(3)]
        rig.session.open.set()
        await asyncio.gather(first, *others)

    rig.run(scenario)
    counts = rig.lane.counts
    assert counts.network.count == 4
    assert {size: batches.network.count for size, batches in counts.by_batch_rows.items()} == {1: 1, 3: 1}
    assert counts.executions == counts.compute_s.count == 2


def test_a_fallback_is_an_answer_that_was_not_computed(bundle_repo):
    guard = GuardedAnswers(GuardLimits(fallback="center"))
    rig = Rig(bundle_repo, guard=guard, metadata_keys=frozenset(["key"]))
    rig.session.failure = RuntimeError("no")

    async def scenario() -> None:
        answered = await rig.answer(rows(2))
        (event,) = rig.events
        assert event.given is answered
        assert event.sampled is None
        assert event.metadata == [("key", "value")]

    rig.run(scenario)
    counts = rig.lane.counts
    assert (counts.requests, counts.rows, counts.fallbacks) == ({("Act", "OK", ""): 1}, 2, 1)
    assert (counts.request_s.count, counts.queue_s.count, counts.executions) == (1, 0, 0)
    assert counts.failed_executions == 1


def test_a_listener_that_raises_changes_no_answer_and_no_error(rig, caplog):
    def broken(event: Settled) -> None:
        raise RuntimeError("a listener's fault")

    rig.intake.listeners = (broken, *rig.intake.listeners)

    async def scenario() -> None:
        assert (await rig.answer(rows(1))).answer.action.shape == (1, 2)
        with pytest.raises(InvalidRequestError, match="not like this"):
            rig.ask(refuse)

    rig.run(scenario)
    assert rig.ended == [("OK", ""), ("INVALID_ARGUMENT", "invalid")]
    assert caplog.text.count("a listener of requests failed") == 2


def test_a_failure_of_the_policy_is_one_event(rig):
    rig.session.failure = RuntimeError("no")

    async def scenario() -> None:
        with pytest.raises(BackendError):
            await rig.ask(rows(1))

    rig.run(scenario)
    assert rig.ended == [("INTERNAL", "backend")]
    assert rig.events[0].rows is not None


def test_streams_are_counted_in_one_place(bundle_repo):
    rig = Rig(bundle_repo, max_streams=1)
    rig.intake.streams(+1)
    with pytest.raises(LimitReachedError, match="at most 1 open streams"):
        rig.intake.streams(+1)
    assert rig.counts.open_streams == 1
    rig.intake.streams(-1)
    rig.intake.streams(+1)
    assert rig.counts.refusals == {("", "RESOURCE_EXHAUSTED", "limit"): 1}
