"""Running statistics of observations, and the map that a policy keeps of them."""

from __future__ import annotations

import pytest
import torch

from rsm_train.model.normalizer import LIMIT, ObservationScale, RunningStatistics, scaled

OBS = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 1e3]) + 5.0


def of(*batches):
    statistics = RunningStatistics(3)
    for batch in batches:
        statistics.add(batch)
    return statistics


@pytest.mark.parametrize("sizes", [(200,), (1,) * 200, (1, 9, 100, 90)])
def test_the_statistics_are_those_of_all_observations(sizes):
    scale = of(*OBS.split(list(sizes))).scale()
    std, mean = torch.std_mean(OBS.double(), dim=0, correction=0)
    torch.testing.assert_close(scale.mean, mean.float())
    torch.testing.assert_close(scale.inv_std, ((std.square() + 1e-8).rsqrt()).float())
    normalized = scale.normalize(OBS)
    torch.testing.assert_close(normalized[:, 1:].std(dim=0, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalized[:, 1:].mean(dim=0), torch.zeros(2), atol=1e-4, rtol=0)


def test_a_far_mean_costs_no_digits():
    far = torch.randn(1000, 3, generator=torch.Generator().manual_seed(1)).double() + 1e6
    std = far.float().double().std(dim=0, correction=0)
    torch.testing.assert_close(of(*far.float().split(10)).scale().inv_std, (1 / std).float())


def test_normalised_observations_are_clipped():
    scale = ObservationScale(torch.zeros(3), torch.ones(3))
    assert scale.normalize(torch.tensor([[-1e30, 0.5, 1e30]])).tolist() == [[-LIMIT, 0.5, LIMIT]]
    largest = torch.finfo(torch.float32).max
    assert of(OBS).scale().normalize(torch.full((1, 3), -largest)).tolist() == [[-LIMIT] * 3]


def test_before_the_first_observation_nothing_changes():
    obs = torch.tensor([[1.0, -2.0, 3.0]])
    assert torch.equal(RunningStatistics(3).scale().normalize(obs), obs)
    assert scaled(None, obs) is obs


def test_an_element_that_never_changes_becomes_zero():
    constant = torch.full((50, 3), 7.0)
    assert scaled(of(constant).scale(), constant).abs().max() == 0


def test_restored_statistics_go_on_bit_for_bit():
    whole, first = of(*OBS.split(10)), of(*OBS[:100].split(10))
    again = RunningStatistics(3)
    again.restore({name: value.clone() for name, value in first.state().items()})
    for batch in OBS[100:].split(10):
        again.add(batch)
    for name, value in whole.state().items():
        assert torch.equal(value, again.state()[name]), name


@pytest.mark.parametrize("value", [torch.zeros(2), torch.full((3,), float("nan"))])
def test_damaged_statistics_are_refused(value):
    with pytest.raises(ValueError, match=r"normalizer.mean: wanted finite \[3\]"):
        RunningStatistics(3).restore(of(OBS).state() | {"mean": value})
