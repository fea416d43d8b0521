"""benchmarks/returns.py: what is trained when, what is made of the curves, and one real run."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rsm_common.errors import ConfigError
from tests.server_process import wait_until

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
import returns  # noqa: E402
import returns_report  # noqa: E402
from returns import Run, arguments, next_run, parse_settings, plan, slice_end  # noqa: E402
from returns_report import Variant  # noqa: E402

sys.path.remove(BENCHMARKS)
BUDGET_S = 1000.0
"""Of a run that the test ends."""
ANT_DPMD = Variant("Ant-v4", "dpmd", "reference", 0.2)
ANT_SAC = Variant("Ant-v4", "sac", "paper", 1.0)


# --- planning ---------------------------------------------------------------------------------------------


def kinds(runs):
    return [(run.variant.algo, run.variant.preset, run.variant.updates_per_step) for run in runs]


def test_the_plan_is_the_published_comparison_and_a_proper_sac():
    runs, skipped = plan(["Ant-v4"], ["dpmd", "sac"], ["reference", "paper"], None, [0])
    wanted = [("dpmd", "reference", 0.2), ("dpmd", "paper", 0.2), ("sac", "paper", 0.2), ("sac", "paper", 1.0)]
    assert kinds(runs) == wanted
    assert len(skipped) == 1
    assert "SAC reference" in skipped[0]


def test_given_rates_hold_for_all_but_the_published_program():
    runs, skipped = plan(["Ant-v4"], ["dpmd", "sac"], ["reference", "paper"], [1.0], [0])
    assert kinds(runs) == [("dpmd", "paper", 1.0), ("sac", "paper", 1.0)]
    assert len(skipped) == 2
    assert "published program" in skipped[0]


def test_the_first_seed_of_everything_comes_first():
    runs, _ = plan(["Ant-v4", "Ant-v5"], ["dpmd"], ["paper", "kl"], None, [3, 4])
    assert [run.seed for run in runs] == [3] * 4 + [4] * 4
    assert len({run.name for run in runs}) == 8
    assert kinds(runs)[:2] == [("dpmd", "paper", 0.2), ("dpmd", "kl", 1.0)]


def simulate(runs, total, slice_steps, slices):
    """Steps after so many slices, and the order in which the runs had them."""
    steps, order = dict.fromkeys(runs, 0), []
    for _ in range(slices):
        run = next_run(steps, total)
        if run is None:
            break
        steps[run] = slice_end(steps[run], slice_steps, total, 30_000)
        order.append(run)
    return steps, order


@pytest.mark.parametrize("slices", [1, 3, 4, 7, 11])
def test_no_run_is_ever_more_than_the_first_slice_ahead(slices):
    runs, _ = plan(["Ant-v4"], ["dpmd", "sac"], ["paper"], None, [0])
    steps, _ = simulate(runs, 1_000_000, 25_000, slices)
    assert max(steps.values()) - min(steps.values()) <= (50_000 if slices < len(runs) else 25_000)


def test_all_runs_finish_exactly_and_then_nothing_is_left():
    runs, _ = plan(["Ant-v4"], ["dpmd", "sac"], ["paper"], None, [0])
    steps, order = simulate(runs, 110_000, 25_000, 1000)
    assert set(steps.values()) == {110_000}
    assert order == [*runs] * 4  # 50k, 75k, 100k, 110k
    assert next_run(steps, 110_000) is None
    assert next_run(steps, 120_000) == runs[0]


def test_a_run_that_was_stopped_goes_on_to_the_next_multiple():
    behind, ahead = Run(ANT_DPMD, 0), Run(ANT_SAC, 0)
    assert next_run({ahead: 75_000, behind: 61_235}, 1_000_000) == behind
    assert slice_end(61_235, 25_000, 1_000_000, 30_000) == 75_000
    assert next_run({ahead: 75_000, behind: 61_235}, 1_000_000, excluded={behind}) == ahead


def test_settings_are_typed_and_passed_on(tmp_path):
    settings = parse_settings(["width=16", "--q-scaling=state", "eval_one_particle=false"])
    assert settings == {"threads": 1, "width": 16, "q_scaling": "state", "eval_one_particle": False}
    directory = tmp_path / "run"
    options = arguments(Run(ANT_SAC, 2), directory, 50_000, settings)
    assert {"--env=Ant-v4", "--updates-per-step=1", "--seed=2", "--total-steps=50000", "--width=16"} <= {
        *options
    }
    assert "--no-eval-one-particle" in options
    assert "--resume" not in options
    directory.mkdir()
    (directory / "config.json").touch()
    assert "--resume" in arguments(Run(ANT_SAC, 2), directory, 50_000, settings)


@pytest.mark.parametrize("text", ["width", "=3", "env=Ant-v4", "total_steps=5"])
def test_a_setting_that_is_none(text):
    with pytest.raises(ConfigError):
        parse_settings([text])


# --- aggregation ------------------------------------------------------------------------------------------


def write_run(root, variant, seed, means, *, width=256, ones=None):
    """A run directory by hand: the k-th evaluation, of two episodes, at step 25,000 k."""
    directory = root / Run(variant, seed).name
    directory.mkdir(parents=True)
    run = {
        "env": variant.env,
        "algo": variant.algo,
        "preset": variant.preset,
        "updates_per_step": variant.updates_per_step,
        "seed": seed,
        "total_steps": 25_000 * len(means),
    }
    config = {"run": run, "algorithm": {"width": width}, "provenance": {"torch": "0"}}
    (directory / "config.json").write_text(json.dumps(config))
    lines = []
    for number, mean in enumerate(means, 1):
        step, wall = 25_000 * number, 10.0 * number
        rates = {"updates": step // 5, "updates_per_s": 4.0, "steps_per_s": 20.0}
        lines.append({"step": step, "wall_s": wall, "kind": "train", **rates})
        evaluation = {"step": step, "wall_s": wall, "kind": "eval", "eval_returns": [mean - 1, mean + 1]}
        lines.append(evaluation | ({"eval1_returns": [ones[number - 1]]} if ones else {}))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def content(root, total_steps=100_000):
    return returns_report.report(returns_report.read_runs(root), total_steps)


def test_seeds_are_averaged_at_the_steps_that_all_have(tmp_path):
    write_run(tmp_path, ANT_DPMD, 0, [10, 30, 20, 900], ones=[1, 2, 3, 4])
    write_run(tmp_path, ANT_DPMD, 1, [20, 10, 40], ones=[5, 6, 7])
    (variant,) = content(tmp_path)["variants"]
    assert variant["curve"]["step"] == [25_000, 50_000, 75_000]
    assert variant["curve"]["mean"] == [15, 20, 30]
    assert (variant["curve"]["min"][1], variant["curve"]["max"][1]) == (10, 30)
    # t(0.975, 1) = 12.706, standard error of 20 and 40: 10.
    assert variant["final"]["mean"] == 30
    assert variant["final"]["high"] == pytest.approx(30 + 127.06, abs=0.01)
    assert variant["final_one_particle"]["mean"] == 5
    # The maximum of each seed, of the steps that all have: 30 and 40, and not 900.
    assert variant["best"]["mean"] == 35
    assert (variant["complete"], variant["steps"], variant["fraction"]) == (False, 75_000, 0.75)


def test_one_seed_has_no_interval_and_a_finished_one_is_complete(tmp_path):
    write_run(tmp_path, ANT_DPMD, 0, [10, 30, 20, 25])
    (variant,) = content(tmp_path)["variants"]
    assert (variant["final"]["mean"], variant["final"]["low"]) == (25, None)
    assert variant["final_one_particle"] is None
    assert (variant["complete"], variant["fraction"]) == (True, 1.0)
    assert content(tmp_path, 1_000_000)["variants"][0]["fraction"] == 0.1


def test_a_seed_without_an_evaluation_is_named_and_holds_completeness_back(tmp_path):
    write_run(tmp_path, ANT_DPMD, 0, [10, 30, 20, 25])
    write_run(tmp_path, ANT_DPMD, 1, [])
    (variant,) = content(tmp_path)["variants"]
    assert (variant["seeds"], variant["seeds_without_evaluation"]) == ([0], [1])
    assert (variant["complete"], variant["steps"]) == (False, 0)


def test_runs_of_different_settings_are_not_averaged(tmp_path):
    write_run(tmp_path, ANT_DPMD, 0, [10])
    write_run(tmp_path, ANT_DPMD, 1, [10], width=16)
    with pytest.raises(ConfigError, match="different"):
        content(tmp_path)


def test_a_run_is_described_with_its_speed(tmp_path):
    write_run(tmp_path, ANT_DPMD, 3, [10, 30])
    (run,) = content(tmp_path)["runs"]
    assert (run["seed"], run["steps"], run["updates"], run["wall_s"]) == (3, 50_000, 10_000, 20.0)
    assert (run["updates_per_s"], run["steps_per_s"]) == (4.0, 20.0)
    assert run["evaluations"]["mean"] == [10, 30]


def test_published_numbers_stand_beside_ours_of_the_same_settings(tmp_path):
    write_run(tmp_path, ANT_DPMD, 0, [1, 2, 3, 321])
    write_run(tmp_path, ANT_SAC, 0, [5, 6])
    record = content(tmp_path)
    rows = [row for row in record["published_elsewhere"] if row["algo"] == "dpmd"]
    assert (rows[0]["step"], rows[0]["mean"], rows[0]["ours"]) == (100_000, 363, 321)
    assert all(row["ours"] is None for row in record["published_elsewhere"] if row is not rows[0])
    assert {row["env"] for row in record["published_elsewhere"]} == {"Ant-v4"}
    text = returns_report.table(record)
    assert "last step that all of these evaluated is 50,000" in text
    assert "| DPMD | reference | 0.2 | 1 | 2 | 100,000 | 321 |" in text
    assert "| Ant-v4 | DPMD | 100,000 | 363 | 321 |" in text


def test_changed_settings_are_told_and_not_compared_with_published_numbers(tmp_path):
    write_run(tmp_path, ANT_DPMD, 0, [1, 2, 3, 321], width=16)
    write_run(tmp_path, ANT_SAC, 0, [5, 6])
    record = content(tmp_path)
    assert [variant["changed_settings"] for variant in record["variants"]] == [{"width": 16}, {}]
    assert all(row["ours"] is None for row in record["published_elsewhere"])
    wanted = "Not the presets' own: width = 16 (DPMD reference, 0.2 updates per step).\n"
    assert wanted in returns_report.table(record)


def test_the_picture_is_drawn(tmp_path):
    write_run(tmp_path / "runs", ANT_DPMD, 0, [1, 2, 3, 321])
    write_run(tmp_path / "runs", ANT_DPMD, 1, [1, 3, 5, 400])
    returns_report.draw(content(tmp_path / "runs"), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


# --- processes --------------------------------------------------------------------------------------------

# Until rsm-train can go on with a run, the real one is of one slice.
SLICE_STEPS = 80 if importlib.util.find_spec("rsm_train.run.stopping") else 160
TINY = {
    "warmup_steps": 60,
    "eval_every": 80,
    "eval_episodes": 2,
    "log_every": 40,
    "batch_size": 16,
    "num_envs": 2,
    "width": 16,
}


def test_a_real_run_is_trained_and_reported(tmp_path, capsys):
    options = [f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out.json'}", "--total-steps=160"]
    more = [
        "--env=InvertedPendulum-v5",
        "--env=Nothing-v4",
        "--algo=sac",
        "--preset=quick",
        f"--slice-steps={SLICE_STEPS}",
    ]
    settings = [f"--set={name}={value}" for name, value in TINY.items()]
    # An environment that cannot be made is an incomplete success.
    assert returns.main([*options, *more, *settings, "--updates-per-step=1"]) == 1
    said = capsys.readouterr()
    assert "left out Nothing-v4" in said.err
    assert "| SAC | quick | 1 | 1 |" in said.out
    record = json.loads((tmp_path / "out.json").read_text())
    (run,) = record["runs"]
    assert (run["steps"], run["updates"]) == (160, 100)
    assert run["evaluations"]["step"] == [80, 160]
    assert run["command"].startswith("rsm-train --")
    assert run["command"].endswith("--num-envs=2 --width=16")
    assert run["trained_on"][0]["cores"] >= 1
    assert record["variants"][0]["complete"] is True
    # Nothing is left to do, and reading alone gives the same.
    assert returns.main([*options, "--report-only"]) == 0
    assert capsys.readouterr().out == said.out


STUB = """
import json, pathlib, signal, sys, time
options = dict(text[2:].split("=", 1) for text in sys.argv[1:] if "=" in text)
directory, end = pathlib.Path(options["out"]), int(options["total-steps"])
directory.mkdir(exist_ok=True)
(directory / "config.json").touch()
if options["algo"] == "sdac":
    sys.exit("out of luck")
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
(directory / "listens").touch()
while not stop and options["algo"] == "dpmd":
    time.sleep(0.01)
