"""The registry: which version is current, states, and where a request goes."""

from __future__ import annotations

import pytest

from rsm_common.errors import (
    NotReadyError,
)
from rsm_serve.bundle.contract import load_bundle
from rsm_serve.engine.canary import Canary
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.engine.registry import Registry, State
from rsm_serve.local import LocalPolicy
from rsm_serve.sessions.choice import open_session
from tests.bundles import make_spec, write_bundle


class TestRegistry:
    """The rules that no server is needed for."""

    @pytest.fixture
    def lanes(self, tmp_path):
        lanes = []
        for version in ("1", "2"):
            path = write_bundle(tmp_path, make_spec("p", version))
            bundle = load_bundle(path)
            lanes.append(Lane(LocalPolicy(bundle, open_session(bundle, "onnxruntime")), BatchLimits()))
        return lanes

    def test_the_newest_is_current_unless_another_is_made(self, lanes):
        registry = Registry(lanes)
        assert (registry.current("p"), registry.ready("p"), registry.names) == (2, {1, 2}, ["p"])
        registry.set_current("p", 1)
        assert registry.find("", "") is registry.find("p", "1") is lanes[0]

    def test_a_canary_is_not_current_and_falls_back_to_it_when_it_is_gone(self, lanes):
        registry = Registry(lanes, canaries=[Canary("p", 2, 1.0)])
        assert registry.current("p") == 1
        assert registry.find("p", "", client_id="r") is lanes[1]
        assert registry.find("", "", seed=3) is lanes[1]
        assert registry.find("p", "", fixed=True) is lanes[0]
        assert registry.find("p", "", client_id="r", fixed=True) is lanes[1]
        registry.withdraw("p", 2)
        assert registry.find("p", "", client_id="r") is lanes[0]

    def test_states(self, lanes):
        registry = Registry(lanes[:1])
        registry.loading("p", 2)
        registry.failed("p", 3, "because")
        states = [(status.version, status.state, status.reason) for status in registry.index()]
        assert states == [(1, State.READY, ""), (2, State.LOADING, ""), (3, State.FAILED, "because")]
        with pytest.raises(NotReadyError, match="is being loaded"):
            registry.find("p", "2")
        with pytest.raises(NotReadyError, match="failed to load"):
            registry.find("p", "3")
        registry.publish(lanes[1])
        registry.set_current("p", 2)
        assert registry.withdraw("p", 1) is lanes[0]
        assert [status.state for status in registry.index()] == [State.DRAINING, State.READY, State.FAILED]
        registry.drained(lanes[0])
        registry.forget("p", 3)
        assert [status.version for status in registry.index()] == [2]
        assert registry.failure("p", 3) == ""

    def test_the_same_version_anew_takes_the_place_of_the_old(self, lanes, tmp_path):
        registry = Registry(lanes[:1])
        bundle = load_bundle(tmp_path / "p" / "1")
        anew = Lane(LocalPolicy(bundle, open_session(bundle, "onnxruntime")), BatchLimits())
        assert registry.publish(anew) is lanes[0]
        assert registry.find("p", "") is anew
        assert registry.draining == [lanes[0]]
