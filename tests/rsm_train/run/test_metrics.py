"""Where the numbers of a run go, and that docs/reference/training-metrics.md names each of them."""

from __future__ import annotations

import importlib.machinery
import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rsm_common.errors import MissingExtraError, UsageError
from rsm_train.environments.evaluation import Evaluation
from rsm_train.run.metrics import RunLog, duration
from tests.rsm_train.runs import tiny_run

DOCS = Path(__file__).parents[3] / "docs" / "reference" / "training-metrics.md"
VALUES = {"episode_return": -1234.56, "steps_per_s": 1234.4, "updates_per_s": 246.8, "updates": 7}


class WandbError(Exception):
    pass


class StrictRun:
    """A wandb run that takes the calls we make and refuses others, as wandb does in strict mode."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.metrics: dict[str, str | None] = {}
        self.finished = False

    def define_metric(self, name: str, *, step_metric: str | None = None) -> None:
        assert step_metric is None or step_metric in self.metrics
        self.metrics[name] = step_metric

    def log(self, data: dict[str, Any]) -> None:
        assert not self.finished
        assert "step" in data
        assert all(type(value) in (int, float) for value in data.values())
        self.logged.append(data)

    def finish(self) -> None:
        assert not self.finished
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    module: Any = ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.Error = WandbError
    module.runs = []

    def init(*, project: str, name: str, dir: str, config: dict[str, Any]) -> StrictRun:
        assert Path(dir).is_dir()
        json.dumps(config)
        if project == "forbidden":
            raise WandbError("No API key\nconfigured.")
        module.runs.append((project, name, config, run := StrictRun()))
        return run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_key_is_documented_and_every_documented_key_is_written(tmp_path):
    small = {"compile": "off", "width": 8, "particles": 2, "target_particles": 1, "diffusion_steps": 2}
    changes: list[dict[str, Any]] = [
        {},
        {"preset": "reference", **small},
        {"preset": "reference", "algo": "sdac", **small},
        {"algo": "sac", "particles": None},
    ]
    lines = []
    for number, change in enumerate(changes):
        lines += records(tiny_run(tmp_path / str(number), **change))
    sections = re.split(r"^## ", DOCS.read_text(), flags=re.MULTILINE)[1:]
    documented = {
        section.splitlines()[0]: {
            name
            for row in re.findall(r"^\| (`.+?) \|", section, flags=re.MULTILINE)
            for name in re.findall(r"`(\w+)`", row)
        }
        for section in sections
    }
    common = documented["Find the keys of every line"]
    for kind in ("train", "eval"):
        written = set().union(*(line for line in lines if line["kind"] == kind))
        assert written == common | documented[f"Read the lines of kind `{kind}`"], kind


def test_tensorboard_and_wandb_get_every_number_of_the_file(tmp_path, wandb):
    run_dir = tiny_run(tmp_path / "run", wandb="project")
    expected = {
        (line["step"], f"{line['kind']}/{key}"): value
        for line in records(run_dir)
        for key, value in line.items()
        if key not in ("step", "wall_s", "cpu_s", "kind") and not isinstance(value, list)
    }
    assert len(expected) > 30
    ((project, name, config, run),) = wandb.runs
    assert (project, name, config["run"]["wandb"]) == ("project", "run", "project")
    assert run.metrics == {"step": None, "*": "step"}
    assert run.finished
    got = {(data["step"], key): v for data in run.logged for key, v in data.items() if key != "step"}
    assert got == expected
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    on_board = {(e.step, tag): e.value for tag in board.Tags()["scalars"] for e in board.Scalars(tag)}
    assert on_board == pytest.approx(expected, rel=1e-6)


def test_without_wandb_one_sentence_and_no_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'--wandb needs: pip install "rsm-toolkit\[wandb\]"'):
        tiny_run(tmp_path / "run", wandb="project")
    assert not (tmp_path / "run").exists()


def test_a_wandb_that_refuses_leaves_a_directory_that_can_be_used(tmp_path, wandb):
    with pytest.raises(UsageError, match="'forbidden', got: No API key configured; log in with") as caught:
        tiny_run(tmp_path / "run", wandb="forbidden")
    assert "\n" not in str(caught.value)
    tiny_run(tmp_path / "run", total_steps=104, eval_episodes=1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.26, "0.3 s"),
        (9.97, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (273_600, "3 d 4 h"),
    ],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_the_time_left_is_that_of_learning(tmp_path):
    now = 0.0
    with RunLog(tmp_path, 1_000, clock=lambda: now) as log:
        now = 1.0
        log.train(300, VALUES | {"updates": 0})
        assert log.left(300) == "-", "the warm-up tells nothing"
        log.train(310, VALUES)
        now = 11.0  # an evaluation of 8 s among them
        assert log.left(410) == "59 s"


@pytest.mark.parametrize("columns", [80, 120])
def test_the_progress_line_fits_the_terminal(tmp_path, columns, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=columns, color_system=None)
    with RunLog(tmp_path, 1_000_000, console=console) as log:
        log.train(123_456, VALUES)
        monkeypatch.setattr(log, "left", lambda step: "1 h 2 min")
        log.show(123_456, Evaluation([-12345.6] * 20, [1.0]))
        log.advance(124_000)
    # What is on the screen at last, cursor movements left out.
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").splitlines()
    last = [line for line in lines if "/1,000,000" in line][-1]
    assert "evaluation  -12345.6 ± 0.0 over 20 episodes" in screen.getvalue()
    assert re.fullmatch(
        r"12\d,\d{3}/1,000,000 [━╸╺ ]+ return -1234.6 1234 steps/s  247 updates/s 1 h 2 min left", last.strip()
    )
    assert columns - 8 <= len(last.rstrip()) <= columns


def test_without_a_terminal_a_line_comes_at_the_first_step_and_every_half_minute(tmp_path, capsys):
    now = [0.0]
    with RunLog(tmp_path, 1_000, warmup_steps=300, clock=lambda: now[0]) as log:
        for second in range(100):
            now[0] = float(second)
            log.advance(10 * second + 10)
    assert capsys.readouterr().err.splitlines() == [
        "step        10  warm-up: random actions until step 300",
        "step       310  of 1,000",
        "step       610  of 1,000",
        "step       910  of 1,000",
    ]


def test_without_a_terminal_evaluations_are_printed_too(tmp_path, capsys):
    with RunLog(tmp_path, 1_000, clock=lambda: 5.0) as log:
        log.advance(10)
        log.train(500, VALUES)
        log.evaluation(500, Evaluation([1.0, 2.0]))
        log.show(500, Evaluation([1.0, 2.0]))
        log.advance(600)
    output = capsys.readouterr()
    assert output.out == ""
    first, second = output.err.splitlines()
    assert first == "step        10  of 1,000"
    assert second == "step       500  evaluation       1.5 ± 0.5 over 2 episodes       0 s"
    assert "eval1_mean" not in records(tmp_path)[-1]
