"""Distributions over atoms: what projection keeps, and what it does at the ends."""

from __future__ import annotations

import pytest
import torch

from rsm_train.model.categorical import make_atoms, project

ATOMS = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])


def spread(rows: int, count: int, low: float, high: float, seed: int = 0):
    """Places in any order, and masses that sum to 1."""
    g = torch.Generator().manual_seed(seed)
    places = low + (high - low) * torch.rand(rows, count, generator=g, dtype=torch.float64)
    return places, torch.softmax(3 * torch.randn(rows, count, generator=g, dtype=torch.float64), 1)


def test_atoms_are_evenly_spaced_and_reach_both_limits():
    assert make_atoms(5, 2.0).tolist() == ATOMS.tolist()
    assert make_atoms(2, 0.5).tolist() == [-0.5, 0.5]
    wide = make_atoms(101, 5.0)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.diff(), torch.full((100,), 0.1))


def test_projection_by_hand():
    values = torch.tensor([[0.25, 1.0, -1.5, 2.0, -2.0]])
    weight = torch.tensor([[0.4, 0.1, 0.2, 0.1, 0.2]])
    # 0.25 gives a quarter to 1; -1.5 a half to each neighbour; values on an atom stay there.
    wanted = torch.tensor([[0.2 + 0.1, 0.1, 0.3, 0.1 + 0.1, 0.1]])
    torch.testing.assert_close(project(ATOMS, values, weight), wanted)


def test_a_mass_beyond_an_end_goes_to_the_end():
    values = torch.tensor([[7.0, 2.0001, -3.0, 1e30, -1e30]])
    weight = torch.tensor([[0.1, 0.2, 0.3, 0.25, 0.15]])
    torch.testing.assert_close(
        project(ATOMS, values, weight), torch.tensor([[0.45, 0.0, 0.0, 0.0, 0.55]]), atol=1e-7, rtol=0
    )


@pytest.mark.parametrize("count", [2, 3, 51, 101])
def test_mass_is_kept_everywhere_and_the_mean_inside_the_limits(count):
    atoms = make_atoms(count, 3.0).double()
    places, weight = spread(200, count, -3.0, 3.0)
    projected = project(atoms, places, weight)
    torch.testing.assert_close(projected.sum(1), torch.ones(200, dtype=torch.float64))
    torch.testing.assert_close(projected @ atoms, (places * weight).sum(1))
    beyond, weight = spread(200, count, -9.0, 9.0)
    projected = project(atoms, beyond, weight)
    torch.testing.assert_close(projected.sum(1), torch.ones(200, dtype=torch.float64))
    torch.testing.assert_close(projected @ atoms, (beyond.clamp(-3, 3) * weight).sum(1))


def test_the_same_atoms_are_projected_to_themselves():
    _, weight = spread(9, 5, -2.0, 2.0)
    torch.testing.assert_close(project(ATOMS.double(), ATOMS.double().expand(9, 5), weight), weight)


@pytest.mark.parametrize("limit", [0.1, 0.7, 5.0, 10.0, 150.0, 3333.3])
def test_no_probability_is_negative_because_of_rounding(limit):
    for count in range(2, 300):
        atoms = make_atoms(count, limit)
        values = torch.cat([atoms, torch.full((count,), 2 * limit)]).view(2, count)
        projected = project(atoms, values, torch.full((2, count), 1 / count))
        assert projected.min() >= 0, count
        assert projected.sum(1).tolist() == pytest.approx([1.0, 1.0], abs=1e-4), count


def test_a_value_that_is_no_number_is_none_in_the_result():
    """Training then ends with the sentence about NaN, and not with an error about an index."""
    projected = project(ATOMS, torch.tensor([[float("nan"), 0, 0, 0, 0], [0.0] * 5]), torch.full((2, 5), 0.2))
    assert projected[0].isnan().any()
    torch.testing.assert_close(projected[1], torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]))
