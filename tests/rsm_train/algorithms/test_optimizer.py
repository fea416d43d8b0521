"""Adam against torch's, and its state."""

from __future__ import annotations

import pytest
import torch

from rsm_train.algorithms.common import leaves
from rsm_train.algorithms.optimizer import Adam, load_state, save_state

LEARNING_RATE = 2.0**-9  # the same in float32 and in Python


def make_params(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (2, 5, 3), "bias": (2, 5)}
    return leaves({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, "cpu")


def loss_of(params, x):
    # The gradient of a transposed weight is transposed in memory.
    return (torch.baddbmm(params["bias"].unsqueeze(1), x, params["weight"].mT)).tanh().square().sum()


@pytest.mark.parametrize("repeats", [1, 2])
def test_steps_are_those_of_torch_bit_for_bit(repeats):
    ours, theirs = make_params(), make_params()
    optimizer, reference = (
        Adam(ours, LEARNING_RATE),
        torch.optim.Adam(theirs.values(), LEARNING_RATE, fused=True),
    )
    for seed in range(4):
        x = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(seed))
        gradient = torch.autograd.grad(loss_of(ours, x), ours["weight"])[0]
        assert not gradient.is_contiguous()
        optimizer.descend(loss_of(ours, x), repeats=repeats)
        reference.zero_grad()
        loss_of(theirs, x).backward()
        for _ in range(repeats):
            reference.step()
    for name, param in ours.items():
        assert torch.equal(param, theirs[name])
        for moment, value in reference.state[theirs[name]].items():
            assert torch.equal(optimizer.state()[f"{moment}.{name}"], value)


def test_a_restored_optimizer_goes_on_in_place():
    params = make_params()
    optimizer = Adam(params, LEARNING_RATE)
    x = torch.ones(2, 7, 3)
    optimizer.descend(loss_of(params, x))
    saved = {name: value.clone() for name, value in save_state({"a": optimizer}, {}).items()}
    copied = leaves({name: value.detach().clone() for name, value in params.items()}, "cpu")
    other = Adam(copied, LEARNING_RATE)
    places = {name: value.data_ptr() for name, value in other.state().items()}
    load_state({"a": other}, {}, saved)
    assert places == {name: value.data_ptr() for name, value in other.state().items()}
    for one, its_params in ((optimizer, params), (other, copied)):
        one.descend(loss_of(its_params, x))
    assert all(torch.equal(value, copied[name]) for name, value in params.items())


def test_a_checkpoint_from_before_the_first_step_has_no_moments():
    optimizer = Adam(make_params(), LEARNING_RATE)
    load_state({"a": optimizer}, {}, {})
    assert not any(value.any() for value in optimizer.state().values())


def test_a_state_that_lacks_a_tensor_or_has_another_shape_is_refused():
    optimizer = Adam(make_params(), LEARNING_RATE)
    state = save_state({"a": optimizer}, {})
    with pytest.raises(KeyError, match="exp_avg.bias"):
        load_state({"a": optimizer}, {}, {name: v for name, v in state.items() if name != "a.exp_avg.bias"})
    with pytest.raises(ValueError, match="wanted shape"):
        load_state({"a": optimizer}, {}, state | {"a.exp_avg.bias": torch.zeros(3)})
