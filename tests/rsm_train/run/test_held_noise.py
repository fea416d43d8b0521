"""Noise that is held: how long, by which environment, and as if nothing had happened after a resume."""

from __future__ import annotations

import pytest
import torch

from rsm_train.run.held_noise import HeldNoise

SHAPES = {"policy": (2, 3), "exploration": (1,)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(step: int, envs: int) -> dict[str, torch.Tensor]:
    """New noise of a step, each number of its own: step and environment can be read from it."""
    value = 100.0 * step + torch.arange(envs)
    return {"policy": value[:, None, None].expand(envs, 2, 3).clone(), "exploration": value[:, None].clone()}


def spans(longest: int, envs: int, steps: int, seed: int = 0) -> list[list[int]]:
    """Lengths of the finished spans of every environment."""
    held = HeldNoise(envs, longest, generator(seed), SHAPES)
    noise = torch.stack([held.hold(drawn(step, envs))["exploration"][:, 0] for step in range(steps)], 1)
    found = []
    for row in noise:
        _, counts = torch.unique_consecutive(row, return_counts=True)
        found.append(counts[:-1].tolist())
    return found


@pytest.mark.parametrize("longest", [2, 4, 30])
def test_a_span_has_n_steps_with_a_probability_proportional_to_n_to_the_power_of_minus_2(longest):
    lengths = torch.tensor([length for row in spans(longest, 50, 2_000) for length in row])
    assert lengths.min() == 1
    assert lengths.max() == longest
    weights = torch.arange(1, longest + 1, dtype=torch.float64) ** -2.0
    share = torch.bincount(lengths, minlength=longest + 1)[1:] / len(lengths)
    assert len(lengths) > 20_000
    # Five standard deviations of a share.
    torch.testing.assert_close(share[0].double(), weights[0] / weights.sum(), atol=0.018, rtol=0)
    torch.testing.assert_close(share.double(), weights / weights.sum(), atol=0.018, rtol=0)


def test_every_environment_has_spans_of_its_own():
    found = spans(8, 6, 400)
    for one in range(6):
        for other in range(one):
            assert found[one] != found[other]


def test_what_is_held_is_all_noise_of_one_step_and_its_own_environment():
    held, before = HeldNoise(5, 6, generator(), SHAPES), torch.full((5,), -1.0)
    held_once = begun_once = False
    for step in range(60):
        new = drawn(step, 5)
        got = held.hold(new)
        assert torch.equal(got["policy"], got["exploration"][:, :, None].expand(5, 2, 3))
        for env in range(5):
            value = float(got["exploration"][env, 0])
            assert value % 100 == env
            assert value in (float(new["exploration"][env, 0]), float(before[env]))
            held_once |= value == float(before[env])
            begun_once |= value == float(new["exploration"][env, 0])
        before = got["exploration"][:, 0].clone()
        got["policy"].zero_()  # what a caller does with its noise is no concern of the next step
        got["exploration"].fill_(-5)
    assert held_once
    assert begun_once


def test_an_episode_that_ends_ends_its_span_and_no_other():
    held, before = HeldNoise(2, 50, generator(3), SHAPES), torch.tensor([-1.0, -1.0])
    went_on = 0
    for step in range(300):
        got = held.hold(drawn(step, 2))["exploration"][:, 0]
        if step:
            assert got[0] == 100.0 * step, "new in each step"
            went_on += int(got[1] == before[1])
        before = got
        held.release(torch.tensor([True, False]))
    assert went_on > 50


def test_with_a_longest_span_of_1_all_noise_is_new():
    held = HeldNoise(3, 1, generator(), SHAPES)
    for step in range(20):
        for name, value in held.hold(new := drawn(step, 3)).items():
            assert torch.equal(value, new[name])


@pytest.mark.parametrize("at", [0, 1, 17])
def test_restored_noise_goes_on_bit_for_bit(at):
    first_generator = generator(5)
    whole, first = HeldNoise(3, 9, generator(5), SHAPES), HeldNoise(3, 9, first_generator, SHAPES)
    for step in range(at):
        whole.hold(drawn(step, 3))
        first.hold(drawn(step, 3))
    other = torch.Generator()
    other.set_state(first_generator.get_state())
    again = HeldNoise(3, 9, other, SHAPES)
    again.restore({name: value.clone() for name, value in first.state().items()})
    for step in range(at, 60):
        wanted, got = whole.hold(drawn(step, 3)), again.hold(drawn(step, 3))
        for name, value in wanted.items():
            assert torch.equal(value, got[name]), (step, name)
        ended = torch.tensor([step % 7 == 0, False, step % 11 == 0])
        whole.release(ended)
        again.release(ended)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": torch.zeros(2, dtype=torch.int64)}, r"left: wanted finite \[3\], got \[2\]"),
        ({"left": torch.tensor([0, -1, 0])}, "left: wanted 0 to 8"),
        ({"left": torch.tensor([0, 9, 0])}, "left: wanted 0 to 8"),
        ({"noise.policy": torch.zeros(2, 2, 3)}, r"noise.policy: wanted finite \[3, 2, 3\], got \[2, 2, 3\]"),
        ({"noise.policy": torch.full((3, 2, 3), float("nan"))}, r"noise.policy: wanted finite"),
    ],
)
def test_a_damaged_state_is_refused(change, message):
    held = HeldNoise(3, 9, generator(), SHAPES)
    held.hold(drawn(0, 3))
    with pytest.raises(ValueError, match=message):
        HeldNoise(3, 9, generator(), SHAPES).restore(held.state() | change)


def test_a_state_without_one_of_its_tensors_is_refused():
    state = HeldNoise(3, 9, generator(), SHAPES).state()
    for missing in state:
        with pytest.raises(KeyError, match=missing):
            HeldNoise(3, 9, generator(), SHAPES).restore({k: v for k, v in state.items() if k != missing})
