"""Canaries: parsing, shares, and who meets which version."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from rsm_common.errors import ConfigError
from rsm_serve.config import ServerConfig
from rsm_serve.engine.canary import Canary, check_shares, choose, lot
from rsm_serve.engine.lane import Selection


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
