"""Statistics against hand-computed values."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from rsm_common.errors import ConfigError
from rsm_eval.statistics import interquartile_mean, mean_interval, summarise


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_hand_computed_values():
    summary = summarise([[8.0, 1.0, 3.0, 4.0], [6.0, 2.0, 100.0, 5.0]])
    assert summary.episodes == 8
    assert summary.mean == pytest.approx(129 / 8)
    # Squared deviations from 16.125 add up to 8074.875; one degree of freedom goes to the mean.
    assert summary.std == pytest.approx(np.sqrt(8074.875 / 7))
    # A quarter of eight is two: 1, 2 and 8, 100 are cut off.
    assert summary.iqm == pytest.approx((3 + 4 + 5 + 6) / 4)
    assert (summary.minimum, summary.maximum) == (1.0, 100.0)


def test_a_quarter_is_rounded_down():
    assert interquartile_mean([0.0, 1.0, 2.0]) == pytest.approx(1.0)
    assert interquartile_mean([0.0, 1.0, 2.0, 30.0, 40.0]) == pytest.approx(11.0)


def test_the_interval_holds_the_iqm_and_repeats():
    returns = np.random.default_rng(3).normal(100, 10, 40)
    summary = summarise([returns])
    assert summary.iqm_low < summary.iqm < summary.iqm_high
    # The IQM of a normal sample has a standard error of about 1.1 std / sqrt(n).
    assert summary.iqm_high - summary.iqm_low == pytest.approx(2 * 1.96 * 1.1 * 10 / np.sqrt(40), rel=0.35)
    assert summarise([returns]) == summary


def test_resampling_stays_within_a_seed():
    # Between the strata all the difference, within each none: nothing is left to resample.
    stratified = summarise([[0.0] * 8, [10.0] * 8])
    assert stratified.iqm_low == stratified.iqm == stratified.iqm_high == 5.0
    pooled = summarise([[0.0] * 8 + [10.0] * 8])
    assert pooled.iqm_low < 5.0 < pooled.iqm_high


def test_one_episode_per_seed_is_resampled_across_seeds():
    summary = summarise([[1.0], [2.0], [3.0], [10.0]])
    assert summary.iqm_low < summary.iqm < summary.iqm_high


@pytest.mark.parametrize("returns", [[[7.5]], [[7.5] * 20], [[7.5, 7.5], [7.5]]])
def test_nothing_varies(returns):
    summary = summarise(returns)
    assert (summary.mean, summary.std, summary.iqm) == (7.5, 0.0, 7.5)
    assert (summary.iqm_low, summary.iqm_high) == (7.5, 7.5)


@pytest.mark.parametrize("returns", [[], [[]], [[1.0, np.nan]], [[np.inf]]])
def test_no_or_broken_returns_are_refused(returns):
    with pytest.raises(ConfigError, match="wanted"):
        summarise(returns)


def test_the_interval_of_a_mean_is_students():
    # t(0.975, 4) = 2.776 and the standard error of 1..5 is sqrt(2.5 / 5).
    interval = mean_interval([1, 2, 3, 4, 5])
    assert interval is not None
    assert interval.mean == 3.0
    assert interval.low == pytest.approx(3 - 2.7764 * 0.70711, abs=1e-3)
    assert interval.high == pytest.approx(3 + 2.7764 * 0.70711, abs=1e-3)
    equal = mean_interval([4.0, 4.0])
    assert equal is not None
    assert (equal.low, equal.high) == (4.0, 4.0)
    assert mean_interval([1.0]) is None
    assert mean_interval([]) is None
