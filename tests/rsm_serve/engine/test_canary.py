"""Canaries: parsing, shares, and who meets which version."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest

from rsm_common.errors import (
    BundleError,
    ConfigError,
)
from rsm_serve.client import PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.engine.canary import Canary, check_shares, choose, lot
from rsm_serve.engine.lane import Selection
from rsm_serve.local import open_policy
from tests.bundles import make_spec, write_bundle
from tests.hang import HANG_S
from tests.rsm_serve.versions import acting_version, add_version, point, run, serve, settled


def test_parsing():
    assert Canary.parse("a-b.c:12=10%") == Canary("a-b.c", 12, 0.1)
    assert Canary.parse("a:1=0.5%").share == 0.005
    assert str(Canary.parse("a:1=100%")) == "a:1=100%"


@pytest.mark.parametrize(
    "text",
    ["", "a", "a:1", "a:1=10", "a:0=10%", "a=10%", "a:1=0%", "a:1=101%", "a:1=-1%", "../a:1=1%", "a:x=1%"],
)
def test_what_is_not_a_canary_is_refused(text):
    with pytest.raises(ConfigError, match="NAME:VERSION=PERCENT%"):
        Canary.parse(text)


@pytest.mark.parametrize("texts", [["a:1=60%", "a:2=50%"], ["a:1=10%", "a:1=10%"]])
def test_what_does_not_fit_together_is_refused(texts):
    with pytest.raises(ConfigError, match="leave it out or lower a share"):
        check_shares([Canary.parse(text) for text in texts])


def test_a_canary_of_a_policy_that_is_not_served_is_refused(tmp_path):
    canaries = (Canary.parse("a:2=10%"),)
    ServerConfig.from_options(repo=tmp_path, canaries=canaries)
    ServerConfig.from_options(repo=tmp_path, canaries=canaries, policies=(Selection("a", 1),))
    with pytest.raises(ConfigError, match="add --policy a"):
        ServerConfig.from_options(repo=tmp_path, canaries=canaries, policies=(Selection("b"),))


def test_shares_are_kept():
    canaries = [Canary("p", 2, 0.1), Canary("p", 3, 0.25)]
    clients = [f"robot-{number}" for number in range(20_000)]
    chosen = [choose(canaries, lot("p", client, None)) for client in clients]
    for version, share in ((2, 0.1), (3, 0.25), (None, 0.65)):
        # Five standard deviations of a binomial share.
        assert (
            abs(chosen.count(version) / len(clients) - share) < 5 * (share * (1 - share) / len(clients)) ** 0.5
        )


def test_a_larger_share_moves_clients_only_to_the_canary():
    lots = [lot("p", str(number), None) for number in range(5000)]
    small = {n for n, ticket in enumerate(lots) if choose([Canary("p", 2, 0.1)], ticket)}
    large = {n for n, ticket in enumerate(lots) if choose([Canary("p", 2, 0.3)], ticket)}
    assert 0 < len(small) < len(large)
    assert small < large


def test_policies_have_lots_of_their_own():
    pairs = [(lot("p", str(n), None) < 0.5, lot("q", str(n), None) < 0.5) for n in range(2000)]
    assert 0.2 < sum(a and b for a, b in pairs) / 2000 < 0.3  # independent: a quarter


def test_a_lot_is_the_same_in_every_process_and_by_seed_without_a_client():
    code = "from rsm_serve.engine.canary import lot; print(lot('p', 'robot', 1), lot('p', '', 7))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.split() == [repr(lot("p", "robot", 99)), repr(lot("p", "", 7))]
    # Written down: another hash would move every robot of every fleet to another version.
    assert lot("p", "robot", None) == pytest.approx(LOT_OF_ROBOT, abs=0)
    assert lot("p", "", 7) != lot("p", "7", None)


def test_without_client_or_seed_it_is_chance(monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 0.25)
    assert lot("p", "", None) == 0.25


LOT_OF_ROBOT = 0.2824347607709931


class TestCanaries:
    def test_the_specification_is_the_current_versions(self, own_repo):
        """By lot, a client that always meets the current version would send what the canary takes."""
        write_bundle(own_repo, make_spec("tiny", "2", obs_size=6))
        name = next(name for name in map(str, range(99)) if lot("tiny", name, None) >= 0.9)
        with serve(own_repo, canaries=(Canary("tiny", 2, 0.9),)) as server:
            for _ in range(5):
                with PolicyClient(
                    server.addresses[0], policy="tiny", client_id=name, timeout_s=HANG_S
                ) as client:
                    assert client.act(np.zeros(4)).version == "1"

    def test_a_canary_comes_back_with_its_policy(self, own_repo):
        add_version(own_repo, 2)
        with serve(own_repo, canaries=(Canary("tiny", 2, 1.0),)) as server:
            assert acting_version(server) == "2"
            run(server, server.lifecycle.unload("tiny"))
            run(server, server.lifecycle.load("tiny"))
            assert acting_version(server) == "2"
            assert server.registry.current("tiny") == 1

    def test_clients_stick_to_their_version_and_the_answer_names_it(self, own_repo):
        add_version(own_repo, 2)
        share = 0.4
        with serve(own_repo, canaries=(Canary("tiny", 2, share),)) as server:
            assert settled(server) == [("tiny", "1", "READY", ""), ("tiny", "2", "READY", "")]
            for number in range(12):
                name = f"robot-{number}"
                with (
                    PolicyClient(server.addresses[0], timeout_s=HANG_S, client_id=name) as client,
                    client.stream() as s,
                ):
                    versions = {
                        act(np.zeros(4), seed=seed).version for act in (client.act, s.act) for seed in (1, 2)
                    }
                    versions.add(client.act(np.zeros(4), deterministic=True).version)
                assert versions == {"2" if lot("tiny", name, None) < share else "1"}
            assert acting_version(server, client_id="robot-0", version=1) == "1"
            assert acting_version(server, client_id="robot-0", version=2) == "2"

    def test_requests_without_a_client_are_drawn_one_by_one_and_again_by_their_seed(self, own_repo):
        add_version(own_repo, 2)
        with (
            serve(own_repo, canaries=(Canary("tiny", 2, 0.5),)) as server,
            PolicyClient(server.addresses[0], timeout_s=HANG_S) as client,
        ):
            local = {number: open_policy(own_repo / "tiny" / number, "onnxruntime") for number in ("1", "2")}
            for seed in range(20):
                first, again = (client.act(np.zeros(4), seed=seed) for _ in range(2))
                assert first.version == again.version == ("2" if lot("tiny", "", seed) < 0.5 else "1")
                assert np.allclose(
                    first.action, local[first.version].act(np.zeros(4), seed=seed).action, atol=1e-6
                )
            assert {client.act(np.zeros(4)).version for _ in range(64)} == {"1", "2"}
            noise = np.zeros(client.spec.noise_shape, np.float32)
            assert {client.act(np.zeros(4), deterministic=True).version for _ in range(8)} == {"1"}
            assert {client.act(np.zeros(4), noise=noise).version for _ in range(8)} == {"1"}

    def test_a_canary_becomes_current_by_the_pointer_and_newer_versions_come_beside_it(self, own_repo):
        add_version(own_repo, 2)
        with serve(own_repo, canaries=(Canary("tiny", 2, 0.5),)) as server:
            add_version(own_repo, 3)
            run(server, server.lifecycle.refresh())
            assert [entry[1] for entry in settled(server)] == ["2", "3"]
            assert server.registry.current("tiny") == 3
            point(own_repo, 2)
            run(server, server.lifecycle.refresh())
            assert [entry[1] for entry in settled(server)] == ["2"]
            assert acting_version(server) == "2"

    def test_a_canary_that_is_not_there_is_a_mistake(self, own_repo):
        canaries = (Canary("tiny", 2, 0.5),)
        with (
            pytest.raises(BundleError, match="for --canary, got versions 1"),
            serve(own_repo, canaries=canaries),
        ):
            pass
