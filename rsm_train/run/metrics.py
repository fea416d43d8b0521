"""Where the numbers of a run go: metrics.jsonl, TensorBoard, Weights & Biases and the terminal.

docs/reference/training-metrics.md says what each of them means.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, cast

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from torch.utils.tensorboard import SummaryWriter

from rsm_common.errors import UsageError
from rsm_eval.learning import METRICS_FILE
from rsm_train.environments.evaluation import Evaluation

Record = Mapping[str, Any]
"""A line of metrics.jsonl: "step", "wall_s", "cpu_s", "kind" ("train" or "eval"), and that kind's values."""

_REDRAW_S = 0.1
PROGRESS_LINE_S = 30.0
"""Seconds between two lines of progress in a pipe or a file."""


class Sink(Protocol):
    """A place where records go."""

    def write(self, record: Record) -> None:
        """Take one record."""
        ...

    def close(self) -> None:
        """Keep what was written and release what is held."""
        ...


class JsonLines:
    """metrics.jsonl: one JSON object per line, on the disk as soon as it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """See `Sink`."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """See `Sink`."""
        self._file.close()


class TensorBoard:
    """Event files with one scalar per number of a record."""

    def __init__(self, directory: Path, purge_step: int) -> None:
        self._board = SummaryWriter(str(directory), purge_step=purge_step)

    def write(self, record: Record) -> None:
        """See `Sink`."""
        for name, value in scalars(record).items():
            self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """See `Sink`."""
        self._board.close()


class WeightsAndBiases:
    """A run of a wandb project, with the scalars that TensorBoard gets."""

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Begin the run.

        Raises:
            UsageError: wandb refuses, for example because nobody is logged in.
        """
        import wandb

        try:
            self._run = wandb.init(project=project, name=run_dir.name, dir=str(run_dir), config=dict(config))
        except wandb.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UsageError(
                f"wanted to begin a run of the wandb project {project!r}, got: {reason}; "
                "log in with `wandb login`, set WANDB_MODE=offline, or leave --wandb out"
            ) from None
        # wandb's own step counts calls and may not go back; ours is the environment step.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """See `Sink`."""
        self._run.log({"step": record["step"], **scalars(record)})

    def close(self) -> None:
        """See `Sink`."""
        self._run.finish()


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record under the names that TensorBoard and wandb show: "<kind>/<name>"."""
    return {
        f"{record['kind']}/{name}": value
        for name, value in record.items()
        if name not in ("step", "wall_s", "cpu_s") and isinstance(value, (int, float))
    }


class Tolerant:
    """A stream for the terminal whose reader may go, as that of `rsm-train | head` does: the run goes on."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or lose, the text."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Pass on what is held, or keep it."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def mute_closed_streams() -> None:
    """Lead stdout and stderr to nowhere where their reader or their terminal is gone.

    Whoever writes there afterwards would fail, the interpreter at its end included.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            descriptor = stream.fileno()
        except (AttributeError, OSError, ValueError):
            continue  # not one of the system's
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def extra_sinks(wandb_project: str | None, run_dir: Path, config: Mapping[str, Any]) -> list[Sink]:
    """The sinks beside metrics.jsonl and TensorBoard, which every run has."""
    return [] if wandb_project is None else [WeightsAndBiases(wandb_project, run_dir, config)]


class RunLog:
    """Writes each record to every sink, and shows how far the run is; a context manager."""

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        extra_sinks: Sequence[Sink] = (),
        *,
        console: Console | None = None,
        first_step: int = 0,
        wall_s: float = 0.0,
        cpu_s: float | None = 0.0,
        warmup_steps: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Append to the run's files.

        Args:
            run_dir: where they are.
            total_steps: of the run.
            extra_sinks: beside metrics.jsonl and TensorBoard.
            console: where progress is shown; None: stderr.
            first_step: at which a resumed run continues.
            wall_s: seconds that it has run before.
            cpu_s: seconds of CPU that it has used before; None where that is not known.
            warmup_steps: steps with random actions at the start.
            clock: seconds, monotonic.
        """
        self._sinks: list[Sink] = [
            JsonLines(run_dir / METRICS_FILE),
            TensorBoard(run_dir / "tensorboard", purge_step=first_step + 1),
            *extra_sinks,
        ]
        self._console = console or Console(file=cast("IO[str]", Tolerant(sys.stderr)))
        self._clock = clock
        self._started = clock() - wall_s
        self._cpu_started = None if cpu_s is None else time.process_time() - cpu_s
        self._warmup_steps = warmup_steps
        self._line_due_s = self.wall_s
        self._drawn = -_REDRAW_S
        self._progress = _progress(self._console)
        self._total_steps = total_steps
        self._learning_since: tuple[int, float] | None = None
        self._task = self._progress.add_task(
            "", total=total_steps, completed=first_step, episode_return="-", rate="", left="-"
        )

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)
            self._progress.stop()

    @property
    def wall_s(self) -> float:
        """Seconds since the run began, without those between an end and a resume."""
        return self._clock() - self._started

    @property
    def times(self) -> dict[str, float]:
        """`wall_s`, and `cpu_s`: seconds of this process on all cores, without the processes it has started."""
        cpu = {} if self._cpu_started is None else {"cpu_s": time.process_time() - self._cpu_started}
        return {"wall_s": self.wall_s, **cpu}

    def advance(self, step: int) -> None:
        """Move the progress bar; without a terminal, print a line at the first step and every half minute."""
        if self._progress.disable:
            if self.wall_s >= self._line_due_s:
                self._line_due_s = self.wall_s + PROGRESS_LINE_S
                self._print(self._progress_line(step))
        elif self.wall_s - self._drawn >= _REDRAW_S:
            self._drawn = self.wall_s
            self._progress.update(self._task, completed=step, left=self.left(step))

    def _progress_line(self, step: int) -> str:
        if step <= self._warmup_steps:
            return f"step {step:>9,}  warm-up: random actions until step {self._warmup_steps:,}"
        left = self.left(step)
        return f"step {step:>9,}  of {self._total_steps:,}" + ("" if left == "-" else f", {left} left")

    def left(self, step: int) -> str:
        """How long the run still takes at the pace of learning so far, with the evaluations in it.

        The steps of the warm-up, which are many times as fast, tell nothing about it.
        """
        if self._learning_since is None or step <= self._learning_since[0]:
            return "-"
        first_step, first_s = self._learning_since
        return duration((self._total_steps - step) * (self.wall_s - first_s) / (step - first_step))

    def train(self, step: int, values: Mapping[str, float]) -> Record:
        """Record the means of a log interval."""
        record = self._write(step, "train", values)
        if self._learning_since is None and values["updates"] > 0:
            self._learning_since = (step, self.wall_s)
        self._progress.update(
            self._task,
            completed=step,
            episode_return=f"{values['episode_return']:.1f}" if "episode_return" in values else "-",
            rate=f"{values['steps_per_s']:.0f} steps/s  {values['updates_per_s']:.0f} updates/s",
        )
        return record

    def evaluation(self, step: int, evaluation: Evaluation) -> Record:
        """Record an evaluation."""
        values = _statistics("eval", evaluation.returns)
        if evaluation.one_particle is not None:
            values |= _statistics("eval1", evaluation.one_particle)
        return self._write(step, "eval", values)

    def show(self, step: int, evaluation: Evaluation) -> None:
        """Print a line about an evaluation."""
        mean, std = np.mean(evaluation.returns), np.std(evaluation.returns)
        self._print(
            f"step {step:>9,}  evaluation {mean:9.1f} ± {std:.1f} "
            f"over {len(evaluation.returns)} episodes  {self.wall_s:6.0f} s"
        )

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)

    def _write(self, step: int, kind: str, values: Mapping[str, Any]) -> Record:
        times = {name: round(seconds, 3) for name, seconds in self.times.items()}
        record = {"step": step, **times, "kind": kind, **values}
        for sink in self._sinks:
            sink.write(record)
        return record


def duration(seconds: float) -> str:
    """0.3 s, 42 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit_s, unit, part_s, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit_s:
            return f"{whole // unit_s} {unit} {whole % unit_s // part_s} {part}"
    return f"{whole} s"


def _statistics(prefix: str, returns: list[float]) -> dict[str, Any]:
    return {
        f"{prefix}_returns": returns,
        f"{prefix}_mean": float(np.mean(returns)),
        f"{prefix}_std": float(np.std(returns)),
    }


def _progress(console: Console) -> Progress:
    """One line; the bar takes what the numbers leave of the terminal's width."""
    return Progress(
        TextColumn("{task.completed:,}/{task.total:,}"),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        TextColumn("return {task.fields[episode_return]}"),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[left]} left"),
        console=console,
        disable=not console.is_terminal,
        expand=True,
    )
