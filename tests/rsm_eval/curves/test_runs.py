"""Run directories as curves: names, metrics and damaged files."""

from __future__ import annotations

import json

import pytest

from rsm_common.errors import CheckpointError
from rsm_eval.curves.runs import curve_labels, read_training_run, seed_curves
from tests.rsm_eval.curves.records import STEP, write_run


def labels(*directories):
    return curve_labels([read_training_run(directory) for directory in directories])


def only_curve(directory, metric="evaluation"):
    (curve,) = seed_curves([read_training_run(directory)], metric)
    return curve


def test_a_run_becomes_one_record(tmp_path):
    curve = only_curve(write_run(tmp_path, "a", [10, 30], seed=3, total_steps=9 * STEP))
    assert (curve.task, curve.label, curve.seed) == ("Ant-v5", "DPMD paper", 3)
    assert curve.steps.tolist() == [STEP, 2 * STEP]
    assert curve.returns.tolist() == [10, 30]
    assert curve.minutes.tolist() == [1, 2]
    assert curve.unfinished
    assert not only_curve(write_run(tmp_path, "b", [10, 30])).unfinished


@pytest.mark.parametrize(
    ("metric", "returns"), [("evaluation", [10, 30]), ("one-particle", [5, 25]), ("training", [5, 15])]
)
def test_every_metric(tmp_path, metric, returns):
    assert only_curve(write_run(tmp_path, "a", [10, 30]), metric).returns.tolist() == returns


def test_a_half_line_of_a_killed_run_is_skipped(tmp_path):
    directory = write_run(tmp_path, "a", [10, 30])
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3000, "eval_ret')
    assert only_curve(directory).steps.tolist() == [STEP, 2 * STEP]


def test_settings_that_decide_nothing_are_not_in_the_label(tmp_path):
    runs = [
        write_run(tmp_path, "a", [1], seed=0),
        write_run(tmp_path, "b", [1, 2], seed=1, every=500, total_steps=77),
    ]
    assert labels(*runs) == ["DPMD paper"] * 2


def test_settings_that_differ_are_in_the_label(tmp_path):
    runs = [
        write_run(tmp_path, "a", [1]),
        write_run(tmp_path, "b", [1], width=16, updates_per_step=1.0, layer_norm=True),
        write_run(tmp_path, "c", [1], algo="sac", width=64),
    ]
    assert labels(*runs) == [
        "DPMD paper, layer_norm unknown, updates_per_step 0.2, width 256",
        "DPMD paper, layer_norm on, updates_per_step 1.0, width 16",
        "SAC paper",
    ]


def test_a_label_means_the_same_on_every_task(tmp_path):
    runs = [
        write_run(tmp_path, "a", [1], env="Ant-v5"),
        write_run(tmp_path, "b", [1], env="Ant-v5", width=16),
        write_run(tmp_path, "c", [1], env="Hopper-v5", width=16),
    ]
    assert labels(*runs) == ["DPMD paper, width 256", "DPMD paper, width 16", "DPMD paper, width 16"]
    # A setting that differs between tasks alone is none that lines of a panel differ in.
    assert labels(runs[0], runs[2]) == ["DPMD paper"] * 2


def test_the_name_of_an_own_algorithm_and_the_arguments_of_an_environment(tmp_path):
    run = read_training_run(
        write_run(tmp_path, "a", [1], algo="average_reward:AverageReward", env_arg={"size": 3})
    )
    assert run.algorithm == "AverageReward paper"
    assert run.task == "Ant-v5 (size=3)"


def test_a_run_without_an_evaluation_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"got none in '.*/a'; leave the run out, or wait for it"):
        only_curve(write_run(tmp_path, "a", []))


@pytest.mark.parametrize("content", ["", "[]", '{"run": {"env": "Ant-v5"}}', '{"run": 3, "algorithm": {}}'])
def test_a_damaged_config_is_one_sentence(tmp_path, content):
    directory = write_run(tmp_path, "a", [1])
    (directory / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"cannot read config.json of '.*/a' \(.+\); copy it"):
        read_training_run(directory)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"step": 2 * STEP, "eval_returns": ["x"]}, "wanted numbers in metrics.jsonl of "),
        ({"step": 2 * STEP, "eval_returns": [float("nan")]}, "wanted finite returns, got nan at step 2,000 of"),
        (
            {"step": STEP, "eval_returns": [1.0]},
            "wanted steps that rise from point to point, got 1,000 after",
        ),
        (
            {"step": 2 * STEP, "wall_s": 30, "eval_returns": [1.0]},
            "wanted minutes that rise from point to point, got 0.5 after 1.0",
        ),
    ],
)
def test_a_line_that_cannot_be_right_is_refused(tmp_path, line, words):
    directory = write_run(tmp_path, "a", [1])
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(CheckpointError) as raised:
        only_curve(directory)
    assert words in str(raised.value)
    assert str(directory) in str(raised.value)


def test_without_times_there_are_no_minutes(tmp_path):
    directory = write_run(tmp_path, "a", [])
    (directory / "metrics.jsonl").write_text('{"step": 5, "eval_returns": [1.0]}\n')
    assert only_curve(directory).minutes is None
