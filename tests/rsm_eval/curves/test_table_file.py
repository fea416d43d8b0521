"""CSV files of other programs."""

from __future__ import annotations

import pytest

from rsm_common.errors import UsageError
from rsm_eval.curves.table_file import read_table

HEAD = "task,algorithm,seed,step,return,minutes\n"


def write(tmp_path, text):
    path = tmp_path / "sb3.csv"
    path.write_text(text)
    return path


def test_rows_become_a_curve_per_task_algorithm_and_seed(tmp_path):
    path = write(
        tmp_path,
        "\ufeffstep,seed,task,algorithm,return,minutes,note\n"
        "2000,0,Ant-v5,SB3 SAC,20.5,2,x\n1000,0,Ant-v5,SB3 SAC,10,1,\n"
        "\n"
        '1000.0,1,Ant-v5,"SB3, SAC",-3e2,1,\n',
    )
    first, second = read_table(path)
    assert (first.task, first.label, first.seed, first.source) == ("Ant-v5", "SB3 SAC", 0, str(path))
    assert first.steps.tolist() == [1000, 2000]
    assert first.returns.tolist() == [10, 20.5]
    assert first.minutes is not None
    assert first.minutes.tolist() == [1, 2]
    assert not first.unfinished
    assert (second.label, second.seed, second.steps.tolist(), second.returns.tolist()) == (
        "SB3, SAC",
        1,
        [1000],
        [-300],
    )


@pytest.mark.parametrize("rows", ["A-v1,x,0,1,2\n", "A-v1,x,0,1,2,1\nA-v1,x,0,2,2,\n"])
def test_minutes_may_be_missing(tmp_path, rows):
    (curve,) = read_table(write(tmp_path, HEAD + rows))
    assert curve.minutes is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "got none named task or algorithm or seed or step or return"),
        ("task,algo,seed,step,return\n", "got none named algorithm; see the example"),
        (HEAD, "wanted at least one row below the names of the columns"),
        (HEAD + "A-v1,x,0,1\n", "wanted a value for return in line 2 of "),
        (HEAD + "A-v1,x,0,1,2,1\n,x,0,1,2,1\n", "wanted a value for task in line 3 of "),
        (HEAD + "A-v1,x,0.5,1,2,1\n", "wanted a whole number of at least 0 for seed in line 2 of "),
        (HEAD + "A-v1,x,0,-1,2,1\n", "for step in line 2 of "),
        (HEAD + "A-v1,x,0,many,2,1\n", "wanted a finite number for step in line 2 of "),
        (HEAD + "A-v1,x,0,1,nan,1\n", "wanted a finite number for return in line 2 of "),
        (HEAD + "A-v1,x,0,1,2,soon\n", "wanted a finite number for minutes in line 2 of "),
        (HEAD + "A-v1,x,0,1,2,1\nA-v1,x,0,1,3,1\n", "several of seed 0 of x on A-v1 at step 1; write the mean"),
        (HEAD + "A-v1,x,0,1,2,5\nA-v1,x,0,2,2,4\n", "wanted minutes that rise from point to point, got 4.0"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as raised:
        read_table(path)
    assert words in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not text"):
        read_table(tmp_path / "binary.csv")
