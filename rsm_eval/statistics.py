"""Statistics of episode returns: mean, standard deviation, interquartile mean and its interval.

The interquartile mean (IQM) and its percentile bootstrap interval follow Agarwal et al. 2021, "Deep
Reinforcement Learning at the Edge of the Statistical Precipice": the mean of the middle half, which
neither one lucky nor one failed episode can move. Resampling is stratified by evaluation seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rsm_common.errors import ConfigError

RESAMPLES = 10_000
CONFIDENCE = 0.95
BOOTSTRAP_SEED = 20_210_830
"""Fixed, so that the same returns always give the same interval."""

_BATCH_VALUES = 1_000_000
"""Most numbers that the bootstrap holds at a time."""


@dataclass(frozen=True)
class Summary:
    """Statistics of E episode returns, in units of reward."""

    episodes: int
    mean: float
    std: float
    """Of the sample, with E - 1 in the denominator; 0 for one episode."""
    iqm: float
    iqm_low: float
    """Lower end of the 95 % bootstrap interval of the IQM; equal to `iqm` where nothing varies."""
    iqm_high: float
    """Upper end of it."""
    minimum: float
    maximum: float


@dataclass(frozen=True)
class MeanInterval:
    """A mean and its 95 % interval by Student's t, in units of the values."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class MeanIntervals:
    """The mean of each of G columns and its 95 % interval by Student's t, in units of the values."""

    mean: NDArray[np.float64]
    """[G]"""
    low: NDArray[np.float64]
    """[G]"""
    high: NDArray[np.float64]
    """[G]"""


def mean_interval(values: ArrayLike) -> MeanInterval | None:
    """Of independent values such as one per training seed, of which there are too few to resample.

    None for fewer than two values, whose spread is unknown.
    """
    of_column = mean_intervals(np.asarray(values, dtype=np.float64).reshape(-1, 1))
    if of_column is None:
        return None
    return MeanInterval(float(of_column.mean[0]), float(of_column.low[0]), float(of_column.high[0]))


def mean_intervals(values_SG: ArrayLike) -> MeanIntervals | None:
    """Of each column of an array [S, G] whose rows are independent, such as one per training seed.

    A bootstrap would not do: its interval never leaves the range of the values. The range of three values
    misses the centre of a symmetric distribution in 1 of 4 cases, that of five in 1 of 16.

    None for fewer than two rows, whose spread is unknown.
    """
    sample = np.asarray(values_SG, dtype=np.float64)
    if len(sample) < 2:
        return None
    mean, error = sample.mean(axis=0), stats.sem(sample, axis=0)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(sample) - 1)) * error
    return MeanIntervals(mean, mean - half, mean + half)


def interquartile_mean(values: ArrayLike, axis: int = -1) -> NDArray[np.float64]:
    """Mean of what is left when the lowest and the highest quarter (rounded down) are cut off."""
    return np.asarray(stats.trim_mean(values, 0.25, axis=axis))


def summarise(returns_by_seed: Sequence[ArrayLike]) -> Summary:
    """Statistics of the returns of one policy.

    Args:
        returns_by_seed: one array [episodes] per evaluation seed; the strata of the bootstrap.

    Raises:
        ConfigError: no episode at all, or a return that is NaN or infinite.
    """
    strata = [np.asarray(values, dtype=np.float64).reshape(-1) for values in returns_by_seed]
    strata = [stratum for stratum in strata if stratum.size]
    if not strata:
        raise ConfigError("wanted the returns of at least one episode, got none")
    values = np.concatenate(strata)
    if not np.isfinite(values).all():
        raise ConfigError("wanted finite episode returns, got NaN or Inf; check the environment's reward")
    low, high = _iqm_interval(strata)
    return Summary(
        episodes=values.size,
        mean=float(values.mean()),
        std=float(values.std(ddof=1)) if values.size > 1 else 0.0,
        iqm=float(interquartile_mean(values)),
        iqm_low=low,
        iqm_high=high,
        minimum=float(values.min()),
        maximum=float(values.max()),
    )


def _iqm_interval(strata: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    values = np.concatenate(strata)
    # A stratum of one episode resamples to itself, and the interval would be a lie: pool them.
    if any(stratum.size < 2 for stratum in strata):
        strata = [values]
    if values.size < 2:
        iqm = float(interquartile_mean(values))
        return iqm, iqm

    def statistic(*samples: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        return interquartile_mean(np.concatenate(samples, axis=axis), axis=axis)

    interval = stats.bootstrap(
        strata,
        statistic,
        n_resamples=RESAMPLES,
        batch=max(1, _BATCH_VALUES // values.size),
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(BOOTSTRAP_SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)
