"""Means and intervals over seeds: pure functions of records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import UsageError
from rsm_eval.curves.seed_curve import SeedCurve
from rsm_eval.statistics import MeanInterval, mean_interval, mean_intervals

Against = Literal["steps", "minutes"]
Band = Literal["interval", "range"]
"""What is drawn around a mean: its 95 % interval, or from the least to the greatest of the seeds."""
Pair = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Two arrays [G]: x and y, or the lower and the upper end of a band."""


@dataclass(frozen=True)
class MeanCurve:
    """One line of a panel: the mean over seeds at G points, in the range of x that all seeds have reached."""

    label: str
    seeds: int
    x: NDArray[np.float64]
    """[G] steps or minutes."""
    mean: NDArray[np.float64]
    """[G]"""
    interval: Pair | None
    """Ends of the 95 % interval of the mean, [G] each; None for one seed."""
    least: NDArray[np.float64]
    """[G] of the seeds."""
    most: NDArray[np.float64]
    """[G] of the seeds."""
    beyond: tuple[Pair, ...] = ()
    """Of each seed that went further than the mean does: its own line from there on."""
    unfinished: bool = False
    """Whether a seed is known to have steps to do."""


@dataclass(frozen=True)
class Final:
    """The last evaluation that all seeds of a group have reached."""

    step: int
    returns: NDArray[np.float64]
    """[S] of each seed at that step."""
    best: NDArray[np.float64]
    """[S] the largest return of each seed up to that step."""
    minutes: float | None
    """Mean over the seeds of the wall clock at that step; None if a seed's is not known."""

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(self.returns.mean())

    @property
    def interval(self) -> MeanInterval | None:
        """Of the mean over the seeds; None for one seed."""
        return mean_interval(self.returns)


@dataclass(frozen=True)
class Group:
    """The seeds of one algorithm on one task."""

    task: str
    label: str
    seeds: tuple[SeedCurve, ...]
    """S of them, S >= 1."""
    curve: MeanCurve
    final: Final

    @property
    def behind(self) -> tuple[SeedCurve, ...]:
        """The seeds that have not reached the step of the furthest one."""
        furthest = max(seed.last_step for seed in self.seeds)
        return tuple(seed for seed in self.seeds if seed.last_step < furthest)

    @property
    def unfinished(self) -> tuple[SeedCurve, ...]:
        """The seeds that are known to have steps to do."""
        return tuple(seed for seed in self.seeds if seed.unfinished)

    @property
    def interpolated(self) -> bool:
        """Whether the seeds have points at different steps, in the range that all have reached."""
        grid = common_grid(self.seeds, "steps")
        return any(not np.isin(grid, seed.steps).all() for seed in self.seeds)


def aggregate(curves: Sequence[SeedCurve], against: Against) -> dict[str, list[Group]]:
    """The groups of each task, in the order of the records.

    Raises:
        UsageError: minutes are asked for and a seed has none, or seeds of a group have no range in common.
    """
    members: dict[str, dict[str, list[SeedCurve]]] = {}
    for curve in curves:
        members.setdefault(curve.task, {}).setdefault(curve.label, []).append(curve)
    return {
        task: [make_group(seeds, against) for seeds in by_label.values()] for task, by_label in members.items()
    }


def make_group(seeds: Sequence[SeedCurve], against: Against) -> Group:
    """The group of seeds of one task and label.

    Raises:
        UsageError: see `aggregate`.
    """
    ordered = tuple(sorted(seeds, key=lambda seed: seed.seed))
    first = ordered[0]
    return Group(first.task, first.label, ordered, _mean_curve(ordered, against), final_of(ordered))


def final_of(seeds: Sequence[SeedCurve]) -> Final:
    """What the seeds have at the last step that all have reached, between two evaluations by interpolation.

    Raises:
        UsageError: the seeds have no range of steps in common.
    """
    step = int(common_grid(seeds, "steps")[-1])
    minutes = [np.interp(step, seed.steps, seed.minutes) for seed in seeds if seed.minutes is not None]
    return Final(
        step,
        np.array([np.interp(step, seed.steps, seed.returns) for seed in seeds]),
        np.array([seed.returns[seed.steps <= step].max() for seed in seeds]),
        float(np.mean(minutes)) if len(minutes) == len(seeds) else None,
    )


