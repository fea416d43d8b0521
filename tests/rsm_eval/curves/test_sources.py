"""What is accepted on the command line, together and alone."""

from __future__ import annotations

import pytest

from rsm_common.errors import CheckpointError, UsageError
from rsm_eval.curves.sources import read_sources, require_one_version
from tests.rsm_eval.curves.records import write_run


def write_table(tmp_path, label):
    path = tmp_path / "peer.csv"
    path.write_text(f"task,algorithm,seed,step,return\nAnt-v5,{label},0,1000,7\n")
    return path


def test_runs_and_files_are_one_list(tmp_path):
    run, table = write_run(tmp_path, "a", [1]), write_table(tmp_path, "SB3 SAC")
    curves, runs = read_sources([table, run], "evaluation")
    assert [curve.label for curve in curves] == ["DPMD paper", "SB3 SAC"]
    assert [found.directory for found in runs] == [run]


def test_what_a_glob_finds_beside_the_runs_does_not_count(tmp_path):
    run = write_run(tmp_path, "a-s0", [1])
    (tmp_path / "a-s0.log").write_text("step 1")
    (tmp_path / "a-s0.slices.jsonl").write_text("{}")
    curves, _ = read_sources([*sorted(tmp_path.glob("a-s*")), run, tmp_path / "." / "a-s0"], "evaluation")
    assert [curve.source for curve in curves] == [str(run)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "got '{root}/nothing', which is not there; check the spelling"),
        ("lone.log", "which is a file of another kind"),
        ("empty", "got the directory '{root}/empty' without one; leave it out"),
        ("parent", "name the runs in it, such as {root}/parent/a"),
    ],
)
def test_what_is_no_run_is_told(tmp_path, name, words):
    (tmp_path / "lone.log").write_text("")
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "parent", "a", [1])
    with pytest.raises(CheckpointError) as raised:
        read_sources([tmp_path / name], "evaluation")
    assert words.format(root=tmp_path) in str(raised.value)


def test_a_seed_that_is_there_twice_is_refused(tmp_path):
    runs = [write_run(tmp_path, "a", [1]), write_run(tmp_path, "b", [1])]
    with pytest.raises(UsageError, match=r"got seed 0 of DPMD paper on Ant-v5 in '.*/a' and in '.*/b'"):
        read_sources(runs, "evaluation")


def test_a_file_may_not_name_its_algorithm_like_that_of_a_run(tmp_path):
    paths = [write_run(tmp_path, "a", [1]), write_table(tmp_path, "DPMD paper")]
    with pytest.raises(UsageError, match="got 'DPMD paper' in both; give it another name in the file"):
        read_sources(paths, "evaluation")


def test_versions_of_an_environment_are_not_mixed(tmp_path):
    runs = [write_run(tmp_path, f"v{version}", [1], env=f"Ant-v{version}") for version in (4, 5)]
    with pytest.raises(UsageError, match="got Ant-v4 and Ant-v5, whose returns cannot be compared"):
        read_sources(runs, "evaluation")
    require_one_version(["Ant-v4", "Hopper-v5", "Ant-v4 (size=3)", "mine:Ant-v5", "without a version"])
    with pytest.raises(UsageError):
        require_one_version(["Ant-v4", "Ant-v5 (size=3)"])
