"""The report of benchmarks/returns.py: runs aggregated over seeds, as a table and a picture.

It only reads the run directories, and starts no process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import ConfigError
from rsm_eval.curves.aggregate import MeanCurve, final_of, make_group
from rsm_eval.curves.runs import TrainingRun, read_training_run, seed_curve
from rsm_eval.learning import CONFIG_FILE, METRICS_FILE, LearningCurve, load_learning_curve, read_metrics
from rsm_eval.statistics import mean_interval

PROTOCOL = (
    "An evaluation is the mean return of one seed's episodes, best of N particles by the critics; N = 1 is one "
    "particle without them. Means are over seeds, with Student's t intervals of 95 % where there are several. "
    "Best is the maximum over a seed's evaluations, which favours long and noisy curves: the protocol of the "
    "published DPMD numbers (deviation 6). Complete means that every seed reached total_steps."
)


@dataclass(frozen=True, order=True)
class Variant:
    """A unit of comparison: all that identifies a run except its seed."""

    env: str
    algo: str
    preset: str
    updates_per_step: float

    def __str__(self) -> str:
        updates = "update" if self.updates_per_step == 1 else "updates"
        return f"{self.algo.upper()} {self.preset}, {self.updates_per_step:g} {updates} per step"


@dataclass(frozen=True)
class Known:
    """A published number of others, kept apart from our own."""

    env: str
    algo: str
    preset: str | None
    """Ours of the same settings; None if none of our presets is known to have them."""
    updates_per_step: float | None
    """None if not known."""
    points: Mapping[int, float]
    """Environment step to mean return."""
    source: str

    def describes(self, variant: Variant) -> bool:
        """True if a variant has the same settings."""
        return asdict(variant).items() <= asdict(self).items()


KNOWN = (
    Known(
        "Ant-v4",
        "dpmd",
        "reference",
        0.2,
        {
            100_000: 363,
            200_000: 847,
            300_000: 1013,
            400_000: 2679,
            600_000: 4257,
            800_000: 4770,
            900_000: 4365,
            1_000_000: 5354,
        },
        "the authors' published run, seed 100 alone, 20 episodes per point",
    ),
    Known("Ant-v4", "sac", "paper", 1.0, {1_000_000: 5734}, "a correct SAC, published elsewhere"),
    Known(
        "HalfCheetah-v4",
        "dpmd",
        "reference",
        0.2,
        {1_000_000: 11_268},
        "independent DPMD, cosine and learning-rate decay, 5 runs, s.e. 153",
    ),
    Known(
        "HalfCheetah-v4",
        "dpmd",
        None,
        0.2,
        {1_000_000: 10_263},
        "the same with deviation 1 fixed, 5 runs, s.e. 281",
    ),
    Known("HalfCheetah-v4", "sac", "paper", 1.0, {1_000_000: 11_321}, "a correct SAC, published elsewhere"),
    Known("HalfCheetah-v5", "dpmd", None, None, {1_000_000: 10_706}, "independent DPMD"),
)
"""Section 5 of the algorithms' notes, as far as environment version and algorithm are ours."""


@dataclass(frozen=True)
class TrainedRun:
    """One run directory at its present step."""

    variant: Variant
    training: TrainingRun
    curve: LearningCurve
    steps: int
    updates: int
    steps_per_s: float | None
    """Median over log intervals with updates; evaluations are in some of them."""
    updates_per_s: float | None
    slices: Sequence[Mapping[str, Any]] = ()
    """What benchmarks/returns.py noted about each of its command lines."""

    @property
    def seed(self) -> int:
        """Of everything random in the run."""
        return self.training.seed

    @property
    def digest(self) -> str:
        """Hash of the task and of the settings that decide the result."""
        parts = [self.training.task, self.training.decisive_settings]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def changed_settings(self) -> dict[str, Any]:
        """The settings that decide the result and differ from the preset."""
        from rsm_train.config import resolve

        run, algorithm = resolve(asdict(self.variant))
        preset = asdict(run) | asdict(algorithm)
        return {
            name: value
            for name, value in self.training.decisive_settings.items()
            if name in preset and preset[name] != value
        }


def slices_file(directory: Path) -> Path:
    """The file of slices, beside the run directory, because rsm-train owns the directory itself."""
    return directory.with_name(directory.name + ".slices.jsonl")


