"""The temperature alpha: the open-loop entropy schedule of the published runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Literal

TemperatureSchedule = Literal["constant", "entropy", "kl"]

# The entropy schedule's setting in the published runs.
ENTROPY_SCALE = 0.1  # the "policy" is taken to be N(., (0.1 alpha)^2 I)
ENTROPY_LEARNING_RATE = 7e-3
ENTROPY_UPDATE_EVERY = 250
_ADAM_BETA1, _ADAM_BETA2, _ADAM_EPS = 0.9, 0.999, 1e-8


def entropy_log_temperatures(
    *, initial: float, target_entropy_per_dim: float, learning_rate: float = ENTROPY_LEARNING_RATE
) -> Iterator[float]:
    """log alpha after 0, 1, 2, ... Adam steps on L = -log alpha * (-H(alpha) + H_target).

    H = d/2 log(2 pi e (0.1 alpha)^2) and H_target = d * target_entropy_per_dim are both proportional to
    the action dimension d, and Adam does not see a constant factor: the temperature is a function of the
    step alone, the same for every task.
    """
    log_alpha = math.log(initial)
    m = v = 0.0
    for step in itertools.count(1):
        yield log_alpha
        entropy = 0.5 * math.log(2 * math.pi * math.e) + math.log(ENTROPY_SCALE) + log_alpha
        gradient = entropy - target_entropy_per_dim
        m = _ADAM_BETA1 * m + (1 - _ADAM_BETA1) * gradient
        v = _ADAM_BETA2 * v + (1 - _ADAM_BETA2) * gradient * gradient
        m_hat = m / (1 - _ADAM_BETA1**step)
        v_hat = v / (1 - _ADAM_BETA2**step)
        log_alpha -= learning_rate * m_hat / (math.sqrt(v_hat) + _ADAM_EPS)


class OpenLoopTemperature:
    """log alpha as a function of the number of updates done."""

    def __init__(self, initial: float, target_entropy_per_dim: float) -> None:
        self._values = entropy_log_temperatures(initial=initial, target_entropy_per_dim=target_entropy_per_dim)
        self._seen: list[float] = []

    def log_at(self, updates: int) -> float:
        """log alpha after `updates` critic updates."""
        adam_steps = updates // ENTROPY_UPDATE_EVERY
        self._seen.extend(itertools.islice(self._values, max(0, adam_steps + 1 - len(self._seen))))
        return self._seen[adam_steps]


def open_loop_temperature(
    schedule: TemperatureSchedule, initial: float, target_entropy_per_dim: float
) -> OpenLoopTemperature | None:
    """The entropy schedule; None for a temperature that is constant or moved by the algorithm."""
    return OpenLoopTemperature(initial, target_entropy_per_dim) if schedule == "entropy" else None