def common_grid(seeds: Sequence[SeedCurve], against: Against) -> NDArray[np.float64]:
    """Every x at which a seed has a point, in the range that all seeds have reached; [G], G >= 1.

    Raises:
        UsageError: there is no such range.
    """
    xs = [_x(seed, against) for seed in seeds]
    low, high = max(x[0] for x in xs), min(x[-1] for x in xs)
    if low > high:
        late, early = seeds[int(np.argmax([x[0] for x in xs]))], seeds[int(np.argmin([x[-1] for x in xs]))]
        raise UsageError(
            f"wanted seeds of {late.label} on {late.task} that share a range of {against}, got seed "
            f"{late.seed} from {low:,.6g} on and seed {early.seed} up to {high:,.6g}; leave one of them out"
        )
    grid = np.unique(np.concatenate(xs))
    shared: NDArray[np.float64] = grid[(grid >= low) & (grid <= high)]
    return shared


def _mean_curve(seeds: Sequence[SeedCurve], against: Against) -> MeanCurve:
    grid = common_grid(seeds, against)
    values_SG = np.array([np.interp(grid, _x(seed, against), seed.returns) for seed in seeds])
    intervals = mean_intervals(values_SG)
    return MeanCurve(
        seeds[0].label,
        len(seeds),
        grid,
        values_SG.mean(axis=0),
        None if intervals is None else (intervals.low, intervals.high),
        values_SG.min(axis=0),
        values_SG.max(axis=0),
        tuple(
            line
            for seed, last in zip(seeds, values_SG[:, -1], strict=True)
            if (line := _beyond(seed, against, grid[-1], last)) is not None
        ),
        any(seed.unfinished for seed in seeds),
    )


def _beyond(seed: SeedCurve, against: Against, end: float, value: float) -> Pair | None:
    """The seed's own line from the end of the mean on; None if it has none."""
    x = _x(seed, against)
    further = x > end
    if not further.any():
        return None
    return np.concatenate([[end], x[further]]), np.concatenate([[value], seed.returns[further]])


def _x(seed: SeedCurve, against: Against) -> NDArray[np.float64]:
    if against == "steps":
        return seed.steps.astype(np.float64)
    if seed.minutes is None:
        raise UsageError(
            f"wanted minutes of every point for --against minutes, got points of {seed.label} without them in "
            f"{seed.source!r}; add them, leave the file out, or use --against steps"
        )
    return seed.minutes


def notes(groups: Mapping[str, Sequence[Group]]) -> list[str]:
    """Sentences about the groups whose seeds are unfinished, not equally far or evaluated at other steps."""
    every = [group for several in groups.values() for group in several]
    found = [note for group in every if (note := _progress(group))]
    mixed = [f"{group.label} on {group.task}" for group in every if group.interpolated]
    if mixed:
        found.append(
            "Seeds with points at different steps, so that values between two points are interpolated: "
            f"{'; '.join(mixed)}."
        )
    return found


def _progress(group: Group) -> str:
    """How far the seeds are; empty if all are equally far, and none is known to be unfinished."""
    parts = []
    if group.unfinished:
        reached = ", ".join(f"seed {s.seed} at {s.last_step:,} of {s.total_steps:,}" for s in group.unfinished)
        parts.append(f"{_of(group.unfinished, group)} unfinished ({reached})")
    if group.behind:
        furthest = max(seed.last_step for seed in group.seeds)
        parts.append(
            f"{_of(group.behind, group)} behind the furthest, which is at step {furthest:,}, so the final "
            f"return is that at step {group.final.step:,}"
        )
    return f"{group.label} on {group.task}: {'; '.join(parts)}." if parts else ""


def _of(some: Sequence[SeedCurve], group: Group) -> str:
    verb = "is" if len(some) == 1 else "are"
    return f"{len(some)} of {len(group.seeds)} seeds {verb}"
