"""Actions for the status page, sampled through the queue that robots use."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsm_common.errors import InvalidRequestError, NotReadyError, QueueFullError
from rsm_common.policy import ActRows, act_rows
from rsm_common.seeds import expand_seed
from rsm_serve.engine.lane import Lane

MAX_SAMPLES = 512
"""Actions of one call of /api/sample."""
SAMPLE_CHUNK = 8
"""Rows of a sample that are computed together. A robot's request waits for no more than these."""
SAMPLE_S = 10.0
"""Time for a whole sample."""


class Sampler:
    """Draws one sample at a time; belongs to one event loop."""

    def __init__(self) -> None:
        self._sampling = asyncio.Lock()

    async def sample(self, lane: Lane, query: Mapping[str, str]) -> dict[str, Any]:
        """Draw actions for one observation, as data for JSON.

        Args:
            lane: the policy.
            query: "obs" (see `parse_observation`), "n" (1 to `MAX_SAMPLES` actions) and "seed"; none is needed.

        Raises:
            InvalidRequestError: a field is not valid.
            QueueFullError: another sample is being drawn.
            NotReadyError: the actions were not there within `SAMPLE_S`.
        """
        obs_O = parse_observation(query.get("obs", "zeros"), lane)
        count = _whole_number(query, "n", 256, 1, MAX_SAMPLES)
        seed = _whole_number(query, "seed", 0, 0, 2**64 - 1)
        if self._sampling.locked():
            raise QueueFullError("wanted one sample at a time, and one is being drawn; try again in a moment")
        async with self._sampling:
            try:
                action_BA, q_B = await asyncio.wait_for(_draw(lane, obs_O, expand_seed(seed, count)), SAMPLE_S)
            except asyncio.TimeoutError:
                raise NotReadyError(
                    f"wanted {count} actions within {SAMPLE_S:g} s, got fewer; ask for fewer, or later"
                ) from None
        return {
            "policy": lane.spec.name,
            "version": lane.spec.version,
            "seed": str(seed),  # a number of JavaScript does not hold 64 bits
            "obs": _rounded(obs_O),
            "action": _rounded(action_BA),
            "q": None if q_B is None else _rounded(q_B),
        }


async def _draw(
    lane: Lane, obs_O: NDArray[np.float32], seeds_B: NDArray[np.uint64]
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """(action [B, A], q [B]), through the queue that robots use, a few rows at a time."""
    step = min(SAMPLE_CHUNK, lane.limits.max_batch_size)
    actions, values = [], []
    for start in range(0, len(seeds_B), step):
        seeds = seeds_B[start : start + step]
        rows = ActRows(np.repeat(obs_O[None], len(seeds), axis=0), seeds, None, single=False)
        result = (await lane.sample(rows, SAMPLE_S)).answer
        actions.append(result.action)
        if result.q is not None:
            values.append(result.q)
    return np.concatenate(actions), np.concatenate(values) if values else None


def parse_observation(text: str, lane: Lane) -> NDArray[np.float32]:
    """[O] of "zeros", "probe:K" (K from 0) or numbers separated by commas or blanks.

    Raises:
        InvalidRequestError: something else, or another count of numbers than the policy takes.
    """
    text = text.strip()
    if text in ("", "zeros"):
        return np.zeros(lane.spec.observation.size, np.float32)
    if text.startswith("probe:"):
        row = text.removeprefix("probe:")
        if not (row.isascii() and row.isdecimal() and len(row) < 9 and int(row) < len(lane.probe_obs)):
            raise InvalidRequestError(
                f"wanted probe:K with K below {len(lane.probe_obs)}, got another one; the bundle holds no more"
            )
        return _checked(lane, lane.probe_obs[int(row)])
    try:
        numbers = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise InvalidRequestError(
            "wanted numbers with commas between them, zeros, or probe:0, got something else"
        ) from None
    return _checked(lane, numbers)


def _checked(lane: Lane, obs: ArrayLike) -> NDArray[np.float32]:
    obs_O: NDArray[np.float32] = act_rows(lane.spec, obs, seed=0).obs_BO[0]
    return obs_O


def _whole_number(query: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = query.get(name) or str(default)
    if not (text.isascii() and text.isdecimal() and len(text) <= 20 and low <= int(text) <= high):
        raise InvalidRequestError(f"wanted {name} as a whole number from {low} to {high}, got {text!r:.40}")
    return int(text)


def _rounded(array: NDArray[np.float32]) -> list[Any]:
    """Finite numbers with the digits that the largest of them has as a float32."""
    digits = 7 - math.ceil(math.log10(max(1.0, float(np.abs(array).max(initial=1.0)))))
    numbers: list[Any] = array.astype(np.float64).round(digits).tolist()
    return numbers