def steps_of(directory: Path) -> int:
    """The last logged step of a run; 0 without a log."""
    # Not the curve's last step: a log line of a time in which no episode ended is not part of the curve.
    return _last_step(read_metrics(directory)) if (directory / METRICS_FILE).is_file() else 0


def _last_step(records: Sequence[Mapping[str, Any]]) -> int:
    return max((int(record["step"]) for record in records), default=0)


def read_runs(root: Path) -> list[TrainedRun]:
    """Every run below a directory with a log, ordered by variant and seed.

    Raises:
        CheckpointError: a run's files are damaged.
    """
    directories = [
        path.parent for path in root.glob(f"*/{CONFIG_FILE}") if (path.parent / METRICS_FILE).is_file()
    ]
    return sorted(map(_read_run, directories), key=lambda run: (run.variant, run.seed))


def _read_run(directory: Path) -> TrainedRun:
    training = read_training_run(directory)
    run = training.config["run"]
    train = [record for record in training.records if record.get("kind") == "train"]
    learning = [record for record in train if record.get("updates_per_s", 0) > 0]
    notes = slices_file(directory)
    return TrainedRun(
        Variant(run["env"], run["algo"], run["preset"], float(run["updates_per_step"])),
        training,
        load_learning_curve(directory),
        _last_step(training.records),
        int(train[-1]["updates"]) if train else 0,
        float(np.median([record["steps_per_s"] for record in learning])) if learning else None,
        float(np.median([record["updates_per_s"] for record in learning])) if learning else None,
        [json.loads(line) for line in notes.read_text().splitlines()] if notes.is_file() else [],
    )


# --- aggregation: pure ------------------------------------------------------------------------------------


def report(runs: Sequence[TrainedRun], total_steps: int) -> dict[str, Any]:
    """The record's content.

    Raises:
        ConfigError: runs of one variant have different settings.
    """
    variants = [aggregate(members, total_steps) for members in by_variant(runs).values()]
    return {
        "protocol": PROTOCOL,
        "total_steps": total_steps,
        "variants": variants,
        "runs": [describe_run(run, total_steps) for run in runs],
        "published_elsewhere": published(variants),
    }


def by_variant(runs: Sequence[TrainedRun]) -> dict[Variant, list[TrainedRun]]:
    """The runs of each variant, which must have equal settings.

    Raises:
        ConfigError: they have not.
    """
    groups: dict[Variant, list[TrainedRun]] = {}
    for run in runs:
        groups.setdefault(run.variant, []).append(run)
    for variant, members in groups.items():
        if len({run.digest for run in members}) > 1:
            names = ", ".join(run.training.directory.name for run in members)
            raise ConfigError(
                f"wanted equal settings in all runs of {variant} on {variant.env}, got different ones in "
                f"{names}; give other settings another --runs"
            )
    return groups


def describe_run(run: TrainedRun, total_steps: int) -> dict[str, Any]:
    """Describe a run: its settings, step, speed and evaluations."""
    curve = run.curve
    ones = dict(zip(curve.eval1_steps.tolist(), curve.eval1_mean.tolist(), strict=True))
    machines = {json.dumps(note["machine"], sort_keys=True): note["machine"] for note in run.slices}
    return {
        **asdict(run.variant),
        "seed": run.seed,
        "command": run.slices[-1]["command"] if run.slices else None,
        "settings_digest": run.digest,
        "trained_on": list(machines.values()),
        "trained_with": run.training.config.get("provenance"),
        "steps": run.steps,
        "fraction": _fraction(run.steps, total_steps),
        "wall_s": round(curve.wall_s, 1),
        "updates": run.updates,
        "steps_per_s": _rounded(run.steps_per_s),
        "updates_per_s": _rounded(run.updates_per_s),
        "evaluations": {
            "step": curve.eval_steps.tolist(),
            "mean": [round(value, 2) for value in curve.eval_mean.tolist()],
            "std": [round(value, 2) for value in curve.eval_std.tolist()],
            "one_particle_mean": [_rounded(ones.get(step)) for step in curve.eval_steps.tolist()],
        },
    }


