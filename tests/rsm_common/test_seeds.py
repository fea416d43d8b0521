"""Seeds: golden values that must never change, and independence of the batch."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsm_common.seeds import DETERMINISTIC_SEED, draw_noise, expand_seed, resolve_seeds

SHAPE = (2, 1, 2)
GOLDEN_NOISE = {
    0: [0.059911035001277924, 0.015559634193778038, -1.1644384860992432, -0.13264712691307068],
    42: [0.18170474469661713, -1.2426393032073975, -0.5515530109405518, 0.3664800226688385],
    2**64 - 1: [-1.744478702545166, -0.48715826869010925, 1.5449836254119873, -0.9327644109725952],
}


def test_the_noise_of_a_seed_never_changes():
    noise = draw_noise(np.array(list(GOLDEN_NOISE), np.uint64), SHAPE)
    assert noise.dtype == np.float32
    assert noise.reshape(3, 4).tolist() == list(GOLDEN_NOISE.values())


def test_the_noise_is_the_documented_numpy_stream():
    for seed, expected in GOLDEN_NOISE.items():
        generator = np.random.Generator(np.random.Philox(key=seed))
        assert generator.standard_normal(SHAPE, dtype=np.float32).reshape(-1).tolist() == expected


def test_the_sequence_of_a_seed_never_changes():
    assert expand_seed(5, 3).tolist() == [5, 0x63033B0CA389C35A, 0xC097314D939736F8]
    # Published outputs of SplitMix64 from state 0.
    assert expand_seed(0, 3).tolist() == [0, 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert DETERMINISTIC_SEED == 0x52534D5F53454544


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=70))
def test_a_row_does_not_depend_on_its_batch(seeds):
    together = draw_noise(np.array(seeds, np.uint64), (3, 2, 1))
    for row, seed in zip(together, seeds, strict=True):
        assert np.array_equal(row, draw_noise(np.array([seed], np.uint64), (3, 2, 1))[0])


def test_threads_do_not_disturb_each_other():
    seeds = np.arange(200, dtype=np.uint64)
    expected = draw_noise(seeds, (5, 4, 3))
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(draw_noise(seeds, (5, 4, 3)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(np.array_equal(result, expected) for result in results)


def test_the_noise_is_standard_normal():
    noise = draw_noise(expand_seed(1, 2000), (5, 2, 2))
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    # Rows of one request are independent of each other.
    correlation = np.corrcoef(noise[:-1].reshape(-1), noise[1:].reshape(-1))[0, 1]
    assert abs(correlation) < 0.02


@pytest.mark.parametrize("seed", [7, np.uint64(7), [7, 8, 9], np.array([7, 8, 9], np.uint64)])
def test_every_way_of_giving_seeds_starts_with_the_given_one(seed):
    resolved = resolve_seeds(seed, 3)
    assert resolved.dtype == np.uint64
    assert resolved[0] == 7
    expected = [7, 8, 9] if np.ndim(seed) else expand_seed(7, 3).tolist()
    assert resolved.tolist() == expected


def test_without_a_seed_every_call_draws_another():
    assert resolve_seeds(None, 1)[0] != resolve_seeds(None, 1)[0]
    assert resolve_seeds(None, 2, deterministic=True).tolist() == [DETERMINISTIC_SEED] * 2
