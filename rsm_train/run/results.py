"""What a run has come to: its final and its best evaluation, read from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsm_eval.learning import METRICS_FILE, read_metrics


@dataclass(frozen=True)
class EvalPoint:
    """One evaluation."""

    step: int
    mean: float
    std: float
    one_particle_mean: float | None
    """With N = 1; None if that was not evaluated."""
    one_particle_std: float | None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> EvalPoint:
        """From a record of kind "eval"."""
        values = (record.get(name) for name in ("eval1_mean", "eval1_std"))
        return cls(record["step"], record["eval_mean"], record["eval_std"], *values)

    def __str__(self) -> str:
        text = f"step {self.step:>9,}  {self.mean:9.1f} ± {self.std:.1f}"
        if self.one_particle_mean is None:
            return text
        return f"{text}  with one particle {self.one_particle_mean:9.1f} ± {self.one_particle_std:.1f}"


@dataclass(frozen=True)
class RunResult:
    """The evaluations of a run that count."""

    final: EvalPoint
    best: EvalPoint
    """Of the highest mean, the newest of equals: the checkpoint that is exported."""


def read_result(run_dir: Path) -> RunResult | None:
    """The final and the best evaluation of a run; None if it has none, or no metrics.jsonl any more.

    Raises:
        CheckpointError: there is no such directory, or metrics.jsonl is damaged.
    """
    points = read_evaluations(run_dir)
    if not points:
        return None
    return RunResult(points[-1], max(points, key=lambda point: (point.mean, point.step)))


def read_evaluations(run_dir: Path) -> list[EvalPoint]:
    """Every evaluation of a run, in order; none without a metrics.jsonl.

    Raises:
        CheckpointError: see `read_result`.
    """
    if run_dir.is_dir() and not (run_dir / METRICS_FILE).exists():
        return []
    return [EvalPoint.of(record) for record in read_metrics(run_dir) if record.get("kind") == "eval"]
