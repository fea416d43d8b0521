"""Learning curves as a figure: one panel per task, one line with a band per algorithm."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from rsm_eval.curves.aggregate import Against, Band, MeanCurve, Pair
from rsm_eval.plots import PAGE, Palette, page_svg, short_count

PRINT = Palette(
    text="#1c2330",
    muted="#4d5562",
    grid="#e3e6ea",
    surface="#ffffff",
    # Okabe and Ito's colours, which colour-blind readers tell apart, without those too pale for a line.
    series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
)
"""The colours of a figure on paper."""
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
"""Lines of one colour differ by these."""
BAND_TEXTS: Mapping[Band, str] = {
    "interval": "95 % interval of the mean (Student's t over seeds)",
    "range": "range of the seeds",
}
_AXIS_TITLES: Mapping[Against, str] = {"steps": "environment steps", "minutes": "wall clock (minutes)"}
FEW_POINTS = 5
"""Fewer are marked: a line of one point is none."""

_PANEL_IN, _ONE_PANEL_IN = (3.4, 2.6), (5.4, 3.7)
_MOST_COLUMNS = 3
_LEGEND_CHARACTERS_PER_IN, _CAPTION_CHARACTERS_PER_IN = 14, 17
_KEY_CHARACTERS = 7
"""Room of the line beside a label of the legend, and of the gap after it."""
_LEGEND_ROW_IN, _CAPTION_ROW_IN, _CAPTION_POINTS = 0.19, 0.14, 7.5
_SEEDS_SHARE = 0.2
"""How far the bands may widen a panel beyond the seeds, as a share of the range of the seeds."""
_DPI = 220


@dataclass(frozen=True)
class View:
    """What the axes and the bands of all panels are."""

    against: Against
    """What the x of the lines is."""
    y_title: str
    band: Band = "interval"

    @property
    def x_title(self) -> str:
        """Title of the x axis, with its unit."""
        return _AXIS_TITLES[self.against]

    def band_of(self, curve: MeanCurve) -> Pair | None:
        """The lower and the upper end of a curve's band; None for one seed."""
        return curve.interval if self.band == "interval" or curve.seeds < 2 else (curve.least, curve.most)


def order(panels: Mapping[str, Sequence[MeanCurve]]) -> dict[str, int]:
    """The place of each label, which decides its colour on all panels: in the order of their first line."""
    labels = dict.fromkeys(curve.label for curves in panels.values() for curve in curves)
    return {label: place for place, label in enumerate(labels)}


def draw(panels: Mapping[str, Sequence[MeanCurve]], view: View, palette: Palette = PRINT) -> Figure:
    """All panels with their axes, without a legend; `add_legend` adds it.

    Args:
        panels: the lines of each task, one at least.
        view: what the axes and the bands are.
        palette: colours.
    """
    columns = min(len(panels), 2 if len(panels) == 4 else _MOST_COLUMNS)
    rows = math.ceil(len(panels) / columns)
    width, height = _ONE_PANEL_IN if len(panels) == 1 else _PANEL_IN
    places = order(panels)
    with mpl.rc_context(palette.style):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (task, curves) in zip(grid.flat, panels.items(), strict=False):
            axes.set_title(task, loc="left", fontsize=10, color=palette.text)
            draw_panel(axes, curves, places, view, palette)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes in grid[:, 0]:
            axes.set_ylabel(view.y_title)
        for place, axes in enumerate(grid.flat[: len(panels)]):
            if place + columns >= len(panels):  # nothing below it
                axes.set_xlabel(view.x_title)
    return figure


def draw_panel(
    axes: Axes, curves: Sequence[MeanCurve], places: Mapping[str, int], view: View, palette: Palette
) -> None:
    """The lines and bands of one task."""
    for curve in curves:
        colour, dashes = _look(places[curve.label], palette)
        if (band := view.band_of(curve)) is not None:
            axes.fill_between(curve.x, *band, color=colour, alpha=0.17, linewidth=0)
        for x, y in curve.beyond:
            axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.6, linestyle=dashes)
        axes.plot(
            curve.x,
            curve.mean,
            color=colour,
            linestyle=dashes,
            linewidth=1.8,
            marker="." if len(curve.x) < FEW_POINTS else "none",
        )
        if curve.unfinished:
            axes.plot(curve.x[-1:], curve.mean[-1:], markerfacecolor=palette.surface, **_open(colour))
    axes.set_xlim(0, 1.02 * (max(x for curve in curves for x in _ends(curve)) or 1.0))
    axes.set_ylim(*_limits(curves, view))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=view.against == "steps"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: short_count(value) if view.against == "steps" else f"{value:,.10g}")
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}".replace("-", "−")))


