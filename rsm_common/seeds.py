"""Seeds and noise: the randomness of every sampled action, as a pure function.

The primitive is one unsigned 64-bit seed per row. A row's noise is a counter-based Philox stream that
is keyed by the row's seed alone, so the same (observation, seed) gives the same noise alone, as any row
of any batch, after a reload and on every backend.
"""

from __future__ import annotations

import operator
import os
import random
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import InvalidRequestError

DETERMINISTIC_SEED = 0x5253_4D5F_5345_4544  # "RSM_SEED" in ASCII
"""The seed of every row of a request with deterministic=True."""

# Where nobody gave a seed. Not the operating system's generator: each of its numbers is a system call, during
# which the server's worker thread takes the interpreter away from the event loop.
_fresh = random.Random()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fresh.seed)  # a child must not draw its parent's seeds

_GOLDEN_GAMMA = np.uint64(0x9E37_79B9_7F4A_7C15)
_MASK64 = (1 << 64) - 1


def expand_seed(seed: int, rows: int) -> NDArray[np.uint64]:
    """The documented sequence of `rows` seeds [rows] that a single seed stands for.

    Element 0 is the seed itself; element i > 0 is the i-th output of SplitMix64 started at the seed
    (Steele, Lea, Flood 2014), so sequences of neighbouring seeds do not overlap.
    """
    if rows == 1:  # every step of a control loop: spares ten numpy calls
        return np.array([seed & _MASK64], dtype=np.uint64)
    index = np.arange(rows, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = np.uint64(seed & _MASK64) + index * _GOLDEN_GAMMA
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
        z = z ^ (z >> np.uint64(31))
    z[:1] = np.uint64(seed & _MASK64)
    return z


def resolve_seeds(
    seed: int | NDArray[np.uint64] | list[int] | None, rows: int, *, deterministic: bool = False
) -> NDArray[np.uint64]:
    """One seed per row [rows] for any way a caller may ask.

    Args:
        seed: one per row [rows], one for all (expanded with `expand_seed`), or None to draw one.
        rows: number of observations.
        deterministic: every row gets DETERMINISTIC_SEED; contradicts a given seed.

    Raises:
        InvalidRequestError: the count is neither 1 nor `rows`, or a value is not a whole number in [0, 2**64).
    """
    if deterministic:
        if seed is not None:
            raise InvalidRequestError(
                "wanted either a seed or deterministic=True, got both; leave one of them out"
            )
        return np.full(rows, DETERMINISTIC_SEED, dtype=np.uint64)
    if seed is None:
        return expand_seed(_fresh.getrandbits(64), rows)
    if isinstance(seed, np.ndarray) and seed.dtype == np.uint64:
        given = seed.reshape(-1)
    else:
        try:
            values = [operator.index(s) for s in np.asarray(seed, dtype=object).reshape(-1)]
        # A float is refused, not truncated: it would replay another answer. Any type may be given, and each
        # raises its own errors.
        except Exception:
            shown = repr(seed)[:60] if isinstance(seed, str | float) else type(seed).__name__
            raise InvalidRequestError(
                f"wanted whole numbers from 0 to 2**64 - 1 as seeds, got {shown}; use unsigned 64-bit integers"
            ) from None
        wrong = next((value for value in values if not 0 <= value <= _MASK64), None)
        if wrong is not None:
            # Python refuses to write out integers of more than 4300 digits.
            shown = str(wrong) if wrong.bit_length() < 256 else f"an integer of {wrong.bit_length()} bits"
            raise InvalidRequestError(
                f"wanted seeds from 0 to 2**64 - 1, got {shown}; use unsigned 64-bit integers"
            )
        given = np.array(values, dtype=np.uint64)
    if np.ndim(seed) == 0:
        return expand_seed(int(given[0]), rows)
    if len(given) != rows:
        raise InvalidRequestError(
            f"wanted {rows} seeds (one per observation), got {len(given)}; "
            "send one per row, or one seed as a plain number for all rows"
        )
    return given


class _Streams(threading.local):
    """One generator per thread, rekeyed per row: a new Philox costs ten times as much, all of it entropy."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(key=0)
        self.generator = np.random.Generator(self.bits)
        self.state: Any = self.bits.state  # counter 0, empty buffers


_streams = _Streams()


def draw_noise(seeds: NDArray[np.uint64], noise_shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Standard normal noise [rows, T, N, A], float32, row i a function of seeds[i] alone.

    Row i is what `numpy.random.Generator(numpy.random.Philox(key=seeds[i]))` gives first.
    """
    noise = np.empty((len(seeds), *noise_shape), dtype=np.float32)
    streams = _streams
    key = streams.state["state"]["key"]
    for row, seed in zip(noise, seeds, strict=True):
        key[0] = seed
        streams.bits.state = streams.state
        streams.generator.standard_normal(dtype=np.float32, out=row)
    return noise
