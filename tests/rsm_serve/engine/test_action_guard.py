"""The action guard's decisions, as a pure function of time."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from rsm_common.errors import (
    ConfigError,
    InvalidRequestError,
)
from rsm_common.policy import Adjustment
from rsm_common.spec import BoxSpec
from rsm_serve.engine.action_guard import IDLE_S, ActionGuard, GuardLimits
from tests.bundles import make_spec

SPEC = make_spec()  # two action elements in [-3, 1]
NONE, LIMITED, HELD, CENTERED = Adjustment


def actions(*rows: tuple[float, float]) -> np.ndarray:
    return np.array(rows, np.float32)


def make_guard(limits: GuardLimits, **settings: int) -> Any:
    """Untyped: the tests know which answers are None."""
    return ActionGuard(limits, **settings)


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