def add_legend(
    figure: Figure,
    panels: Mapping[str, Sequence[MeanCurve]],
    view: View,
    others: Mapping[str, Line2D] | None = None,
    palette: Palette = PRINT,
) -> None:
    """A legend above all panels, with the number of seeds, and below them what bands and marks mean.

    The figure grows by what they take.

    Args:
        figure: what `draw` returned.
        panels: the same as there.
        view: the same as there.
        others: further lines by their label.
        palette: colours.
    """
    handles: dict[str, Any] = {}
    for label, place in order(panels).items():
        colour, dashes = _look(place, palette)
        counts = [curve.seeds for curves in panels.values() for curve in curves if curve.label == label]
        text = f"{label} ({seeds_text(counts)})"
        handles[text] = Line2D([], [], color=colour, linestyle=dashes, linewidth=1.8)
    handles |= others or {}
    width, height = figure.get_size_inches()
    fitting = int(width * _LEGEND_CHARACTERS_PER_IN / (max(map(len, handles)) + _KEY_CHARACTERS))
    columns = max(1, min(fitting, len(handles)))
    marks = {"line": ("Line", "mean over n seeds"), **explanations(panels, view)}
    sentence = " ".join(f"{mark}: {text}." for mark, text in marks.values())
    caption = textwrap.wrap(sentence, int(width * _CAPTION_CHARACTERS_PER_IN))
    with mpl.rc_context(palette.style):
        figure.legend(
            handles.values(),
            handles,
            loc="outside upper center",
            ncols=columns,
            handlelength=2.2,
            columnspacing=1.6,
            labelcolor=palette.text,
        )
        figure.supxlabel("\n".join(caption), fontsize=_CAPTION_POINTS, color=palette.muted)
    rows = math.ceil(len(handles) / columns)
    figure.set_size_inches(width, height + _LEGEND_ROW_IN * rows + _CAPTION_ROW_IN * len(caption))


def explanations(panels: Mapping[str, Sequence[MeanCurve]], view: View) -> dict[str, tuple[str, str]]:
    """What is drawn beside the lines, by kind ("band", "beyond", "unfinished"): its name, and what it is."""
    curves = [curve for several in panels.values() for curve in several]
    found = {}
    if any(curve.seeds > 1 for curve in curves):
        cut = any(_is_cut(several, view) for several in panels.values())
        more = ", cut at the edge of the panel" if cut else ""
        found["band"] = ("Band", BAND_TEXTS[view.band] + more)
    if any(curve.beyond for curve in curves):
        found["beyond"] = ("Thin lines", "single seeds, beyond the range that all have reached")
    if any(curve.unfinished for curve in curves):
        found["unfinished"] = ("Open circle", "end of a mean with unfinished seeds")
    return found


def seeds_text(counts: Sequence[int]) -> str:
    """ "n = 5", or "n = 3 to 5" where it is not the same on all tasks."""
    least, most = min(counts), max(counts)
    return f"n = {least}" if least == most else f"n = {least} to {most}"


def figure_bytes(figure: Figure, kind: str, palette: Palette = PRINT) -> bytes:
    """The figure as a file.

    Args:
        figure: what `draw` returned.
        kind: "png", "pdf" or "svg".
        palette: colours.
    """
    buffer = io.BytesIO()
    # Text of a PDF as fonts, which journals ask for, and no date: the same runs give the same file.
    style = {**palette.style, "pdf.fonttype": 42, "svg.hashsalt": "rsm-eval"}
    metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    with mpl.rc_context(style):
        figure.savefig(buffer, format=kind, dpi=_DPI, facecolor=palette.surface, metadata=metadata)
    return buffer.getvalue()


def panel_svg(
    task: str, curves: Sequence[MeanCurve], places: Mapping[str, int], view: View, *, ident: str
) -> str:
    """One panel as an <svg> element in the colours of a page.

    Args:
        task: the panel's.
        curves: its lines.
        places: see `order`.
        view: what the axes and the bands are.
        ident: unique within the page.
    """
    with mpl.rc_context(PAGE.style):
        figure = Figure(figsize=(4.6, 3.3), layout="constrained")
        axes = figure.subplots()
        draw_panel(axes, curves, places, view, PAGE)
        axes.set_xlabel(view.x_title)
        axes.set_ylabel(view.y_title)
    ends = "; ".join(f"{curve.label} {curve.mean[-1]:,.1f}" for curve in curves)
    return page_svg(figure, ident, f"{task}: {view.y_title} over {view.x_title}. Means at the end: {ends}.")


def _look(place: int, palette: Palette) -> tuple[str, Any]:
    """Colour and dashes of a line."""
    colours = len(palette.series)
    return palette.series[place % colours], DASHES[place // colours % len(DASHES)]


def _open(colour: str) -> dict[str, Any]:
    return {
        "marker": "o",
        "markersize": 6,
        "markeredgecolor": colour,
        "markeredgewidth": 1.5,
        "linestyle": "none",
    }


def _ends(curve: MeanCurve) -> list[float]:
    return [float(x[-1]) for x in (curve.x, *(line[0] for line in curve.beyond))]


def _limits(curves: Sequence[MeanCurve], view: View) -> tuple[float, float]:
    """Limits of y by the seeds; a band may widen them, but not so much that the lines become flat."""
    parts = [part for c in curves for part in (c.least, c.most, *(y for _, y in c.beyond))]
    seeds = np.concatenate(parts)
    low, high = float(seeds.min()), float(seeds.max())
    room = _SEEDS_SHARE * (high - low)
    wide = np.concatenate([seeds, *_ends_of_bands(curves, view)])
    low, high = max(low - room, float(wide.min())), min(high + room, float(wide.max()))
    margin = max(0.05 * (high - low), 0.02 * max(abs(low), abs(high)), 1e-3)
    return low - margin, high + margin


def _is_cut(curves: Sequence[MeanCurve], view: View) -> bool:
    """Whether a band leaves the panel."""
    low, high = _limits(curves, view)
    return any(end.min() < low or end.max() > high for end in _ends_of_bands(curves, view))


def _ends_of_bands(curves: Sequence[MeanCurve], view: View) -> list[NDArray[np.float64]]:
    bands = [view.band_of(curve) for curve in curves]
    return [end for band in bands if band is not None for end in band]
