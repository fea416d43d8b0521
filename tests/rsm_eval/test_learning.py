"""Learning curves read from metrics.jsonl."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rsm_common.errors import CheckpointError
from rsm_eval.learning import load_learning_curve

LINES = [
    {"step": 100, "wall_s": 1.0, "kind": "train", "episode_return": 5.0},
    {"step": 150, "wall_s": 1.2, "kind": "train"},
    {"step": 200, "wall_s": 1.5, "kind": "train", "episode_return": 0.0},
    {
        "step": 200,
        "wall_s": 2.0,
        "kind": "eval",
        "eval_returns": [1.0, 2.0, 6.0],
        "eval_mean": 3.0,
        "eval_std": 2.2,
    },
    {"step": 400, "wall_s": 4.5, "kind": "eval", "eval_returns": [9.0], "eval_mean": 9.0, "eval_std": 0.0},
]


def write(run, *extra):
    text = "\n".join([*(json.dumps(line) for line in LINES), *extra])
    (run / "metrics.jsonl").write_text(text)
    return run


def test_points_of_both_kinds(tmp_path):
    curve = load_learning_curve(write(tmp_path))
    assert curve.train_steps.tolist() == [100, 200]
    assert curve.train_return.tolist() == [5.0, 0.0]
    assert curve.eval_steps.tolist() == [200, 400]
    assert curve.eval_mean.tolist() == [3.0, 9.0]
    assert curve.eval_std.tolist() == [pytest.approx(np.sqrt(7)), 0.0]
    assert (curve.eval_min.tolist(), curve.eval_max.tolist()) == ([1.0, 9.0], [6.0, 9.0])
    assert (curve.last_step, curve.wall_s) == (400, 4.5)


def test_one_particle_where_it_was_evaluated(tmp_path):
    assert load_learning_curve(write(tmp_path)).eval1_steps.size == 0
    line = {"step": 600, "kind": "eval", "eval_returns": [9.0, 9.0], "eval1_returns": [5.0, 8.0]}
    curve = load_learning_curve(write(tmp_path, json.dumps(line)))
    assert curve.eval_steps.tolist() == [200, 400, 600]
    assert (curve.eval1_steps.tolist(), curve.eval1_mean.tolist()) == ([600], [6.5])


def test_a_half_written_last_line_is_left_out(tmp_path):
    assert load_learning_curve(write(tmp_path, '{"step": 500, "eval_ret')).last_step == 400


@pytest.mark.parametrize("line", ["not json", '{"wall_s": 3}', "[1]", '{"step": 1, "eval_returns": []}'])
def test_a_damaged_line_is_named(tmp_path, line):
    with pytest.raises(CheckpointError, match="line 6"):
        load_learning_curve(write(tmp_path, line, json.dumps(LINES[0])))


def test_a_directory_that_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="rsm-train"):
        load_learning_curve(tmp_path / "nothing")


def test_an_empty_file_is_an_empty_curve(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    curve = load_learning_curve(tmp_path)
    assert (curve.last_step, curve.eval_steps.size, curve.train_steps.size) == (0, 0, 0)
