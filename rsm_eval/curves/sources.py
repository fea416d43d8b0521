"""What the user names, run directories and CSV files, as one list of curves that can be compared."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from rsm_common.errors import UsageError
from rsm_eval.curves.runs import MetricName, TrainingRun, read_training_run, seed_curves
from rsm_eval.curves.seed_curve import SeedCurve
from rsm_eval.curves.table_file import SUFFIX, read_table

_VERSION = re.compile(r"(?P<name>.+?)-v(?P<version>\d+)(?: \(.*\))?")
"""Of a task: an environment's id, and perhaps its arguments."""


def read_sources(paths: Iterable[Path], metric: MetricName) -> tuple[list[SeedCurve], list[TrainingRun]]:
    """The curves of run directories and CSV files, and the runs among them.

    A path that is given twice counts once. A file beside a given run that is named after it, as RUN.log of
    `rsm-train --seeds` is, does not count, because a glob for the runs finds it too.

    Raises:
        CheckpointError: a path is no run, or a run is damaged or without a point.
        UsageError: a CSV file is not as described; a seed is there twice; runs and files share a label; or an
            environment is there in several versions.
    """
    given = list({path.resolve(): path for path in paths}.values())
    tables = [path for path in given if path.suffix == SUFFIX and not path.is_dir()]
    directories = {path.resolve() for path in given if path.is_dir()}
    runs = [
        read_training_run(path)
        for path in given
        if path not in tables and not _belongs_to_one_of(path, directories)
    ]
    own = seed_curves(runs, metric)
    others = [curve for path in tables for curve in read_table(path)]
    _require_other_labels(own, others)
    curves = [*own, *others]
    _require_each_seed_once(curves)
    require_one_version({curve.task for curve in curves})
    return curves, runs


def _belongs_to_one_of(path: Path, directories: set[Path]) -> bool:
    """Whether it is a file whose name begins with that of a directory beside it."""
    resolved = path.resolve()
    return path.is_file() and any(
        resolved.parent == directory.parent and resolved.name.startswith(f"{directory.name}.")
        for directory in directories
    )


def require_one_version(tasks: Iterable[str]) -> None:
    """Check that no environment is there in several versions.

    Raises:
        UsageError: one is.
    """
    versions: dict[str, set[str]] = {}
    for task in tasks:
        match = _VERSION.fullmatch(task)
        if match:
            versions.setdefault(match["name"], set()).add(f"{match['name']}-v{match['version']}")
    for several in versions.values():
        if len(several) > 1:
            raise UsageError(
                f"wanted one version of each environment, got {' and '.join(sorted(several))}, whose returns "
                "cannot be compared; draw each version in a call of its own"
            )


def _require_other_labels(own: Sequence[SeedCurve], others: Sequence[SeedCurve]) -> None:
    shared = {curve.label: curve for curve in others if curve.label in {run.label for run in own}}
    for label, curve in shared.items():
        raise UsageError(
            f"wanted other names for the algorithms in {curve.source!r} than those of the runs, got {label!r} "
            "in both; give it another name in the file"
        )


def _require_each_seed_once(curves: Sequence[SeedCurve]) -> None:
    seen: dict[tuple[str, str, int], SeedCurve] = {}
    for curve in curves:
        earlier = seen.setdefault((curve.task, curve.label, curve.seed), curve)
        if earlier is not curve:
            raise UsageError(
                f"wanted each seed of a curve once, got seed {curve.seed} of {curve.label} on {curve.task} in "
                f"{earlier.source!r} and in {curve.source!r}; leave one of them out"
            )
