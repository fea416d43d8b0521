"""The subcommand `rsm-eval curves`: read runs, aggregate them, write a figure and a page."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from rsm_common.commandline import GroupedCommand, dataclass_options, require_extra
from rsm_common.output import check_writable, write_atomically
from rsm_common.provenance import installed_versions
from rsm_eval.curves.aggregate import Against, Band
from rsm_eval.curves.runs import METRICS, MetricName

DEFAULT_STEM = "curves"
FIGURE_KINDS = ("png", "pdf", "svg")
_MODULES = ("scipy", "matplotlib", "jinja2")
EXAMPLES = (
    (
        "Two algorithms, all seeds of each: curves.png and curves.html",
        "rsm-eval curves runs/cheetah-dpmd-s* runs/cheetah-sac-s*",
    ),
    (
        "Over minutes, as figures/cheetah.pdf for LaTeX and figures/cheetah.html",
        "rsm-eval curves runs/cheetah-* --against minutes --out figures/cheetah.pdf",
    ),
    (
        "Beside the curves of another library, from a CSV file with one row per seed and step",
        "rsm-eval curves runs/cheetah-* sb3.csv\n"
        "# sb3.csv: task,algorithm,seed,step,return,minutes\n"
        "#          HalfCheetah-v5,SB3 SAC,0,25000,2311.5,4.1",
    ),
)


@dataclass(frozen=True)
class CurvesConfig:
    """Settings of rsm-eval curves."""

    against: Against = field(
        default="steps",
        metadata={
            "group": "Curves",
            "help": "The x axis: environment steps, or minutes of wall clock since the run began. The time "
            "between a stop and a resume does not count.",
        },
    )
    metric: MetricName = field(
        default="evaluation",
        metadata={
            "group": "Curves",
            "help": "The y axis: mean return of an evaluation, the same with one particle, or of the training "
            "episodes.",
        },
    )
    band: Band = field(
        default="interval",
        metadata={
            "group": "Curves",
            "help": "The band: the 95 % interval of the mean by Student's t, or the range from the least to "
            "the greatest of the seeds.",
        },
    )
    out: Path = field(
        default=Path(DEFAULT_STEM),
        metadata={
            "group": "Output",
            "help": "The figure and the page: OUT.png and OUT.html; in an existing directory OUT/curves.png "
            "and OUT/curves.html. The ending .pdf or .svg selects another format of the figure.",
        },
    )

    @property
    def files(self) -> tuple[Path, Path]:
        """The figure and the page."""
        out = self.out / DEFAULT_STEM if self.out.is_dir() else self.out
        kind = out.suffix[1:]
        # Only a known ending is one: the name may be "HalfCheetah-v5.lr0.1".
        stem = out.with_suffix("") if kind in (*FIGURE_KINDS, "html") else out
        figure = stem.with_name(f"{stem.name}.{kind if kind in FIGURE_KINDS else FIGURE_KINDS[0]}")
        return figure, stem.with_name(f"{stem.name}.html")


def curves_command(typed: str) -> click.Command:
    """The click command.

    Args:
        typed: the command line, for the page.
    """

    @click.command("curves", cls=GroupedCommand, examples=EXAMPLES)
    @click.argument("paths", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
    @dataclass_options(CurvesConfig)
    def curves(paths: tuple[Path, ...], **settings: Any) -> int:
        """Draw learning curves with intervals over seeds.

        RUN is a run directory of rsm-train, finished or not, or a CSV file with the columns task, algorithm,
        seed, step, return and perhaps minutes. There is one panel per environment and one line per algorithm,
        preset and set of settings. The line is the mean over the seeds, and the band is the 95 % interval of
        this mean (Student's t). The table has the final return of each.
        """
        return _run(paths, CurvesConfig(**settings), typed)

    return curves


def _run(paths: Sequence[Path], config: CurvesConfig, typed: str) -> int:
    require_extra("rsm-eval curves", "eval", _MODULES)
    from rsm_eval.curves.aggregate import aggregate
    from rsm_eval.curves.figure import View, add_legend, draw, figure_bytes
    from rsm_eval.curves.page import Origin, render_page, text_table
    from rsm_eval.curves.sources import read_sources

    files = config.files
    for path in files:
        check_writable(path)
    seeds, runs = read_sources(paths, config.metric)
    groups = aggregate(seeds, config.against)
    metric = METRICS[config.metric]
    curves = {task: [group.curve for group in several] for task, several in groups.items()}
    view = View(config.against, metric.title, config.band)
    figure = draw(curves, view)
    add_legend(figure, curves, view)
    origin = Origin(
        typed,
        datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        installed_versions().get("rsm-toolkit", ""),
    )
    figure_file, page_file = files
    write_atomically(figure_file, figure_bytes(figure, figure_file.suffix[1:]))
    write_atomically(page_file, render_page(groups, runs, view, metric, origin))
    click.echo(text_table(groups, metric))
    click.echo(f"\nfigure: {figure_file}\npage: {page_file}")
    return 0
