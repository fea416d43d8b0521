"""Where the numbers of a run go: metrics.jsonl, TensorBoard and the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from rsm_train.checkpoint import METRICS_FILE


class RunLog:
    """Writes each record to metrics.jsonl, TensorBoard and a progress bar; a context manager.

    A line of metrics.jsonl is an object with "step", "wall_s" and "kind". Kind "train" has the means since
    the last such line: "episode_return", "steps_per_s", and the algorithm's own. Kind "eval" has
    "eval_returns" (one per episode), "eval_mean" and "eval_std".
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        *,
        console: Console | None = None,
        first_step: int = 0,
        wall_s: float = 0.0,
    ) -> None:
        """Append to the run's files; a resumed run says at which step and after how many seconds it goes on."""
        self._file = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        self._console = console or Console(file=sys.stderr)
        self._started = time.monotonic() - wall_s
        self._progress = Progress(
            TextColumn("{task.completed:>9,}/{task.total:,}"),
            BarColumn(bar_width=24),
            TextColumn("return {task.fields[episode_return]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(
            "", total=total_steps, completed=first_step, episode_return="-", rate=""
        )

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._file.close()
        self._board.close()

    @property
    def wall_s(self) -> float:
        """Seconds since the run began, without those between an end and a resume."""
        return time.monotonic() - self._started

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._progress.update(self._task, completed=step)

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """Record the means of a log interval."""
        self._write(step, "train", values)
        self._progress.update(
            self._task,
            completed=step,
            episode_return=f"{values.get('episode_return', float('nan')):.1f}",
            rate=f"{values['steps_per_s']:.0f} steps/s {values.get('updates_per_s', 0):.0f} updates/s",
        )

    def evaluation(self, step: int, returns: list[float]) -> None:
        """Record an evaluation and print a line about it."""
        mean, std = float(np.mean(returns)), float(np.std(returns))
        self._write(step, "eval", {"eval_returns": returns, "eval_mean": mean, "eval_std": std})
        self._console.print(
            f"step {step:>9,}  evaluation {mean:9.1f} ± {std:.1f} over {len(returns)} episodes  "
            f"{self.wall_s:6.0f} s",
            highlight=False,
        )

    def _write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        record = {"step": step, "wall_s": round(self.wall_s, 3), "kind": kind, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{kind}/{name}", value, step)
