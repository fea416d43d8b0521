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

from rsm_common.errors import CheckpointError, ConfigError
from rsm_eval.learning import METRICS_FILE, LearningCurve, load_learning_curve, read_metrics
from rsm_eval.statistics import mean_interval

CONFIG_FILE = "config.json"
PROTOCOL = (
    "An evaluation is the mean return of one seed's episodes, best of N particles by the critics; N = 1 is one "
    "particle without them. Means are over seeds, with Student's t intervals of 95 % where there are several. "
    "Best is the maximum over a seed's evaluations, which favours long and noisy curves: the protocol of the "
    "published DPMD numbers (deviation 6). Complete means that every seed reached total_steps."
)
_NOT_DIGESTED = (
    "seed",
    "out",
    "total_steps",
    "log_every",
    "keep_checkpoints",
    "checkpoint_every",
    "device",
    "threads",
    "vector",
    "compile",
    "wandb",
)
"""Settings that do not change what is learnt from a step, but for the seed and rounding."""


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
    seed: int
    directory: Path
    config: Mapping[str, Any]
    curve: LearningCurve
    steps: int
    updates: int
    steps_per_s: float | None
    """Median over log intervals with updates; evaluations are in some of them."""
    updates_per_s: float | None
    slices: Sequence[Mapping[str, Any]] = ()
    """What benchmarks/returns.py noted about each of its command lines."""

    @property
    def digest(self) -> str:
        """Hash of the settings that decide the result, without the seed."""
        parts = {
            part: {name: value for name, value in self.config[part].items() if name not in _NOT_DIGESTED}
            for part in ("run", "algorithm")
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def changed_settings(self) -> dict[str, Any]:
        """The settings that decide the result and differ from the preset."""
        from rsm_train.config import resolve

        run, algorithm = resolve(asdict(self.variant))
        return {
            name: value
            for part, preset in (("run", asdict(run)), ("algorithm", asdict(algorithm)))
            for name, value in self.config[part].items()
            if name not in _NOT_DIGESTED and name in preset and preset[name] != value
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
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        run = config["run"]
        variant = Variant(run["env"], run["algo"], run["preset"], float(run["updates_per_step"]))
        seed, _ = int(run["seed"]), config["algorithm"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot read {CONFIG_FILE} of {str(directory)!r} ({error}); move the directory away"
        ) from None
    records = read_metrics(directory)
    train = [record for record in records if record.get("kind") == "train"]
    learning = [record for record in train if record.get("updates_per_s", 0) > 0]
    notes = slices_file(directory)
    return TrainedRun(
        variant,
        seed,
        directory,
        config,
        load_learning_curve(directory),
        _last_step(records),
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
            raise ConfigError(
                f"wanted equal settings in all runs of {variant} on {variant.env}, got different ones in "
                f"{', '.join(run.directory.name for run in members)}; give other settings another --runs"
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
        "trained_with": run.config.get("provenance"),
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
    """One variant over its seeds, at the steps that all of its evaluated seeds have."""
    evaluated = [run for run in runs if run.curve.eval_steps.size]
    steps = common_steps([run.curve.eval_steps.tolist() for run in evaluated])
    means = [_at(run.curve.eval_steps, run.curve.eval_mean, steps) for run in evaluated]
    ones = [_at(run.curve.eval1_steps, run.curve.eval1_mean, steps[-1:]) for run in evaluated]
    reached = min(run.steps for run in runs)
    summaries = [_over_seeds([row[index] for row in means]) for index in range(len(steps))]
    return {
        **asdict(runs[0].variant),
        "changed_settings": runs[0].changed_settings,
        "seeds": [run.seed for run in evaluated],
        "seeds_without_evaluation": [run.seed for run in runs if run not in evaluated],
        "complete": reached >= total_steps,
        "steps": reached,
        "fraction": _fraction(reached, total_steps),
        "curve": {
            "step": steps,
            **{
                name: [summary[name] for summary in summaries] for name in ("mean", "low", "high", "min", "max")
            },
        },
        "final": {"step": steps[-1], **summaries[-1]} if steps else None,
        "final_one_particle": _over_seeds([row[0] for row in ones]) if steps and all(ones) else None,
        "best": _over_seeds([max(row) for row in means]) if steps else None,
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


def _at(steps: Any, values: Any, wanted: Sequence[int]) -> list[float]:
    found = dict(zip(steps.tolist(), values.tolist(), strict=True))
    return [found[step] for step in wanted if step in found]


def _over_seeds(values: Sequence[float]) -> dict[str, Any]:
    interval = mean_interval(values)
    return {
        "mean": round(float(np.mean(values)), 2),
        "low": _rounded(interval.low if interval else None),
        "high": _rounded(interval.high if interval else None),
        "min": round(min(values), 2),
        "max": round(max(values), 2),
    }


def _fraction(steps: int, total_steps: int) -> float:
    return round(min(1.0, steps / total_steps), 4)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


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

_COLOURS = {"dpmd": "#0072B2", "sdac": "#D55E00", "sac": "#009E73"}
"""Of Okabe and Ito, told apart by colour-blind readers too."""
_DASHES: dict[str, Any] = {
    "paper": "solid",
    "reference": (0, (5, 2)),
    "kl": (0, (6, 2, 1, 2)),
    "quick": (0, (2, 1)),
}
FEW_POINTS = 5
"""Fewer are marked: a line of one point is none."""
_TEXT, _MUTED, _GRID = "#1c2330", "#5b6472", "#dfe3e8"


def draw(content: Mapping[str, Any], path: Path) -> None:
    """One panel per environment: a line per variant, a band from the least to the best seed."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from rsm_eval.plots import house_style

    envs = _by_env([variant for variant in content["variants"] if variant["final"]])
    with mpl.rc_context(house_style(_TEXT, _MUTED, _GRID)):
        figure = Figure(figsize=(6.2 * max(1, len(envs)), 4.4), layout="constrained")
        panels = figure.subplots(1, max(1, len(envs)), squeeze=False)[0]
        for axes, (env, members) in zip(panels, envs.items(), strict=False):
            _panel(axes, env, members, content["published_elsewhere"])
        labels = {
            label: handle
            for axes in panels
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(labels.values(), labels, loc="outside lower center", ncols=2 if len(envs) < 2 else 3)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, facecolor="white")


def _panel(
    axes: Any, env: str, members: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, Any]]
) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    from rsm_eval.plots import short_count

    last = max(member["final"]["step"] for member in members)
    for member in members:
        curve, colour = member["curve"], _COLOURS[member["algo"]]
        fast = member["algo"] == "sac" and member["updates_per_step"] >= 1
        axes.plot(
            curve["step"],
            curve["mean"],
            color=colour,
            linestyle=_DASHES[member["preset"]],
            linewidth=1.2 if fast else 2,
            marker="o" if fast else "." if len(curve["step"]) < FEW_POINTS else "none",
            markersize=3.5,
            label=str(_variant(member)),
        )
        if len(member["seeds"]) > 1:
            axes.fill_between(curve["step"], curve["min"], curve["max"], color=colour, alpha=0.14, linewidth=0)
    _published_points(axes, [row for row in known if row["env"] == env and row["ours"] is not None])
    seeds = sorted({len(member["seeds"]) for member in members})
    count = "1 seed" if seeds == [1] else f"{'-'.join(map(str, sorted({seeds[0], seeds[-1]})))} seeds"
    changed = ", with changed settings" if any(member["changed_settings"] for member in members) else ""
    axes.set_title(f"{env}, {count}{changed}", loc="left", color=_TEXT)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("episode return")
    axes.set_xlim(0, last * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))


def _published_points(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """The published points that have a counterpart of ours with the same settings and step."""
    for source in dict.fromkeys(row["source"] for row in rows):
        points = [(row["step"], row["mean"]) for row in rows if row["source"] == source]
        label = f"not ours: {source.partition(',')[0]}"
        axes.plot(
            *zip(*points, strict=True),
            color=_MUTED,
            linestyle=":",
            linewidth=1.2,
            marker="x",
            markersize=4,
            label=label,
        )
