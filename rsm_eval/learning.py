"""The learning curve of a training run, read from its metrics.jsonl."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import CheckpointError

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.json"
"""The settings of a run, beside its metrics."""


@dataclass(frozen=True)
class LearningCurve:
    """Returns over environment steps: K evaluations and M log lines of training episodes."""

    eval_steps: NDArray[np.int64]
    """[K]"""
    eval_mean: NDArray[np.float64]
    """[K]"""
    eval_std: NDArray[np.float64]
    """[K]"""
    eval_min: NDArray[np.float64]
    """[K]"""
    eval_max: NDArray[np.float64]
    """[K]"""
    eval1_steps: NDArray[np.int64]
    """[J], the evaluations that have N = 1, one particle, beside the best of N; J <= K."""
    eval1_mean: NDArray[np.float64]
    """[J]"""
    train_steps: NDArray[np.int64]
    """[M]"""
    train_return: NDArray[np.float64]
    """[M], mean of the recent training episodes."""
    wall_s: float
    """Duration of the run so far."""

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return int(max(self.eval_steps[-1:].max(initial=0), self.train_steps[-1:].max(initial=0)))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run directory's metrics.jsonl.

    Raises:
        CheckpointError: there is no metrics.jsonl, or a line before the last is not a metrics record. The
            last line may be half-written: the run may still be going.
    """
    path = run / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"wanted a training run with {METRICS_FILE} at {str(run)!r}, got {_reason(error)}; {_remedy(error)}"
        ) from None
    return [record for number, line in enumerate(lines) if (record := _parse(line, number, lines, path))]


def load_learning_curve(run: Path) -> LearningCurve:
    """Read the metrics of a run directory.

    Raises:
        CheckpointError: see `read_metrics`.
    """
    records = read_metrics(run)
    evals = [record for record in records if "eval_returns" in record]
    ones = [record for record in evals if record.get("eval1_returns")]
    # No training episode may have ended within a log interval.
    trains = [record for record in records if np.isfinite(record.get("episode_return", np.nan))]
    returns = [np.asarray(record["eval_returns"], dtype=np.float64) for record in evals]
    return LearningCurve(
        eval_steps=np.array([record["step"] for record in evals], dtype=np.int64),
        eval_mean=np.array([values.mean() for values in returns]),
        eval_std=np.array([values.std(ddof=1) if values.size > 1 else 0.0 for values in returns]),
        eval_min=np.array([values.min() for values in returns]),
        eval_max=np.array([values.max() for values in returns]),
        eval1_steps=np.array([record["step"] for record in ones], dtype=np.int64),
        eval1_mean=np.array([np.mean(record["eval1_returns"]) for record in ones], dtype=np.float64),
        train_steps=np.array([record["step"] for record in trains], dtype=np.int64),
        train_return=np.array([record["episode_return"] for record in trains], dtype=np.float64),
        wall_s=float(records[-1].get("wall_s", 0.0)) if records else 0.0,
    )


def _parse(line: str, number: int, lines: list[str], path: Path) -> dict[str, Any] | None:
    """One record; None for a blank line or a last line that is not complete yet."""
    if not line.strip():
        return None
    try:
        record = json.loads(line)
        int(record["step"])
        if "eval_returns" in record and not record["eval_returns"]:
            raise ValueError("eval_returns is empty")
    except (ValueError, KeyError, TypeError) as error:
        if number == len(lines) - 1:
            return None
        raise CheckpointError(
            f"wanted one JSON object with a step per line in {path}, got line {number + 1}: {error}; "
            "the file is damaged, remove the line"
        ) from None
    assert isinstance(record, dict), "indexing with a string succeeds on nothing else that JSON holds"
    return record


def _remedy(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "restore the file from a copy, or delete it"
    if isinstance(error, PermissionError):
        return "make it readable for this user"
    return "give a directory that rsm-train wrote"


def _reason(error: Exception) -> str:
    return error.strerror or "an error" if isinstance(error, OSError) else "a file that is not text"
