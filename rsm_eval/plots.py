"""The figures of a report, as inline SVG that follows the page's colours and fonts.

Figures are drawn in placeholder colours that become CSS variables of the page, so that one picture serves
a light and a dark page; text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from rsm_eval.learning import LearningCurve
from rsm_eval.statistics import Summary

SERIES = 6
"""Number of series colours that the page defines; further series start again."""

_TEXT, _MUTED, _GRID, _SURFACE = "#010101", "#020202", "#030303", "#040404"
_PAGE_COLOURS = {_TEXT: "--text", _MUTED: "--muted", _GRID: "--grid", _SURFACE: "--surface"}


def house_style(text: str, muted: str, grid: str) -> dict[Any, Any]:
    """Settings of matplotlib that all our figures share, in the given colours."""
    return {
        "font.size": 9,
        "font.family": "DejaVu Sans",
        "text.color": text,
        "axes.labelcolor": muted,
        "axes.edgecolor": grid,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.labelsize": 9,
        "grid.color": grid,
        "grid.linewidth": 0.7,
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "xtick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "svg.fonttype": "none",
    }


@dataclass(frozen=True)
class Palette:
    """The colours of a figure."""

    text: str
    muted: str
    grid: str
    surface: str
    series: tuple[str, ...]

    @property
    def style(self) -> dict[Any, Any]:
        """Settings of matplotlib."""
        return house_style(self.text, self.muted, self.grid)


_STYLE = house_style(_TEXT, _MUTED, _GRID)
_SMALLEST_MS = 1e-3


def learning_curve_svg(curve: LearningCurve, *, ident: str, size_in: tuple[float, float]) -> str:
    """Return over environment steps: evaluations with their spread, and the training episodes.

    Args:
        curve: what to draw; at least one evaluation or training point.
        ident: unique within the page; prefixes every id.
        size_in: width and height in inches, 72 units of the drawing each.
    """
    figure, axes = _figure(size_in)
    with mpl.rc_context(_STYLE):
        if curve.train_steps.size:
            axes.plot(
                curve.train_steps, curve.train_return, color=_MUTED, linewidth=1, alpha=0.75, label="training"
            )
        if curve.eval_steps.size:
            colour, steps = _series(0), curve.eval_steps
            axes.fill_between(
                steps, curve.eval_min, curve.eval_max, color=colour, alpha=0.13, linewidth=0, label="min to max"
            )
            low = np.maximum(curve.eval_mean - curve.eval_std, curve.eval_min)
            high = np.minimum(curve.eval_mean + curve.eval_std, curve.eval_max)
            axes.fill_between(steps, low, high, color=colour, alpha=0.22, linewidth=0, label="± 1 std")
            axes.plot(
                steps,
                curve.eval_mean,
                color=colour,
                linewidth=2,
                marker="o",
                markersize=3.5,
                label="evaluation",
            )
        if curve.eval1_steps.size:
            axes.plot(
                curve.eval1_steps,
                curve.eval1_mean,
                color=_series(0),
                linewidth=1,
                linestyle=(0, (4, 2)),
                label="one particle (N = 1)",
            )
        axes.set_xlabel("environment steps")
        axes.set_ylabel("episode return")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        axes.set_xlim(left=0)
        _legend_above(figure, axes, columns=5 if size_in[0] > 5 else 2)
    last = f", last evaluation {curve.eval_mean[-1]:.1f}" if curve.eval_mean.size else ""
    return page_svg(figure, ident, f"Learning curve: episode return over {curve.last_step:,} steps{last}.")


def returns_svg(
    returns: Mapping[str, NDArray[np.float64]],
    summaries: Mapping[str, Summary],
    *,
    ident: str,
    width_in: float,
) -> str:
    """One row per policy: a dot per episode, the IQM as a tick and its 95 % interval as a bar."""
    figure, axes = _figure((width_in, 0.75 + 0.62 * len(returns)))
    with mpl.rc_context(_STYLE):
        span = _span(np.concatenate(list(returns.values())))
        for row, (label, values) in enumerate(returns.items()):
            summary, colour = summaries[label], _series(row)
            axes.scatter(
                values, row - 0.12 - _stacked(values, span), s=16, color=colour, alpha=0.55, linewidths=0
            )
            axes.plot(
                [summary.iqm_low, summary.iqm_high],
                [row + 0.16] * 2,
                color=colour,
                linewidth=5,
                alpha=0.4,
                solid_capstyle="butt",
            )
            axes.plot([summary.iqm], [row + 0.16], marker="|", markersize=11, markeredgewidth=2, color=_TEXT)
        axes.set_yticks(range(len(returns)), list(returns))
        axes.tick_params(axis="y", labelcolor=_TEXT)
        axes.set_ylim(len(returns) - 0.5, -0.62)
        axes.set_xlim(*span)
        axes.xaxis.set_major_locator(MaxNLocator(6 if width_in > 5 else 4))
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("episode return")
    described = "; ".join(
        f"{label} {s.iqm:.1f}, interval {s.iqm_low:.1f} to {s.iqm_high:.1f}" for label, s in summaries.items()
    )
    return page_svg(figure, ident, f"Return of every episode. Interquartile means: {described}.")


def latency_svg(
    stage: str, samples_ms: Mapping[str, NDArray[np.float64]], *, ident: str, size_in: tuple[float, float]
) -> str | None:
    """Histogram of one stage, one series per policy, logarithmic milliseconds.

    Policies that spend no measurable time (less than a microsecond) in the stage are left out; None if
    that leaves nobody.
    """
    series = {
        (row, label): values
        for row, (label, values) in enumerate(samples_ms.items())
        if np.percentile(values, 50) >= _SMALLEST_MS
    }
    if not series:
        return None
    figure, axes = _figure(size_in)
    with mpl.rc_context(_STYLE):
        pooled = np.concatenate([np.clip(values, _SMALLEST_MS, None) for values in series.values()])
        # The slowest of a thousand calls would leave the histogram a sliver: it is in the table.
        low, high = np.percentile(pooled, (0.1, 99.5))
        bins = np.geomspace(low * 0.9, max(high * 1.1, low * 1.6), 46)
        for (row, _), values in series.items():
            axes.hist(np.clip(values, bins[0], bins[-1]), bins=bins.tolist(), color=_series(row), alpha=0.55)
            axes.axvline(float(np.median(values)), color=_series(row), linewidth=1.4)
        axes.set_xscale("log")
        axes.set_xticks(log_ticks(bins[0], bins[-1]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_xlabel("ms")
        axes.grid(axis="x", visible=False)
    medians = "; ".join(f"{label} median {np.median(values):.3g} ms" for (_, label), values in series.items())
    return page_svg(figure, ident, f"Histogram of {stage} latency: {medians}.")


def _figure(size_in: tuple[float, float]) -> tuple[Figure, Axes]:
    # Figure without pyplot: no global state, no display, no figure that outlives the report.
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size_in, layout="constrained")
        return figure, figure.add_subplot()


def _series(row: int) -> str:
    return f"#0500{row % SERIES + 1:02x}"


PAGE = Palette(_TEXT, _MUTED, _GRID, _SURFACE, tuple(map(_series, range(SERIES))))
"""Placeholders that `page_svg` turns into the variables of a page."""


def _legend_above(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside upper left", ncols=columns, handlelength=1.4, columnspacing=1.4
        )


def _span(values: NDArray[np.float64]) -> tuple[float, float]:
    """Axis limits with a margin; wide enough to be readable where all values are (nearly) the same."""
    low, high = float(values.min()), float(values.max())
    margin = max(0.06 * (high - low), 0.02 * max(abs(low), abs(high)), 1e-3)
    return low - margin, high + margin


def _stacked(values: NDArray[np.float64], span: tuple[float, float]) -> NDArray[np.float64]:
    """Heights [E] that put values which fall on each other side by side, in the order they came."""
    columns = np.floor((values - span[0]) / (span[1] - span[0]) * 60).astype(int)
    level = np.array([np.count_nonzero(columns[:index] == column) for index, column in enumerate(columns)])
    return np.asarray(0.42 * level / max(12, level.max(initial=0) + 1))


def log_ticks(low: float, high: float) -> list[float]:
    """About five ticks of a logarithmic axis, at round numbers."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    steps: Sequence[tuple[int, ...]] = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9))  # type: ignore[assignment]
    for choice in steps:
        ticks = [factor * 10.0**decade for decade in decades for factor in choice]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: 1 + len(ticks) // 6]


def short_count(value: float) -> str:
    """25000 as 25k, 1000000 as 1M: a tick of an axis of steps."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def page_svg(figure: Figure, ident: str, description: str) -> str:
    """A figure in the colours of `PAGE` as one <svg> element of an HTML page.

    Args:
        figure: what to write.
        ident: unique within the page; prefixes every id.
        description: what a reader who does not see it is told.
    """
    buffer = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": ident}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    # Ids are unique within a page only if every figure has its own.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{ident}-\1"', text)
    text = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{ident}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{ident}-\1)", text)
    text = re.sub(r"font-family: [^;\"]+", "font-family: inherit", text)
    text = re.sub(r"font: ((?:\d+ )?[\d.]+px) [^;\"]+", r"font: \1 var(--font)", text)
    for colour, variable in _PAGE_COLOURS.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"#0500(0[1-9])", lambda match: f"var(--series-{int(match[1])})", text)
    view = re.search(r'viewBox="[^"]+"', text)
    assert view is not None, "matplotlib always writes a viewBox"
    opening = f'<svg class="plot" role="img" aria-label="{escape(description)}" {view[0]}>'
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1).strip()
