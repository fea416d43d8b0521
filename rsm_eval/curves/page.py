"""Learning curves as text and as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rsm_common.commandline import aligned
from rsm_eval.curves.aggregate import Against, Group, notes
from rsm_eval.curves.figure import View, explanations, order, panel_svg, seeds_text
from rsm_eval.curves.runs import Metric, TrainingRun
from rsm_eval.formats import format_returns
from rsm_eval.plots import SERIES
from rsm_eval.templates import load_template

HEADING = ("algorithm", "final return", "95 % interval", "n", "best", "at step", "minutes", "state")
_STROKES = ("solid", "dashed", "dotted")
"""CSS's nearest to the dashes of the figure."""
_SIMULATOR = ("gymnasium", "mujoco")
_MACHINE = ("device", "threads")


@dataclass(frozen=True)
class Origin:
    """What a reader needs to repeat a page."""

    command: str
    made_at: str
    """ISO 8601, UTC."""
    version: str


def table_rows(groups: Sequence[Group]) -> list[list[str]]:
    """The cells below HEADING, a row for each group of one task."""
    scale = max(abs(group.final.mean) for group in groups)
    return [_row(group, scale) for group in groups]


def text_table(groups: Mapping[str, Sequence[Group]], metric: Metric) -> str:
    """The final returns of each task as aligned plain text, and the notes."""
    tables = [
        f"{task}, {metric.title}\n{aligned([HEADING, *table_rows(several)])}"
        for task, several in groups.items()
    ]
    return "\n\n".join([*tables, *filter(None, ["\n".join(notes(groups))])])


def render_page(
    groups: Mapping[str, Sequence[Group]],
    runs: Sequence[TrainingRun],
    view: View,
    metric: Metric,
    origin: Origin,
) -> str:
    """The page as one HTML document without external assets.

    Args:
        groups: what is shown, by task.
        runs: the runs behind it; the page says where their machines or versions differ.
        view: what the axes and the bands of the figure are.
        metric: what its points are.
        origin: what the page says about itself.
    """
    curves = {task: [group.curve for group in several] for task, several in groups.items()}
    places = order(curves)
    every = [group for several in groups.values() for group in several]
    panels = [
        {
            "task": task,
            "svg": Markup(panel_svg(task, curves[task], places, view, ident=f"panel-{number}")),
            "groups": several,
            "rows": table_rows(several),
        }
        for number, (task, several) in enumerate(groups.items(), start=1)
    ]
    return load_template("curves.html.j2").render(
        panels=panels,
        places=places,
        seeds={
            label: seeds_text([len(group.seeds) for group in every if group.label == label]) for label in places
        },
        series=SERIES,
        strokes=_STROKES,
        explanations=explanations(curves, view),
        notes=notes(groups),
        machine_notes=_machine_notes(runs, view.against),
        heading=HEADING,
        has_minutes=any(group.final.minutes is not None for group in every),
        metric=metric,
        view=view,
        command=origin.command,
        made_at=origin.made_at,
        version=origin.version,
    )


def _row(group: Group, scale: float) -> list[str]:
    final, interval = group.final, group.final.interval
    mean, best = format_returns([final.mean, float(final.best.mean())], scale)
    return [
        group.label,
        mean,
        f"[{', '.join(format_returns([interval.low, interval.high], scale))}]" if interval else "-",
        str(len(group.seeds)),
        best,
        f"{final.step:,}",
        "-" if final.minutes is None else f"{final.minutes:,.1f}",
        _state(group),
    ]


def _state(group: Group) -> str:
    if group.unfinished:
        return f"{len(group.unfinished)} of {len(group.seeds)} unfinished"
    return "unknown" if any(seed.total_steps is None for seed in group.seeds) else "finished"


def _machine_notes(runs: Sequence[TrainingRun], against: Against) -> list[str]:
    """Sentences about differences that make runs of one task hard to compare."""
    found = []
    for task in dict.fromkeys(run.task for run in runs):
        members = [run for run in runs if run.task == task]
        for name in _SIMULATOR:
            versions = _values(members, "provenance", name)
            if len(versions) > 1:
                found.append(
                    f"The runs of {task} were trained with different versions of {name}: {', '.join(versions)}."
                )
        if against == "minutes":
            for name in _MACHINE:
                values = _values(members, "effective", name)
                if len(values) > 1:
                    found.append(f"The minutes of {task} are of different {name}: {', '.join(values)}.")
    return found


def _values(runs: Sequence[TrainingRun], part: str, name: str) -> list[str]:
    facts: list[Any] = [run.config.get(part) for run in runs]
    return sorted({str(fact[name]) for fact in facts if isinstance(fact, Mapping) and name in fact})
