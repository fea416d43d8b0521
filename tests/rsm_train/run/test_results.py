"""The final and the best evaluation of a run."""

from __future__ import annotations

import json

import pytest

from rsm_common.errors import CheckpointError
from rsm_train.run.results import read_result


def write(run, means, **more):
    lines = [{"step": 5, "kind": "train", "episode_return": 99.0}]
    lines += [
        {"step": 10 * i, "kind": "eval", "eval_returns": [m], "eval_mean": m, "eval_std": 0.5, **more}
        for i, m in enumerate(means, 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_final_and_best_and_the_newest_of_equals(tmp_path):
    result = read_result(write(tmp_path, [1.0, 7.0, 7.0, 3.0]))
    assert result is not None
    assert (result.final.step, result.final.mean) == (40, 3.0)
    assert (result.best.step, result.best.mean) == (30, 7.0)
    assert str(result.final) == "step        40        3.0 ± 0.5"


def test_one_particle_stands_beside_it(tmp_path):
    result = read_result(write(tmp_path, [1.0], eval1_mean=0.25, eval1_std=2.0))
    assert str(result.final if result else "") == (
        "step        10        1.0 ± 0.5  with one particle       0.2 ± 2.0"
    )


def test_a_run_without_evaluations_and_no_run(tmp_path):
    assert read_result(write(tmp_path, [])) is None
    with pytest.raises(CheckpointError):
        read_result(tmp_path / "none")
