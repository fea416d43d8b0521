"""rsm-eval curves from the command line to the files."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from rsm_eval import cli
from rsm_eval.curves.command import CurvesConfig
from tests.rsm_eval.curves.records import write_run
from tests.rsm_eval.test_report import Page

SECTIONS = ("curves", "final", "seeds", "method")


@pytest.fixture
def runs(tmp_path):
    """Two algorithms on two tasks; one seed of DPMD on Ant-v5 is unfinished."""
    root = tmp_path / "runs"
    for seed in range(3):
        dpmd = [100, 200] if seed == 2 else [100, 200, 300 + seed]
        write_run(root, f"ant-dpmd-s{seed}", dpmd, seed=seed, total_steps=3000)
        write_run(root, f"ant-sac-s{seed}", [50, 90, 20 + 10 * seed], algo="sac", seed=seed)
        write_run(root, f"hopper-dpmd-s{seed}", [10, 20, 30], env="Hopper-v5", seed=seed)
    return root


def run(capsys, *arguments, status=0):
    assert cli.main(["curves", *map(str, arguments)]) == status
    return capsys.readouterr()


def cells(line):
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_figure_page_and_table(runs, tmp_path, capsys):
    paths = sorted(runs.iterdir())
    output = run(capsys, *paths, "--out", tmp_path / "out" / "ant").out
    lines = output.splitlines()
    assert cells(lines[3])[1:] == ["200.0", "[200.0, 200.0]", "3", "200.0", "2,000", "2.0", "1 of 3 unfinished"]
    # 20, 30, 40 at the end: t(0.975, 2) = 4.303, standard error 5.774. The best is 90.
    assert cells(lines[4]) == ["SAC paper", "30.0", "[5.2, 54.8]", "3", "90.0", "3,000", "3.0", "finished"]
    assert "1 of 3 seeds is unfinished (seed 2 at 2,000 of 3,000)" in output
    assert (tmp_path / "out" / "ant.png").read_bytes().startswith(b"\x89PNG")
    page = Page((tmp_path / "out" / "ant.html").read_text())
    assert [ident for ident in page.ids if ident in SECTIONS] == list(SECTIONS)
    assert len(page.ids) == len(set(page.ids))
    assert all(asset.startswith("#") for asset in page.assets), "the page is self-contained"
    assert [label.split(":")[0] for label in page.labels] == ["Ant-v5", "Hopper-v5"]
    text = " ".join(page.text.split())
    assert "DPMD paper200.0[200.0, 200.0]" in text
    assert "SAC paper30.0[5.2, 54.8]" in text
    assert "95 % interval of the mean (Student's t over seeds)" in text
    assert "DPMD paper (n = 3)" in text
    assert "1 of 3 seeds is unfinished" in text
    assert f"rsm-eval curves {paths[0]}" in text


def test_minutes_another_metric_and_another_band(runs, tmp_path, capsys):
    options = ["--against", "minutes", "--metric", "training", "--band", "range", "--out", tmp_path / "x.pdf"]
    output = run(capsys, *runs.glob("ant-sac-s*"), *options).out
    assert "Ant-v5, training return" in output
    assert cells(output.splitlines()[3])[:2] == ["SAC paper", "15.0"]
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")
    text = (tmp_path / "x.html").read_text()
    assert "Training return over wall clock (minutes)" in text
    assert "range of the seeds" in text


def test_curves_of_another_library(runs, tmp_path, capsys):
    table = tmp_path / "sb3.csv"
    table.write_text("task,algorithm,seed,step,return\nAnt-v5,SB3 <SAC>,0,1000,7\nAnt-v5,SB3 <SAC>,1,1000,9\n")
    output = run(capsys, *runs.glob("ant-sac-s*"), table, "--out", tmp_path / "x").out
    peer = cells(output.splitlines()[4])
    assert peer == ["SB3 <SAC>", "8.0", "[-4.7, 20.7]", "2", "8.0", "1,000", "-", "unknown"]
    assert "SB3 &lt;SAC&gt;" in (tmp_path / "x.html").read_text()
    error = run(capsys, table, "--against", "minutes", "--out", tmp_path / "y", status=2).err
    assert "wanted minutes of every point for --against minutes" in error


def test_runs_of_other_machines_and_versions_are_told(tmp_path, capsys):
    for seed, (threads, version) in enumerate([(1, "1.3"), (4, "1.4")]):
        config = write_run(tmp_path, f"s{seed}", [1, 2], seed=seed) / "config.json"
        more = f'"effective": {{"threads": {threads}}}, "provenance": {{"gymnasium": "{version}"}}, '
        config.write_text("{" + more + config.read_text()[1:])
    options = [tmp_path / "s0", tmp_path / "s1", "--out", tmp_path / "x"]
    run(capsys, *options)
    text = (tmp_path / "x.html").read_text()
    assert "different versions of gymnasium: 1.3, 1.4." in text
    assert "different threads" not in text
    run(capsys, *options, "--against", "minutes")
    assert "The minutes of Ant-v5 are of different threads: 1, 4." in (tmp_path / "x.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "rsm-eval: wanted a run directory of rsm-train"),
        (["runs/ant-sac-s0", "--out", "runs/ant-sac-s0/config.json/x"], "Not a directory; choose a place"),
        (["runs/ant-sac-s0", "--against", "hours"], "'hours' is not one of"),
        ([], "Missing argument 'RUN...'"),
    ],
)
def test_a_users_mistake_is_told_and_nothing_is_written(runs, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    output = run(capsys, *arguments, status=2)
    assert words in output.err
    assert "Traceback" not in output.err
    assert output.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_where_the_files_go(tmp_path):
    def names(out: Path) -> tuple[str, ...]:
        return tuple(str(path.relative_to(tmp_path)) for path in CurvesConfig(out=out).files)

    assert CurvesConfig().files == (Path("curves.png"), Path("curves.html"))
    assert names(tmp_path) == ("curves.png", "curves.html")
    assert names(tmp_path / "a.svg") == ("a.svg", "a.html")
    assert names(tmp_path / "a.html") == ("a.png", "a.html")
    assert names(tmp_path / "Ant-v5.lr0.1") == ("Ant-v5.lr0.1.png", "Ant-v5.lr0.1.html")


def test_policies_are_still_measured_without_a_command(bundle_repo, tmp_path, monkeypatch, capsys):
    # A source is an option's value, so even one that is called like the command is no command.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "curves").symlink_to(bundle_repo / "tiny")
    options = ["--env=tests.rsm_eval.tiny_env:RsmTiny-v0", "--episodes=2", "--latency-calls=0"]
    assert cli.main(["--policy", "curves", *options]) == 0
    assert "2 episodes per policy" in capsys.readouterr().out
    # A run of that name is a path like others.
    write_run(tmp_path / "runs", "curves", [1, 2])
    monkeypatch.chdir(tmp_path / "runs")
    assert "DPMD paper" in run(capsys, "curves", "--out", tmp_path / "x").out


def test_the_help_of_the_command_has_sections_and_examples():
    result = CliRunner().invoke(cli._command("rsm-eval"), ["curves", "--help"])
    sections = [line for line in result.output.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections == ["Curves:", "Output:", "Other:", "Examples:"]
    assert "task,algorithm,seed,step,return,minutes" in result.output