with (directory / "metrics.jsonl").open("a") as file:
    file.write(json.dumps({"step": 61 if stop else end, "kind": "train", "updates": 0}) + chr(10))
"""


def test_the_budget_stops_runs_and_a_failure_stops_nothing_else(tmp_path, monkeypatch, capsys):
    # A stand-in for rsm-train: SAC trains at once, SDAC fails, and DPMD goes on until it is told to save.
    monkeypatch.setattr(returns, "TRAINER", (sys.executable, "-c", STUB))
    runs = [Run(Variant("Ant-v4", algo, "paper", 0.2), 0) for algo in ("sac", "sdac", "dpmd")]
    trainer = returns.Trainer(runs, tmp_path, dict.fromkeys(runs, 0), {})
    begun = tmp_path / runs[2].name / "listens"

    def used_up(workers: Sequence[Any], timeout: float) -> Any:
        """End the budget when SAC and SDAC have ended and DPMD has begun."""
        if timeout == BUDGET_S:
            wait_until(lambda: trainer._steps[runs[0]] == 200 and runs[1] in trainer.failed, "SAC and SDAC")
            wait_until(begun.exists, "DPMD")
            timeout = 0
        return concurrent.futures.wait(workers, timeout)

    monkeypatch.setattr(returns, "wait", used_up)
    trainer.train(200, 100, jobs=2, budget_s=BUDGET_S)
    assert [returns_report.steps_of(tmp_path / run.name) for run in runs] == [200, 0, 61]
    assert trainer.failed == {runs[1]}
    assert "out of luck" in capsys.readouterr().err


def test_a_signal_stops_the_runs_and_not_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(returns, "TRAINER", (sys.executable, "-c", STUB))
    run = Run(ANT_DPMD, 0)
    trainer = returns.Trainer([run], tmp_path, {run: 0}, {})
    listens = tmp_path / run.name / "listens"

    def stop() -> None:
        wait_until(listens.exists, "the run")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    trainer.train(200, 100, jobs=1, budget_s=BUDGET_S)
    assert returns_report.steps_of(tmp_path / run.name) == 61
    assert not trainer.failed
