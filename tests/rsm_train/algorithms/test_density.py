"""Check 6.3 of reweighted score matching: exact densities of a problem with a known Q."""

import density
import numpy as np
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sdac_paper", "sdac_paper_bf16", "dpmd_paper", "dpmd_kl"])
def test_the_learnt_policy_has_the_exact_density(case):
    outcome = density.CASES[case]()
    assert outcome.kl <= density.MAX_KL[outcome.algorithm]
    for learnt, exact in outcome.masses:
        assert learnt == pytest.approx(exact, abs=density.MAX_MASS_ERROR)


@pytest.mark.slow
def test_deviations_1_and_3_together_do_not():
    outcome = density.CASES["dpmd_reference"]()
    assert outcome.kl > density.MAX_KL["DPMD"]
    assert outcome.masses[0][0] > 0.9, "all of the policy is at the highest mode"


def test_grids_are_densities_and_their_operations_exact():
    mixture = density.reweighted(density.uniform(), 1.0)
    masses = density._quadrants(density.coarse(mixture))
    assert masses == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.003)
    half = density.reweighted(density.reweighted(density.uniform(), 2.0), 2.0)
    np.testing.assert_allclose(half, mixture, atol=1e-12)
    rng = np.random.default_rng(0)
    cell = rng.choice(mixture.size, 200_000, p=mixture.ravel())
    action = np.stack(np.unravel_index(cell, mixture.shape), 1) * 2 / density.FINE - 1 + 1 / density.FINE
    wide = np.clip(action + 0.2 * rng.normal(size=action.shape), -1, 1)
    counts, _, _ = np.histogram2d(wide[:, 0], wide[:, 1], bins=density.BINS, range=[[-1, 1], [-1, 1]])
    exact = density.coarse(density.widened(mixture, 0.2))
    assert exact.sum() == pytest.approx(1)
    assert np.abs(counts / counts.sum() - exact).sum() < 0.05


def test_steps_alone_cost_what_the_bounds_allow_for():
    assert 0.05 < density.floor_kl() < density.MAX_KL["SDAC"]
