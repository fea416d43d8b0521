"""The search for the cheapest chain: what it compares, what it chooses, what it says."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rsm_export.auto import closed_loop
from rsm_export.auto import search as search_module
from rsm_export.auto.closed_loop import CONFIRMING_SEED, SCREENING_SEED, Arena, Loss, compare_returns
from rsm_export.auto.search import as_trained, candidates, search, table
from rsm_export.build import build, diffusion_sampler
from rsm_export.checks.accuracy import Tolerance, allowed
from rsm_export.cli import main
from rsm_export.config import ExportConfig, SearchConfig
from rsm_export.exporter import export_checkpoint
from rsm_export.graph.cost import GraphCost

from rsm_common.errors import BundleError, ConfigError, ParityError
from rsm_eval.envs import EnvPool
from rsm_serve.local import open_policy
from rsm_train.model.samplers.diffusion import DiffusionSampler
from rsm_train.run.checkpoint import load_checkpoint
from tests.rsm_export.policies import random_policy
from tests.rsm_train.runs import tiny_run

ENV = "InvertedPendulum-v5"
TRAINED = DiffusionSampler("cosine", 20, 6, 0.5)


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
    assert {(c.steps, c.sampler, c.eta, c.precision) for c in found} == {(4, "ddim", 0.3, "fp16")}
    assert [c.particles for c in found] == [6, 3, 1]


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
        arena.loss("b", 6, 3)
        assert len(calls) > len(first), "other episodes are other returns"
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
    # What was asked for is honoured or refused, and the full policy was not asked for here.
    with pytest.raises(ConfigError, match="wanted a chain within 0.02 of .* got none with the options"):
        search(trained, ExportConfig(particles=2), SearchConfig(episodes=12), ENV, open_candidate)


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


def test_the_full_policy_is_checked_and_run_as_asked():
    base = ExportConfig(verify=False, backend="openvino")
    assert as_trained(TRAINED, base) == dataclasses.replace(
        as_trained(TRAINED), verify=False, backend="openvino"
    )
    low = dataclasses.replace(base, precision="bf16")
    assert (as_trained(TRAINED, low).precision, as_trained(TRAINED, low).backend) == ("fp32", None)
    assert as_trained(TRAINED, low) not in candidates(TRAINED, low)


class ClosedOnce:
    """A session that knows whether it was closed."""

    def __init__(self, session):
        self._session, self.run, self.runtime, self.closed = session, session.run, session.runtime, False

    def close(self):
        assert not self.closed
        self.closed = True
        self._session.close()


def refusing(run_dir, refused):
    checkpoint = load_checkpoint(run_dir)
    opened = []

    def open_candidate(config):
        if refused(config):
            raise BundleError("rounds too much")
        made = build(checkpoint, config).open()
        opened.append(dataclasses.replace(made, session=ClosedOnce(made.session)))
        return opened[-1]

    return diffusion_sampler(checkpoint), open_candidate, opened


def test_a_candidate_that_fails_a_check_is_left_out(run_dir):
    trained, open_candidate, opened = refusing(run_dir, lambda config: config.steps == 1)
    said: list[str] = []
    config = SearchConfig(episodes=8, tolerance=0.5)
    result = search(trained, ExportConfig(), config, ENV, open_candidate, said.append)
    assert len(result.candidates) == len(opened) == 3 * 2 * 2
    assert all(found.config.steps != 1 for found in result.candidates)
    assert "left out ddpm, 1 step, 2 particles: rounds too much" in said
    assert all(item.session.closed for item in opened)


def test_where_every_candidate_or_the_full_policy_fails_the_reason_is_said(run_dir):
    base, config = ExportConfig(precision="fp16"), SearchConfig(episodes=8)
    for refused in (lambda c: c.precision == "fp16", lambda c: c.precision == "fp32"):
        trained, open_candidate, opened = refusing(run_dir, refused)
        with pytest.raises(BundleError, match="rounds too much"):
            search(trained, base, config, ENV, open_candidate)
        assert all(item.session.closed for item in opened), "what was opened is closed"


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_search_passes_over_what_its_precision_cannot_do(run_dir, tmp_path, monkeypatch, precision, capsys):
    """One step multiplies rounding by up to 406; a search of other chains does not end there."""

    def no_single_step(policy, obs, noise, precision):
        return Tolerance(0.0, 0.0) if policy.spec.steps == 1 else allowed(policy, obs, noise, precision)

    # How much this policy rounds depends on how it was trained, so the test says which chains round too much.
    monkeypatch.setattr("rsm_export.checks.verification.allowed", no_single_step)
    arguments = f"--repo {tmp_path} --name tiny --auto --tolerance 0.9 --episodes 8 --precision {precision}"
    assert main([str(run_dir), *arguments.split()]) == 0
    assert f"left out ddpm, 1 step, 4 particles, {precision}: check 'parity' failed" in capsys.readouterr().err
    assert open_policy(tmp_path / "tiny").spec.accuracy is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--auto", "--plot", "missing/auto.svg"],
            "wanted --plot in a directory that exists, got 'missing/auto.svg'",
        ),
        (["--env", ENV, "--plot", "x.svg"], "wanted --auto with --plot, got --plot alone; nothing is searched"),
        (["--episodes", "5"], "wanted --auto or --env with --tolerance, --episodes or --env-arg"),
        (
            ["--tolerance", "0.5"],
            "wanted --auto or --env with --tolerance, --episodes or --env-arg",
        ),
        (["--env", ENV, "--no-verify"], "wanted --env as one of the checks, got --no-verify"),
    ],
)
def test_options_that_would_be_passed_over_are_refused(run_dir, tmp_path, capsys, arguments, words):
    assert main([str(run_dir), "--repo", str(tmp_path / "r"), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "r").exists()


def test_a_plot_that_cannot_be_written_is_one_sentence(run_dir, tmp_path, capsys):
    (tmp_path / "taken.svg").mkdir()
    arguments = f"--repo {tmp_path} --name tiny --auto --steps 5 --particles 4 --episodes 2"
    assert main([str(run_dir), *arguments.split(), "--plot", str(tmp_path / "taken.svg")]) == 2
    assert "taken.svg', got Is a directory; the bundle is complete" in capsys.readouterr().err
    assert open_policy(tmp_path / "tiny").spec.version == "1"


def losses(mean, spread=0.0):
    """A full policy of 100 a paired episode, and a candidate that differs by mean +- spread."""
    full = np.full(4, 100.0)
    return Loss.of(full, full + mean + spread * np.array([-1.0, 1.0, -1.0, 1.0]), 0.02)


class ScriptedArena:
    """Losses by steps: those of screening and those of confirming."""

    def __init__(self, screened, confirmed):
        self.calls = []
        self._losses = {SCREENING_SEED: screened, CONFIRMING_SEED: confirmed}

    def loss(self, config, seed, episodes):
        self.calls.append((config.steps, seed, episodes))
        return self._losses[seed].get(config.steps, losses(0.0))


@pytest.mark.parametrize(("episodes", "screening"), [(20, 5), (4, 2)])
def test_screening_leaves_out_the_hopeless_and_confirming_decides(monkeypatch, episodes, screening):
    """The fewer steps the faster: 1 is hopeless, 2 are not confirmed, 4 are, 8 are the full policy."""
    script = ScriptedArena(screened={1: losses(-50.0), 2: losses(-3.0, 5.0)}, confirmed={2: losses(-1.0, 5.0)})
    monkeypatch.setattr(search_module, "Arena", lambda *_: script)
    monkeypatch.setattr(search_module, "EnvPool", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(search_module, "_measure_latency", lambda opened: {c: float(c.steps) for c in opened})
    session = SimpleNamespace(close=lambda: None)
    item: Any = SimpleNamespace(policy=None, cost=GraphCost(0, 0, 0, 0), session=session)
    trained = DiffusionSampler("cosine", 8, 1, 0.5)
    base, config = ExportConfig(sampler="ddpm"), SearchConfig(episodes=episodes)
    result = search(trained, base, config, "Any-v0", lambda _: item)
    assert [found.config.steps for found in result.candidates] == [1, 2, 4, 8]
    assert result.chosen.config.steps == 4
    assert script.calls == [
        *((steps, SCREENING_SEED, screening) for steps in (1, 2, 4, 8)),
        (2, CONFIRMING_SEED, episodes),
        (4, CONFIRMING_SEED, episodes),
    ]
    assert [found.confirmed is not None for found in result.candidates] == [False, True, True, False]
    shown = table(result).splitlines()[2:]
    assert [row.startswith("->") for row in shown] == [False, False, True, False]
    assert shown[0].split()[6:] == ["50.0", "to", "50.0", "-"], "a loss is positive"


def test_latency_is_the_median_of_single_calls_in_milliseconds(run_dir, monkeypatch):
    spec = build(load_checkpoint(run_dir), ExportConfig()).policy.spec
    clock = SimpleNamespace(now=0.0, calls=0)

    def run(obs, noise):
        assert (len(obs), len(noise)) == (1, 1)
        clock.calls += 1
        clock.now += 5.0 if clock.calls == 1 else 0.002

    monkeypatch.setattr("rsm_export.auto.search.time.perf_counter", lambda: clock.now)
    item: Any = SimpleNamespace(policy=SimpleNamespace(spec=spec), session=SimpleNamespace(run=run))
    (latency_ms,) = search_module._measure_latency({ExportConfig(): item}).values()
    assert latency_ms == pytest.approx(2.0)


def test_a_loss_that_chance_may_have_made_is_neither_within_nor_hopeless():
    unclear, small = losses(-5.0, 5.0), losses(-1.0, 0.1)
    assert unclear.difference.mean < -unclear.allowed < unclear.difference.high
    assert (unclear.within, unclear.hopeless) == (False, False)
    assert small.difference.high < 0
    assert (small.within, small.hopeless) == (True, False)
    assert unclear.std == pytest.approx(np.std([90.0, 100.0, 90.0, 100.0], ddof=1))
    low, high = (float(word) for word in unclear.interval.split(" to "))
    assert low < 5.0 < high
    assert (low + high) / 2 == pytest.approx(5.0)
    stated = unclear.to_dict()
    assert (stated["mean"], stated["full_policy_mean"]) == pytest.approx((95.0, 100.0))
    assert stated["difference_low"] < -5.0 < stated["difference_high"]


@pytest.mark.parametrize(("found", "refused"), [(losses(-5.0, 5.0), False), (losses(-5.0), True)])
def test_as_a_check_only_a_loss_that_is_shown_is_refused(monkeypatch, found, refused):
    policy = random_policy()
    arena = SimpleNamespace(loss=lambda *_: found)
    monkeypatch.setattr(closed_loop, "Arena", lambda *_: arena)
    monkeypatch.setattr(closed_loop, "EnvPool", lambda *_: contextlib.nullcontext())
    with pytest.raises(ParityError, match="check 'return'") if refused else contextlib.nullcontext():
        assert compare_returns(policy, policy, SearchConfig(env="Any-v0")) is found