def aggregate(runs: Sequence[TrainedRun], total_steps: int) -> dict[str, Any]:
    """One variant over its seeds, in the range of steps that all of its evaluated seeds have."""
    evaluated = [run for run in runs if run.curve.eval_steps.size]
    reached = min(run.steps for run in runs)
    return {
        **asdict(runs[0].variant),
        "changed_settings": runs[0].changed_settings,
        "seeds": [run.seed for run in evaluated],
        "seeds_without_evaluation": [run.seed for run in runs if run not in evaluated],
        "complete": reached >= total_steps,
        "steps": reached,
        "fraction": _fraction(reached, total_steps),
        **_over_seeds(evaluated),
    }


def _over_seeds(runs: Sequence[TrainedRun]) -> dict[str, Any]:
    """The curve, the final and the best evaluation of a variant; None for what no run has."""
    if not runs:
        empty: dict[str, Any] = {name: [] for name in ("step", "mean", "low", "high", "min", "max")}
        return {"curve": empty, "final": None, "final_one_particle": None, "best": None}
    label = str(runs[0].variant)
    group = make_group([seed_curve(run.training, label, "evaluation") for run in runs], "steps")
    curve, final = group.curve, group.final
    low, high = curve.interval or ([None] * len(curve.x),) * 2
    ones = None
    if all(run.curve.eval1_steps.size for run in runs):
        ones = final_of([seed_curve(run.training, label, "one-particle") for run in runs])
    return {
        "curve": {
            "step": [int(step) for step in curve.x],
            "mean": list(map(_rounded, curve.mean)),
            "low": list(map(_rounded, low)),
            "high": list(map(_rounded, high)),
            "min": list(map(_rounded, curve.least)),
            "max": list(map(_rounded, curve.most)),
        },
        "final": {"step": final.step, **_summary(final.returns)},
        "final_one_particle": _summary(ones.returns) if ones and ones.step == final.step else None,
        "best": _summary(final.best),
    }


def common_steps(steps_by_seed: Sequence[Sequence[int]]) -> list[int]:
    """The steps that every list has, ascending."""
    return sorted(set.intersection(*map(set, steps_by_seed))) if steps_by_seed else []


