"""Means over seeds, checked by hand."""

from __future__ import annotations

import pytest

from rsm_common.errors import UsageError
from rsm_eval.curves.aggregate import aggregate, make_group, notes
from tests.rsm_eval.curves.records import seed_curve


def test_seeds_of_the_same_steps_are_averaged_point_by_point():
    group = make_group([seed_curve(0, [10, 20], [1, 5]), seed_curve(1, [10, 20], [3, 9])], "steps")
    curve = group.curve
    assert curve.x.tolist() == [10, 20]
    assert curve.mean.tolist() == [2, 7]
    assert (curve.least.tolist(), curve.most.tolist()) == ([1, 5], [3, 9])
    assert curve.seeds == 2
    assert curve.beyond == ()
    assert not group.interpolated
    assert notes({"Ant-v5": [group]}) == []


def test_the_interval_is_students_at_every_point():
    seeds = [seed_curve(seed, [10, 20], [value, 7]) for seed, value in enumerate([1, 2, 3, 4, 5])]
    interval = make_group(seeds, "steps").curve.interval
    assert interval is not None
    low, high = interval
    # t(0.975, 4) = 2.776, and the standard error of 1..5 is sqrt(2.5 / 5).
    assert low.tolist() == [pytest.approx(3 - 2.7764 * 0.70711, abs=1e-3), 7]
    assert high.tolist() == [pytest.approx(3 + 2.7764 * 0.70711, abs=1e-3), 7]


def test_one_seed_has_no_interval():
    group = make_group([seed_curve(0, [10, 20], [1, 5])], "steps")
    assert group.curve.interval is None
    assert group.final.interval is None


def test_seeds_of_other_steps_are_interpolated_where_all_have_been():
    # The second seed is at 0 from 5 on, and at 40 at 25: 10 at step 10, 30 at step 20.
    group = make_group([seed_curve(0, [10, 20, 30], [2, 4, 6]), seed_curve(1, [5, 25], [0, 40])], "steps")
    assert group.curve.x.tolist() == [10, 20, 25]
    assert group.curve.mean.tolist() == [(2 + 10) / 2, (4 + 30) / 2, (5 + 40) / 2]
    assert group.final.step == 25
    assert group.final.returns.tolist() == [5, 40]
    assert group.interpolated
    assert "points at different steps" in notes({"Ant-v5": [group]})[-1]


def test_what_seeds_have_beyond_the_others_is_kept_apart():
    seeds = [seed_curve(0, [10, 20, 30, 40], [1, 2, 3, 900]), seed_curve(1, [10, 20], [5, 6])]
    group = make_group(seeds, "steps")
    assert group.curve.x.tolist() == [10, 20]
    ((x, y),) = group.curve.beyond
    assert (x.tolist(), y.tolist()) == ([20, 30, 40], [2, 3, 900])
    # The final and the best are of the steps that all have reached.
    assert group.final.mean == 4
    assert group.final.best.tolist() == [2, 6]
    assert [seed.seed for seed in group.behind] == [1]


def test_the_final_is_the_last_and_not_the_largest():
    final = make_group([seed_curve(0, [10, 20, 30], [1, 50, 4])], "steps").final
    assert (final.step, final.mean, final.best.tolist()) == (30, 4, [50])


def test_unfinished_seeds_are_told():
    seeds = [
        seed_curve(0, [10, 20], [1, 2], total_steps=20),
        seed_curve(1, [10, 20], [1, 2], total_steps=1000),
        seed_curve(2, [10], [1], total_steps=20),
    ]
    group = make_group(seeds, "steps")
    assert group.curve.unfinished
    assert [seed.seed for seed in group.unfinished] == [1, 2]
    (note,) = notes({"Ant-v5": [group]})
    assert note == (
        "DPMD paper on Ant-v5: 2 of 3 seeds are unfinished (seed 1 at 20 of 1,000, seed 2 at 10 of 20); "
        "1 of 3 seeds is behind the furthest, which is at step 20, so the final return is that at step 10."
    )
    assert not make_group(seeds[:1], "steps").curve.unfinished


def test_minutes_put_the_same_returns_on_another_axis():
    seeds = [
        seed_curve(0, [10, 20, 30], [0, 10, 20], minutes=[1, 2, 3]),
        seed_curve(1, [10, 20, 30], [0, 10, 20], minutes=[2, 4, 6]),
    ]
    group = make_group(seeds, "minutes")
    assert group.curve.x.tolist() == [2, 3]
    assert group.curve.mean.tolist() == [(10 + 0) / 2, (20 + 5) / 2]
    ((x, y),) = group.curve.beyond
    assert (x.tolist(), y.tolist()) == ([3, 4, 6], [5, 10, 20])
    # The final return is that of the last step, on both axes.
    assert (group.final.step, group.final.mean, group.final.minutes) == (30, 20, 4.5)
    assert not group.interpolated
    assert make_group([seeds[0]], "steps").final.minutes == 3


def test_the_minutes_of_a_group_are_unknown_if_those_of_a_seed_are():
    seeds = [seed_curve(0, [10], [1], minutes=[1]), seed_curve(1, [10], [1])]
    assert make_group(seeds, "steps").final.minutes is None
    with pytest.raises(UsageError, match=r"without them in 'runs/s1'; add them"):
        make_group(seeds, "minutes")


def test_seeds_that_have_no_range_in_common_are_refused():
    seeds = [seed_curve(0, [10, 20], [1, 2]), seed_curve(1, [30, 40], [1, 2])]
    with pytest.raises(UsageError, match="got seed 1 from 30 on and seed 0 up to 20; leave one of them out"):
        make_group(seeds, "steps")


def test_groups_are_of_one_task_and_label_in_the_given_order():
    curves = [
        seed_curve(1, [10], [1], task="B-v1"),
        seed_curve(0, [10], [1], task="B-v1"),
        seed_curve(0, [10], [1], task="A-v1", label="SAC paper"),
        seed_curve(0, [10], [1], task="B-v1", label="SAC paper"),
    ]
    found = {
        task: [(group.label, [seed.seed for seed in group.seeds]) for group in groups]
        for task, groups in aggregate(curves, "steps").items()
    }
    assert found == {
        "B-v1": [("DPMD paper", [0, 1]), ("SAC paper", [0])],
        "A-v1": [("SAC paper", [0])],
    }
    assert list(found) == ["B-v1", "A-v1"]
