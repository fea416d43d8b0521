"""The search for the cheapest chain: what it compares, what it chooses, what it says."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from rsm_export.build import build, diffusion_sampler
from rsm_export.cli import main
from rsm_export.closed_loop import Arena, Loss, compare_returns
from rsm_export.config import ExportConfig, SearchConfig
from rsm_export.exporter import export_checkpoint
from rsm_export.search import as_trained, candidates, search, table

from rsm_eval.envs import EnvPool
from rsm_serve.errors import ConfigError, ParityError
from rsm_serve.local import open_policy
from rsm_train.checkpoint import load_checkpoint
from rsm_train.diffusion import SamplerSettings
from tests.rsm_train.runs import tiny_run

ENV = "InvertedPendulum-v5"
TRAINED = SamplerSettings("cosine", 20, 6, 0.5)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("runs") / "tiny")


def test_candidates_are_halvings_and_the_full_policy():
    found = candidates(TRAINED, ExportConfig())
    assert {c.steps for c in found} == {20, 10, 5, 2, 1}
    assert {c.particles for c in found} == {6, 3, 1}
    assert len(found) == len(set(found)) == 3 * (2 * 4 + 1)
    assert as_trained(TRAINED) in found


def test_what_is_given_is_not_searched():
    found = candidates(TRAINED, ExportConfig(steps=4, sampler="ddim", eta=0.3, precision="fp16"))
    assert found[-1] == as_trained(TRAINED)
    assert {(c.steps, c.sampler, c.eta, c.precision) for c in found[:-1]} == {(4, "ddim", 0.3, "fp16")}
    assert [c.particles for c in found[:-1]] == [6, 3, 1]


def test_a_loss_is_judged_by_its_interval():
    full = np.array([100.0, 110.0, 90.0, 100.0])
    same, worse, unclear = (
        Loss.of(full, full + change, 0.02)
        for change in (0.0, -50.0 + full / 100, np.array([-9.0, 9.0, -8.0, 8.0]))
    )
    assert (same.within, same.hopeless) == (True, False)
    assert (worse.within, worse.hopeless) == (False, True)
    assert (unclear.within, unclear.hopeless) == (False, False)
    assert same.allowed == pytest.approx(2.0)
    assert worse.mean == pytest.approx(51.0)
    assert "a loss of at most 2.0 of the full policy's 100.0, got" in worse.describe()
    negative = Loss.of(-full, -full - 1, 0.02)
    assert negative.within, "two percent of a cost is a loss of return too"


class Constant:
    """Acts by one number: pushes the pendulum over at once, or leaves it to fall by itself."""

    def __init__(self, policy, value):
        self.spec, self._policy, self._value = policy.spec, policy, value

    def act(self, obs, **arguments):
        answer = self._policy.act(obs, **arguments)
        answer.action[...] = self._value
        return answer


def test_the_return_is_a_check_and_can_fail(run_dir, tmp_path):
    config = SearchConfig(env=ENV, episodes=4, tolerance=0.2)
    made = export_checkpoint(run_dir, tmp_path, "tiny", ExportConfig(), config)
    assert made.verification is not None
    assert made.verification.checks[-1].name == "return"
    assert "got 0.0 to 0.0 (95 %) over 4 episodes" in made.verification.checks[-1].finding
    assert made.spec.evaluation is not None
    assert made.spec.evaluation["episodes"] == 4
    assert made.spec.evaluation["difference_low"] == 0
    policy = open_policy(made.path)
    with pytest.raises(ParityError, match="check 'return' failed: wanted a loss of at most .* got"):
        compare_returns(Constant(policy, 0.0), Constant(policy, 3.0), config)


def test_policies_act_in_the_same_episodes_once_each(run_dir):
    policy = build(load_checkpoint(run_dir), ExportConfig()).open().policy
    calls = []

    class Counted(Constant):
        def act(self, obs, **arguments):
            calls.append((self._value, arguments["seed"].tolist()))
            return super().act(obs, **arguments)

    with EnvPool(ENV) as pool:
        arena = Arena({"a": Counted(policy, 0.0), "b": Counted(policy, 1e-9)}, "a", pool, 0.1)
        loss = arena.loss("b", 5, 3)
        first = list(calls)
        assert arena.loss("b", 5, 3) == loss
    assert calls == first
    seeds = {value: [s for v, s in first if v == value] for value in (0.0, 1e-9)}
    assert seeds[0.0] == seeds[1e-9]
    assert loss.difference.mean == 0
    assert loss.episodes == 3


def test_the_fastest_confirmed_candidate_is_chosen_and_exported(run_dir, tmp_path, capsys):
    plot, figures = tmp_path / "auto.svg", tmp_path / "auto.json"
    arguments = (
        f"--repo {tmp_path} --name tiny --auto --tolerance 0.5 --episodes 8 --plot {plot} --json {figures}"
    )
    assert main([str(run_dir), *arguments.split()]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0].split("  ")[-1] == "confirmed loss (95 %)"
    rows = lines[2 : lines.index("")]
    assert len(rows) == 3 * (2 * 2 + 1)
    (chosen,) = (row for row in rows if row.startswith("->"))
    spec = open_policy(tmp_path / "tiny").spec
    assert chosen.split()[1:4] == [spec.sampler, str(spec.steps), str(spec.particles)]
    latencies = [float(row.replace("->", "").split()[4]) for row in rows]
    assert latencies == sorted(latencies)
    assert spec.evaluation is not None
    assert spec.evaluation["episodes"] == 8
    assert spec.evaluation["difference_low"] >= -0.5 * spec.evaluation["full_policy_mean"]
    assert "screening 15 of 15" in output.err
    assert "<svg" in plot.read_text()
    measured = json.loads(figures.read_text())
    assert len(measured["candidates"]) == len(rows)
    assert measured["candidates"][measured["chosen_index"]]["config"]["steps"] == spec.steps
    assert measured["versions"]["onnxruntime"]
    assert json.loads((tmp_path / "tiny" / "1" / "policy.json").read_text())["accuracy"]["rows"] == 256


def test_where_nothing_cheaper_is_good_enough_the_full_policy_is_exported(run_dir):
    checkpoint = load_checkpoint(run_dir)
    trained = diffusion_sampler(checkpoint)
    full = as_trained(trained)

    def open_candidate(config):
        opened = build(checkpoint, config).open()
        if config != full:
            return dataclasses.replace(opened, policy=Constant(opened.policy, 3.0))
        return opened

    result = search(trained, ExportConfig(), SearchConfig(episodes=12), ENV, open_candidate)
    assert result.chosen.config == full
    assert all(not c.screened.within or c.config == full for c in result.candidates)
    assert table(result).count("->") == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tolerance": 0.0}, "wanted --tolerance between 0 and 1, got 0.0"),
        ({"episodes": 1}, "one says nothing of chance"),
    ],
)
def test_search_settings_out_of_range(settings, words):
    with pytest.raises(ConfigError, match=words):
        SearchConfig(**settings)


def test_a_plot_without_a_search_is_refused(run_dir, tmp_path, capsys):
    assert main([str(run_dir), "--repo", str(tmp_path / "r"), "--plot", "x.png"]) == 2
    assert "nothing is searched" in capsys.readouterr().err
    assert main([str(run_dir), "--repo", str(tmp_path / "r"), "--auto", "--plot", "x.txt"]) == 2
    assert "suffix .svg, .png or .pdf" in capsys.readouterr().err