def published(variants: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Published numbers beside ours of the same environment, settings and step."""
    rows = []
    for known in KNOWN:
        if known.env not in {variant["env"] for variant in variants}:
            continue
        same = (v for v in variants if known.describes(_variant(v)) and not v["changed_settings"])
        ours = next(same, None)
        curve = dict(zip(ours["curve"]["step"], ours["curve"]["mean"], strict=True)) if ours else {}
        rows += [
            {
                **{name: value for name, value in asdict(known).items() if name != "points"},
                "step": step,
                "mean": mean,
                "ours": curve.get(step),
            }
            for step, mean in known.points.items()
        ]
    return rows


def _variant(record: Mapping[str, Any]) -> Variant:
    return Variant(record["env"], record["algo"], record["preset"], record["updates_per_step"])


def _summary(values: NDArray[np.float64]) -> dict[str, Any]:
    """Of one number per seed."""
    interval = mean_interval(values)
    return {
        "mean": _rounded(values.mean()),
        "low": _rounded(interval.low if interval else None),
        "high": _rounded(interval.high if interval else None),
        "min": _rounded(values.min()),
        "max": _rounded(values.max()),
    }


def _fraction(steps: int, total_steps: int) -> float:
    return round(min(1.0, steps / total_steps), 4)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 2)


# --- table ------------------------------------------------------------------------------------------------


def table(content: Mapping[str, Any]) -> str:
    """The comparison as Markdown: ours, at the last step that all have, then what others published."""
    parts = [_env_table(env, members) for env, members in _by_env(content["variants"]).items()]
    if not parts:
        return "No run has been evaluated yet.\n"
    if content["published_elsewhere"]:
        rows = [
            [
                row["env"],
                row["algo"].upper(),
                f"{row['step']:,}",
                f"{row['mean']:,.0f}",
                _number(row["ours"], "none at this step"),
                row["source"],
            ]
            for row in content["published_elsewhere"]
        ]
        heading = ["environment", "algorithm", "step", "published", "ours of these settings", "source"]
        parts.append("### Published elsewhere, not run here\n\n" + _markdown(heading, rows))
    return "\n".join([*parts, content["protocol"], ""])


def _env_table(env: str, members: Sequence[Mapping[str, Any]]) -> str:
    evaluated = [member for member in members if member["final"]]
    shared = common_steps([member["curve"]["step"] for member in evaluated])
    step = shared[-1] if shared else None
    rows = []
    for member in members:
        curve = member["curve"]
        at = curve["step"].index(step) if step in curve["step"] else None
        rows.append(
            [
                member["algo"].upper(),
                member["preset"],
                f"{member['updates_per_step']:g}",
                str(len(member["seeds"])),
                "-"
                if at is None
                else _with_interval({name: curve[name][at] for name in ("mean", "low", "high")}),
                f"{member['final']['step']:,}" if member["final"] else "-",
                _with_interval(member["final"]),
                _with_interval(member["final_one_particle"]),
                _with_interval(member["best"]),
                "yes" if member["complete"] else f"no, {member['fraction']:.1%}",
            ]
        )
    heading = [
        "algorithm",
        "preset",
        "updates per step",
        "seeds",
        f"return at {step:,}" if step else "return",
        "last step",
        "return there",
        "N = 1 there",
        "best",
        "complete",
    ]
    common = f"The last step that all of these evaluated is {step:,}.\n\n" if step else ""
    return f"### {env}\n\n{common}{_changes(members)}{_markdown(heading, rows)}"


def _changes(members: Sequence[Mapping[str, Any]]) -> str:
    """A sentence for each set of settings that differ from the presets, with the variants that have it."""
    whose: dict[str, list[str]] = {}
    for member in members:
        changes = ", ".join(f"{name} = {value}" for name, value in member["changed_settings"].items())
        if changes:
            whose.setdefault(changes, []).append(str(_variant(member)))
    return "".join(
        f"Not the presets' own: {changes} ({'all' if len(names) == len(members) else '; '.join(names)}).\n\n"
        for changes, names in whose.items()
    )


def _by_env(variants: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for variant in variants:
        groups.setdefault(variant["env"], []).append(variant)
    return groups


def _with_interval(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    if value["low"] is None:
        return _number(value["mean"])
    return f"{_number(value['mean'])} ({_number(value['low'])} to {_number(value['high'])})"


def _number(value: float | None, missing: str = "-") -> str:
    return missing if value is None else f"{value:,.0f}"


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# --- picture ----------------------------------------------------------------------------------------------


def draw(content: Mapping[str, Any], path: Path) -> None:
    """The curves of `rsm-eval curves`, and the published points beside them; nothing without an evaluation."""
    from rsm_eval.curves.figure import View, add_legend, draw, figure_bytes

    envs = _by_env([variant for variant in content["variants"] if variant["final"]])
    panels = {_title(env, members): list(map(_mean_curve, members)) for env, members in envs.items()}
    if not panels:
        return
    view = View("steps", "evaluation return")
    figure = draw(panels, view)
    published: dict[str, Any] = {}
    for axes, env in zip(figure.axes, envs, strict=False):
        rows = [row for row in content["published_elsewhere"] if row["env"] == env and row["ours"] is not None]
        published |= _published_points(axes, rows)
    add_legend(figure, panels, view, published)
    path.write_bytes(figure_bytes(figure, "png"))


def _title(env: str, members: Sequence[Mapping[str, Any]]) -> str:
    return f"{env}, with changed settings" if any(member["changed_settings"] for member in members) else env


def _mean_curve(variant: Mapping[str, Any]) -> MeanCurve:
    curve = variant["curve"]
    x, mean, least, most = (np.array(curve[name], dtype=np.float64) for name in ("step", "mean", "min", "max"))
    interval = None if None in curve["low"] else (np.array(curve["low"]), np.array(curve["high"]))
    label, seeds = str(_variant(variant)), len(variant["seeds"])
    return MeanCurve(label, seeds, x, mean, interval, least, most, unfinished=not variant["complete"])


def _published_points(axes: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The published points that have a counterpart of ours with the same settings and step, by their label."""
    drawn = {}
    for source in dict.fromkeys(row["source"] for row in rows):
        points = [(row["step"], row["mean"]) for row in rows if row["source"] == source]
        label = f"not ours: {source.partition(',')[0]}"
        style = {"color": "#777777", "linestyle": ":", "linewidth": 1.2, "marker": "x", "markersize": 4}
        (drawn[label],) = axes.plot(*zip(*points, strict=True), **style)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, *(y for _, y in points)), max(high, *(y for _, y in points)))
    return drawn
