"""Latency against return, as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from rsm_eval.plots import house_style, log_ticks
from rsm_export.auto.search import Measured, SearchResult, describe

_STYLE = house_style("#222222", "#555555", "#dddddd")
_COLOURS = {"ddpm": "#1f6fb4", "ddim": "#d9731a"}
_CHOSEN = "#b3202a"


def draw(result: SearchResult, path: Path) -> None:
    """Write the picture; its kind is that of the suffix.

    A point is a candidate in the screening episodes, its size the number of particles. The interval (95 %) is
    that of the difference to the full policy, which acted in the same episodes.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        full = result.candidates[0].screened.full_mean
        allowed = result.candidates[0].screened.allowed
        axes.axhspan(full - allowed, full, color="#1f9d55", alpha=0.15, linewidth=0, label="tolerance")
        for name in _COLOURS:
            _points(axes, name, [found for found in result.candidates if found.config.sampler == name])
        chosen = result.chosen
        axes.scatter(
            *(chosen.latency_ms, chosen.screened.mean),
            s=220,
            facecolors="none",
            edgecolors=_CHOSEN,
            linewidths=1.6,
            label=f"chosen: {describe(chosen.config)}",
        )
        axes.set_xscale("log")
        axes.set_xticks(log_ticks(*axes.get_xlim()))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("milliseconds for one action (median, in process)")
        axes.set_ylabel(f"return in {result.env_id}")
        axes.legend(loc="best")
        figure.savefig(path, dpi=150)


def _points(axes: Axes, name: str, candidates: list[Measured]) -> None:
    if not candidates:
        return
    losses = [found.screened for found in candidates]
    x, y = [found.latency_ms for found in candidates], [loss.mean for loss in losses]
    low = [loss.difference.mean - loss.difference.low for loss in losses]
    high = [loss.difference.high - loss.difference.mean for loss in losses]
    axes.errorbar(x, y, yerr=[low, high], fmt="none", ecolor=_COLOURS[name], elinewidth=0.8, alpha=0.6)
    sizes = [14 + 6 * (found.config.particles or 1) ** 0.8 for found in candidates]
    axes.scatter(x, y, s=sizes, color=_COLOURS[name], label=name, zorder=3)
