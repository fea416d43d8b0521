"""Running statistics of observations and of returns, and what a policy keeps of them."""

from __future__ import annotations

import pytest
import torch

from rsm_train.model.normalizer import (
    LIMIT,
    RETURN_LIMIT,
    ObservationScale,
    ReturnStatistics,
    RunningStatistics,
    scaled,
)

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


# --- rewards


def returns_of(rewards, ended, gamma=0.9):
    """Statistics after steps of rewards [S][B] and ends [S][B]."""
    statistics = ReturnStatistics(len(rewards[0]), gamma)
    for reward, end in zip(rewards, ended, strict=True):
        statistics.add(torch.tensor(reward), torch.tensor(end, dtype=torch.bool))
    return statistics


def test_the_unit_of_rewards_by_hand():
    """Two environments; the second episode of the first begins at its third step."""
    rewards = [[1.0, 2.0], [2.0, -1.0], [4.0, 0.5]]
    statistics = returns_of(rewards, [[0, 0], [1, 0], [0, 0]], gamma=0.5)
    seen = torch.tensor([1.0, 2.0, 0.5 + 2.0, 1.0 - 1.0, 4.0, 0.0 + 0.5], dtype=torch.float64)
    assert statistics.unit == pytest.approx(seen.std(correction=0).item(), rel=1e-12)
    # The last ones go on: 0.5 * 4 + 1 and 0.5 * 0.5 + 1.
    statistics.add(torch.ones(2), torch.zeros(2, dtype=torch.bool))
    seen = torch.cat([seen, torch.tensor([3.0, 1.25])])
    assert statistics.unit == pytest.approx(seen.std(correction=0).item(), rel=1e-12)


def test_a_reward_at_the_end_counts_and_the_next_episode_begins_at_zero():
    ended = returns_of([[1.0], [10.0], [1.0]], [[0], [1], [0]], gamma=1.0)
    assert ended.state()["returns"].tolist() == [1.0]
    assert ended.state()["largest"].item() == 11.0
    going_on = returns_of([[1.0], [10.0], [1.0]], [[0], [0], [0]], gamma=1.0)
    assert going_on.state()["returns"].tolist() == [12.0]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_return_is_at_most_five_units(sign):
    """One return of 100 among a thousand of 0.1: the standard deviation is 3.2, a fifth of the largest 20."""
    rewards = [[0.1]] * 999 + [[sign * 100.0]]
    statistics = returns_of(rewards, [[1]] * 1000)
    assert statistics.unit == pytest.approx(20.0)
    assert statistics.unit == pytest.approx(100.0 / RETURN_LIMIT)
    wide = returns_of([[sign * 1.0], [-sign * 1.0]] * 50, [[1]] * 100)
    assert wide.unit == pytest.approx(1.0), "the standard deviation where that is larger"


def test_a_largest_return_is_not_forgotten():
    statistics = returns_of([[50.0]] + [[0.0]] * 3000, [[1]] * 3001)
    assert statistics.unit == pytest.approx(10.0)


def test_before_a_reward_and_without_any_the_unit_is_1():
    assert ReturnStatistics(3, 0.9).unit == 1.0
    assert returns_of([[0.0, 0.0]] * 9, [[0, 1]] * 9).unit == 1.0
    tiny = returns_of([[1e-4]] * 9, [[1]] * 9).unit
    assert tiny == pytest.approx(2e-5), "small rewards have a small unit"


def test_restored_return_statistics_go_on_bit_for_bit():
    g = torch.Generator().manual_seed(0)
    steps = [(torch.randn(3, generator=g), torch.rand(3, generator=g) < 0.2) for _ in range(60)]
    whole, first, again = (ReturnStatistics(3, 0.97) for _ in range(3))
    for step in steps[:31]:
        first.add(*step)
    again.restore({name: value.clone() for name, value in first.state().items()})
    assert again.unit == first.unit
    for step in steps[31:]:
        again.add(*step)
    for step in steps:
        whole.add(*step)
    assert whole.unit == again.unit
    for name, value in whole.state().items():
        assert torch.equal(value, again.state()[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"returns": torch.zeros(3)}, r"returns: wanted finite \[2\], got \[3\]"),
        ({"returns": torch.tensor([0.0, float("nan")])}, "returns: wanted finite"),
        ({"largest": torch.tensor(float("inf"))}, "largest: wanted finite"),
        ({"largest": torch.zeros(1)}, r"largest: wanted finite \[\], got \[1\]"),
        ({"squares": torch.tensor([float("nan")])}, "squares: wanted finite"),
    ],
)
def test_damaged_return_statistics_are_refused(change, message):
    state = returns_of([[1.0, 2.0]], [[0, 0]]).state()
    with pytest.raises(ValueError, match=message):
        ReturnStatistics(2, 0.9).restore(state | change)
    for name in state:
        with pytest.raises(KeyError):
            ReturnStatistics(2, 0.9).restore({key: value for key, value in state.items() if key != name})


def test_the_same_steps_in_more_environments_give_the_same_unit():
    g = torch.Generator().manual_seed(2)
    rewards, ends = torch.randn(40, 4, generator=g), torch.rand(40, 4, generator=g) < 0.1
    together = ReturnStatistics(4, 0.9)
    for reward, end in zip(rewards, ends, strict=True):
        together.add(reward, end)
    seen, largest = [], 0.0
    for env in range(4):
        total = 0.0
        for reward, end in zip(rewards[:, env].tolist(), ends[:, env].tolist(), strict=True):
            total = 0.9 * total + reward
            seen.append(total)
            largest = max(largest, abs(total))
            total = 0.0 if end else total
    std = torch.tensor(seen, dtype=torch.float64).std(correction=0).item()
    assert together.unit == pytest.approx(max(std, largest / 5), rel=1e-6)
