"""The figure: what is drawn, in which colours, and what is said about it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from matplotlib.colors import to_hex

from rsm_eval.curves.aggregate import make_group
from rsm_eval.curves.figure import DASHES, PRINT, View, add_legend, draw, explanations, figure_bytes
from tests.rsm_eval.curves.records import seed_curve

STEPS = View("steps", "evaluation return")


def curve(label="DPMD paper", returns=((1, 5), (3, 9)), **settings):
    seeds = [seed_curve(seed, [10, 20], values, label=label, **settings) for seed, values in enumerate(returns)]
    return make_group(seeds, "steps").curve


def numbers(values):
    return np.asarray(values).tolist()


def texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_a_line_and_a_band_per_algorithm_and_a_panel_per_task():
    panels = {"A-v1": [curve(), curve("SAC paper")], "B-v1": [curve("SAC paper", returns=[(1, 2)])]}
    figure = draw(panels, STEPS)
    add_legend(figure, panels, STEPS)
    first, second = figure.axes
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["A-v1", "B-v1"]
    assert first.get_ylabel() == "evaluation return"
    assert {axes.get_xlabel() for axes in (first, second)} == {"environment steps"}
    assert (len(first.lines), len(first.collections)) == (2, 2)
    assert numbers(first.lines[0].get_ydata()) == [2, 7]
    # One seed has no band, and an algorithm has one colour on all tasks.
    assert (len(second.lines), len(second.collections)) == (1, 0)
    assert to_hex(second.lines[0].get_color()) == to_hex(first.lines[1].get_color()) == PRINT.series[1]
    assert texts(figure) == ["DPMD paper (n = 2)", "SAC paper (n = 1 to 2)"]


def test_more_lines_than_colours_differ_by_their_dashes():
    count = len(PRINT.series) + 1
    figure = draw({"A-v1": [curve(f"{number}") for number in range(count)]}, STEPS)
    lines = figure.axes[0].lines
    assert to_hex(lines[0].get_color()) == to_hex(lines[-1].get_color())
    assert lines[0].get_linestyle() != lines[-1].get_linestyle()
    assert len(set(map(str, DASHES))) == len(DASHES)


def test_the_band_is_the_interval_or_the_range():
    dpmd = curve()
    interval = dpmd.interval
    assert interval is not None
    assert View("steps", "", "interval").band_of(dpmd) is interval
    low, high = View("steps", "", "range").band_of(dpmd) or ((), ())
    assert (list(low), list(high)) == ([1, 5], [3, 9])
    assert View("steps", "", "range").band_of(curve(returns=[(1, 5)])) is None


def test_what_is_drawn_is_explained():
    plain, one = curve(), curve(returns=[(1, 5)])
    assert explanations({"A-v1": [one]}, STEPS) == {}
    wide = explanations({"A-v1": [plain]}, STEPS)
    assert wide["band"] == (
        "Band",
        "95 % interval of the mean (Student's t over seeds), cut at the edge of the panel",
    )
    assert explanations({"A-v1": [plain]}, View("steps", "", "range"))["band"][1] == "range of the seeds"
    ends = np.array([1.9, 6.9]), np.array([2.1, 7.1])
    narrow = dataclasses.replace(plain, interval=ends, beyond=(ends,), unfinished=True)
    found = explanations({"A-v1": [narrow]}, STEPS)
    assert list(found) == ["band", "beyond", "unfinished"]
    assert "cut" not in found["band"][1]


def test_a_wide_interval_does_not_flatten_the_lines():
    # t(0.975, 1) = 12.7: the interval of two seeds that differ by 100 is more than 1,200 wide.
    figure = draw({"A-v1": [curve(returns=[(0, 100), (100, 200)])]}, STEPS)
    low, high = figure.axes[0].get_ylim()
    assert low > -150
    assert high < 350


def test_unfinished_seeds_are_marked_and_those_ahead_are_drawn():
    seeds = [seed_curve(0, [10, 20], [1, 2]), seed_curve(1, [10], [3], total_steps=20)]
    figure = draw({"A-v1": [make_group(seeds, "steps").curve]}, STEPS)
    ahead, mean, mark = figure.axes[0].lines
    assert numbers(ahead.get_xdata()) == [10, 20]
    assert numbers(mean.get_ydata()) == [2]
    assert (numbers(mark.get_xdata()), mark.get_marker()) == ([10], "o")
    assert figure.axes[0].get_xlim()[1] > 20


def test_ticks_are_in_thousands_and_with_separators():
    seeds = [seed_curve(0, [250_000, 1_000_000], [-2500, 12_000])]
    axes = draw({"A-v1": [make_group(seeds, "steps").curve]}, STEPS).axes[0]
    assert axes.xaxis.get_major_formatter()(250_000) == "250k"
    assert axes.yaxis.get_major_formatter()(12_000) == "12,000"
    assert axes.yaxis.get_major_formatter()(-2500) == "−2,500"


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
@pytest.mark.parametrize("tasks", [1, 4, 5])
def test_the_same_curves_give_the_same_file(kind, start, tasks):
    panels = {f"T{number}-v1": [curve()] for number in range(tasks)}
    files = []
    for _ in range(2):
        figure = draw(panels, STEPS)
        add_legend(figure, panels, STEPS)
        files.append(figure_bytes(figure, kind))
    assert files[0].startswith(start)
    assert files[0] == files[1]
