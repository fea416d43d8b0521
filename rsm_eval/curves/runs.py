"""Run directories of rsm-train as learning curves: what each one learnt, and under which name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rsm_common.commandline import format_assignments
from rsm_common.errors import CheckpointError
from rsm_eval.curves.seed_curve import SeedCurve, require_sound
from rsm_eval.learning import CONFIG_FILE, METRICS_FILE, read_metrics

MetricName = Literal["evaluation", "one-particle", "training"]
_NOT_DECISIVE = frozenset(
    {
        "seed",
        "out",
        "total_steps",
        "log_every",
        "eval_every",
        "eval_episodes",
        "eval_one_particle",
        "keep_checkpoints",
        "checkpoint_every",
        "device",
        "threads",
        "vector",
        "compile",
        "wandb",
    }
)
"""Settings that do not change what is learnt from a step, but for the seed and rounding."""
_TASK = frozenset({"env", "env_arg"})


@dataclass(frozen=True)
class Metric:
    """A number of a run that a curve can show."""

    title: str
    """Of the axis; the unit is the environment's reward."""
    point: str
    """The episodes whose mean return is a point."""
    of: Callable[[Mapping[str, Any]], float | None]
    """Of a line of metrics.jsonl; None for a line without it."""


METRICS: Mapping[MetricName, Metric] = {
    "evaluation": Metric(
        "evaluation return", "the episodes of one evaluation", lambda record: _mean(record.get("eval_returns"))
    ),
    "one-particle": Metric(
        "evaluation return, one particle",
        "the episodes of one evaluation with one particle (N = 1)",
        lambda record: _mean(record.get("eval1_returns")),
    ),
    "training": Metric(
        "training return",
        "the last training episodes, with exploration noise",
        lambda record: record.get("episode_return"),
    ),
}


@dataclass(frozen=True)
class TrainingRun:
    """What a run directory says about itself."""

    directory: Path
    config: Mapping[str, Any]
    """The content of config.json: "run", "algorithm", and what the machine was."""
    records: Sequence[Mapping[str, Any]]
    """The lines of metrics.jsonl."""

    @property
    def task(self) -> str:
        """The environment's id, and its arguments if it has any."""
        run = self.config["run"]
        arguments = ", ".join(format_assignments(run.get("env_arg") or {}))
        return f"{run['env']} ({arguments})" if arguments else str(run["env"])

    @property
    def algorithm(self) -> str:
        """The algorithm as it is called in text, and the preset: "DPMD paper"."""
        run = self.config["run"]
        module, colon, name = str(run["algo"]).partition(":")
        return f"{name if colon else module.upper()} {run['preset']}"

    @property
    def seed(self) -> int:
        """Of everything random in the run."""
        return int(self.config["run"]["seed"])

    @property
    def decisive_settings(self) -> dict[str, Any]:
        """The settings that decide what is learnt, but for the task and the seed."""
        return {
            name: value
            for part in ("run", "algorithm")
            for name, value in self.config[part].items()
            if name not in _NOT_DECISIVE | _TASK
        }


def read_training_run(directory: Path) -> TrainingRun:
    """Read config.json and metrics.jsonl of a run directory.

    Raises:
        CheckpointError: it is no run directory, or a file of it is damaged.
    """
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        run = {name: config["run"][name] for name in ("env", "algo", "preset", "seed", "total_steps")}
        _ = int(run["seed"]), int(run["total_steps"]), dict(config["algorithm"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(_no_run(directory, error)) from None
    return TrainingRun(directory, config, read_metrics(directory))


def seed_curves(runs: Sequence[TrainingRun], metric: MetricName) -> list[SeedCurve]:
    """The curve of each run.

    Raises:
        CheckpointError: a run has no line with the metric, or lines that cannot be right.
    """
    return [seed_curve(run, label, metric) for run, label in zip(runs, curve_labels(runs), strict=True)]


def curve_labels(runs: Sequence[TrainingRun]) -> list[str]:
    """The label of each run: algorithm and preset, and the settings in which otherwise equal runs differ.

    A setting that differs between runs of one task is named on all tasks, so that a label means the same
    everywhere.
    """
    alike: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        alike.setdefault((run.algorithm, run.task), []).append(run.decisive_settings)
    varied: dict[str, set[str]] = {}
    for (algorithm, _), settings in alike.items():
        varied.setdefault(algorithm, set()).update(_varied(settings))
    return [
        ", ".join(
            [
                run.algorithm,
                *(f"{name} {_shown(run.decisive_settings, name)}" for name in sorted(varied[run.algorithm])),
            ]
        )
        for run in runs
    ]


def _varied(settings: Sequence[Mapping[str, Any]]) -> set[str]:
    """The names that do not have the same value in all of them."""
    names = {name for one in settings for name in one}
    return {name for name in names if len({_shown(one, name) for one in settings}) > 1}


def _shown(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return "unknown"  # written by a version that did not have the setting
    value = settings[name]
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def seed_curve(run: TrainingRun, label: str, metric: MetricName) -> SeedCurve:
    """The curve of a run under a given label.

    Raises:
        CheckpointError: the run has no line with the metric, or lines that cannot be right.
    """
    points = []
    for record in run.records:
        try:
            value = METRICS[metric].of(record)
            if value is not None:  # no training episode may have ended within a log interval
                points.append((int(record["step"]), float(value), float(record.get("wall_s", np.nan)) / 60))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"wanted numbers in {METRICS_FILE} of {str(run.directory)!r}, got step {record['step']}: "
                f"{error}; the file is damaged, remove the line"
            ) from None
    if not points:
        raise CheckpointError(
            f"wanted runs with at least one point of --metric {metric}, got none in {str(run.directory)!r}; "
            "leave the run out, or wait for it"
        )
    steps, returns, minutes = zip(*points, strict=True)
    curve = SeedCurve(
        run.task,
        label,
        run.seed,
        str(run.directory),
        np.array(steps, dtype=np.int64),
        np.array(returns, dtype=np.float64),
        None if np.isnan(minutes).any() else np.array(minutes, dtype=np.float64),
        int(run.config["run"]["total_steps"]),
    )
    return require_sound(curve, CheckpointError)


def _mean(values: Any) -> float | None:
    return float(np.mean(np.asarray(values, dtype=np.float64))) if values else None


def _no_run(directory: Path, error: Exception) -> str:
    wanted = f"wanted a run directory of rsm-train with {CONFIG_FILE}, or a table that ends in .csv"
    if isinstance(error, OSError) and not directory.is_dir():
        found = "a file of another kind" if directory.exists() else "not there"
        return f"{wanted}, got {str(directory)!r}, which is {found}; check the spelling"
    if isinstance(error, FileNotFoundError):
        inside = sorted(file.parent for file in directory.glob(f"*/{CONFIG_FILE}"))
        remedy = f"name the runs in it, such as {inside[0]}" if inside else "leave it out"
        return f"{wanted}, got the directory {str(directory)!r} without one; {remedy}"
    reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return (
        f"cannot read {CONFIG_FILE} of {str(directory)!r} ({reason}); copy it from a checkpoint of the run, or "
        "leave the run out"
    )
