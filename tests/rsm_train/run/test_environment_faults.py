"""Environments that fail or change: one sentence, status 2, nothing lost, and a resume that goes on."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from rsm_eval.cli import main as evaluate
from rsm_train.cli import main
from rsm_train.run.checkpoint import load_checkpoint
from rsm_train.run.checkpoint_files import list_checkpoints, read_state
from tests.rsm_eval.bad_envs import BAD, MODULE, BadEnv
from tests.rsm_train.runs import TINY

SETTINGS = {**TINY, "env": BAD, "total_steps": 120, "warmup_steps": 40, "eval_every": 40, "log_every": 20}


def options(**changes):
    return [f"--{name.replace('_', '-')}={value}" for name, value in (SETTINGS | changes).items()]


def arguments(**values):
    return [f"--env-arg={name}={value}" for name, value in values.items()]


@pytest.fixture(autouse=True)
def first_instance():
    """The pool of the evaluation holds instance 0; the training environments come after it."""
    BadEnv.created = 0


def refused(argv, capfd):
    """The only sentence on stderr of a command that ends with status 2."""
    assert main(argv) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def records(run):
    """The lines of metrics.jsonl, which must be JSON without NaN."""

    def refuse(name):
        raise AssertionError(name)

    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.parametrize(
    ("fault", "vector"),
    [
        *((fault, "sync") for fault in ("reward 1e39", "reward none", "obs short", "flag none")),
        *((fault, "async") for fault in ("reward 1e39", "obs nan", "exit")),
    ],
)
def test_a_fault_in_training_is_one_sentence_and_nothing_of_it_is_stored(tmp_path, capfd, fault, vector):
    run = tmp_path / "run"
    sentence = refused([*options(vector=vector, out=run), *arguments(fault=fault, at=4)], capfd)
    assert re.match(rf"rsm-train: environment [01] \({re.escape(BAD)}\)", sentence)
    assert sentence.endswith(f"; correct the environment, then go on with: rsm-train --resume --out {run}")
    assert records(run) == []


@pytest.mark.parametrize("vector", ["sync", "async"])
@pytest.mark.parametrize("fault", ["constructor file", "constructor exit"])
@pytest.mark.parametrize("instance", [0, 1, 2])
def test_a_constructor_that_fails_leaves_nothing(tmp_path, capfd, fault, vector, instance):
    run = tmp_path / "run"
    argv = [*options(vector=vector, out=run), *arguments(fault=fault, instance=instance)]
    sentence = refused(argv, capfd)
    assert f"wanted to create environment {BAD} --env-arg fault={fault}" in sentence
    assert not run.exists()


def test_a_constructor_that_fails_only_in_a_worker_is_one_sentence(tmp_path, capfd, monkeypatch):
    """Instance 2 is that of the first worker; instance 1 tells Gymnasium the spaces."""
    argv = [*options(vector="async", out=tmp_path / "run"), *arguments(fault="constructor file", instance=2)]
    assert "FileNotFoundError" in refused(argv, capfd)


@pytest.mark.parametrize("fault", ["raise", "reward nan"])
def test_a_fault_in_evaluation_only_loses_nothing_and_can_be_resumed(tmp_path, capfd, fault):
    run = tmp_path / "run"
    faulty = arguments(fault=fault, instance=0)
    sentence = refused([*options(out=run), *faulty], capfd)
    assert sentence.startswith(f"rsm-train: environment {BAD}")
    assert sentence.endswith(f"; correct the environment, then go on with: rsm-train --resume --out {run}")
    (checkpoint,) = list_checkpoints(run)
    assert checkpoint.name == "step_000000040"
    assert read_state(checkpoint)["evaluation"] is None
    assert all(record["kind"] == "train" for record in records(run))

    BadEnv.created = 1  # the fault is away
    assert main(shlex.split(sentence.rpartition("go on with: rsm-train ")[2])) == 0
    evaluations = [record for record in records(run) if record["kind"] == "eval"]
    assert [record["step"] for record in evaluations] == [40, 80, 120]
    # The evaluation that is made up for is the one of an uninterrupted run.
    BadEnv.created = 1
    other = tmp_path / "other"
    assert main([*options(out=other), *faulty]) == 0
    expected = [record for record in records(other) if record["kind"] == "eval"]
    assert [record["eval_returns"] for record in evaluations] == [r["eval_returns"] for r in expected]
    states = [read_state(list_checkpoints(path)[-1]) for path in (run, other)]
    for state in states:
        del state["training"]["wall_s"]
        del state["training"]["cpu_s"]
    assert states[0] == states[1]
    assert load_checkpoint(run).spec.evaluation == load_checkpoint(other).spec.evaluation


def test_the_last_evaluation_is_made_up_for_too(tmp_path, capfd):
    run = tmp_path / "run"
    argv = [*options(out=run, eval_every=120), *arguments(fault="raise", instance=0)]
    refused(argv, capfd)
    assert read_state(list_checkpoints(run)[-1])["step"] == 120
    BadEnv.created = 1
    assert main(["--resume", "--out", str(run)]) == 0
    assert [record["step"] for record in records(run) if record["kind"] == "eval"] == [120]
    assert main(["--resume", "--out", str(run)]) == 0
    assert "the run is finished at step 120" in capfd.readouterr().err


def test_a_line_that_was_written_before_a_kill_is_not_there_twice(tmp_path, capfd, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as context:
        context.setattr("rsm_train.run.saving.record_evaluation", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(options(out=run))
    assert [record["step"] for record in records(run) if record["kind"] == "eval"] == [40]
    assert main(["--resume", "--out", str(run)]) == 0
    assert [record["step"] for record in records(run) if record["kind"] == "eval"] == [40, 80, 120]


@pytest.fixture
def finished(tmp_path):
    run = tmp_path / "run"
    assert main(options(out=run, total_steps=80)) == 0
    return run


def more(run):
    return ["--resume", "--out", str(run), "--total-steps", "120"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"obs_size": 5}, "got one with 5 observation elements instead of 4"),
        ({"action_high": 2.0}, "got one with bounds [-3.0, 2.0] of action element 1 instead of [-3.0, 1.0]"),
    ],
)
def test_a_changed_environment_is_refused_with_both_values(finished, capfd, monkeypatch, changes, words):
    create = BadEnv.__init__
    monkeypatch.setattr(BadEnv, "__init__", lambda self, **given: create(self, **{**given, **changes}))
    sentence = refused(more(finished), capfd)
    assert f"wanted the environment {BAD} that the run has learnt in, {words}; resume with" in sentence
    monkeypatch.undo()
    assert main(more(finished)) == 0


def test_other_arguments_are_refused_on_resume_with_both_values(finished, capfd):
    sentence = refused([*more(finished), *arguments(obs_size=6)], capfd)
    assert "wanted --env-arg {} as the run" in sentence
    assert "got {'obs_size': 6}" in sentence


def test_arguments_belong_to_the_run_the_checkpoint_and_its_evaluation(tmp_path, capfd):
    run = tmp_path / "run"
    assert main([*options(out=run, total_steps=80), *arguments(obs_size=6, fault="")]) == 0
    spec = load_checkpoint(run).spec
    assert (spec.env_args, spec.observation.size) == ({"obs_size": 6, "fault": ""}, 6)
    assert main(more(run)) == 0
    output = tmp_path / "out.json"
    command = ["--policy", str(run), "--episodes", "2", "--latency-calls", "0", "--json", str(output)]
    assert evaluate(command) == 0
    assert json.loads(output.read_text())["env_args"] == {"obs_size": 6, "fault": ""}
    capfd.readouterr()
    assert evaluate([*command, "--env-arg", "obs_size=7"]) == 2
    assert "wanted 6 observation elements, the environment has 7" in capfd.readouterr().err


def test_each_seed_of_a_command_gets_the_arguments(tmp_path):
    out = tmp_path / "s{seed}"
    settings = {name: value for name, value in SETTINGS.items() if name != "seed"} | {"total_steps": 40}
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    assert main([*argv, "--seeds=0,1", f"--out={out}", *arguments(obs_size=5, fault='""')]) == 0
    for seed in (0, 1):
        spec = load_checkpoint(Path(str(out).format(seed=seed))).spec
        assert spec.env_args == {"obs_size": 5, "fault": ""}


def test_running_statistics_in_the_environment_are_told(tmp_path, capfd):
    assert main(options(env=f"{MODULE}:RsmNormalized-v0", out=tmp_path / "run", total_steps=40)) == 0
    assert "warning: " in (said := capfd.readouterr().err)
    assert "has NormalizeReward and NormalizeObservation" in said
    assert evaluate(["--policy", str(tmp_path / "run"), "--episodes", "1", "--latency-calls", "0"]) == 0
    assert "has NormalizeReward and NormalizeObservation" in capfd.readouterr().err
