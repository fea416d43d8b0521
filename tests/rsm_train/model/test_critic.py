"""Critics of every kind: what they compute, against plain arithmetic in float64 for one member at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from rsm_train.model.categorical import make_atoms
from rsm_train.model.critic import (
    BATCH_NORM_RATE,
    CriticNorm,
    batch_outputs,
    choose_best,
    fold,
    init_critics,
    is_learnt,
    mean_value,
    project_rows,
    q_values,
    select_value,
    uses_batch,
)
from rsm_train.model.networks import Params

OBS, ACTION, MEMBERS, HIDDEN = 5, 3, 3, (16, 12)
KINDS: list[tuple[CriticNorm, bool, int | None]] = list(
    itertools.product(("none", "layer", "batch"), (False, True), (None, 11))
)
"""Normalisation of the hidden layers, normalised input, number of atoms."""
every_kind = pytest.mark.parametrize(("norm", "input_norm", "atoms"), KINDS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def critics_of(norm: CriticNorm, input_norm: bool, atoms: int | None) -> Params:
    """Critics in float64 of which no bias is 0, no factor 1, and whose statistics have been moved."""
    found = init_critics(
        *(OBS, ACTION, HIDDEN, generator()),
        members=MEMBERS,
        norm=norm,
        input_norm=input_norm,
        atoms=None if atoms is None else make_atoms(atoms, 4.0),
    )
    g = generator(9)
    moved = {
        name: value.double() + (0.2 * torch.randn(value.shape, generator=g) if is_learnt(name) else 0.0)
        for name, value in found.items()
    }
    for seed in range(7):
        batch_outputs(moved, *rows(40, seed), move_statistics=True)
    return moved


def rows(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Observations of different scales and actions, float64."""
    g = generator(seed)
    obs = torch.randn(count, OBS, generator=g, dtype=torch.float64)
    obs = obs * torch.tensor([0.1, 1.0, 3.0, 1.0, 0.5]) + torch.tensor([0.0, 2.0, -1.0, 0.0, 0.3])
    return obs, torch.rand(count, ACTION, generator=g, dtype=torch.float64) * 2 - 1


def normal(x: Tensor, critics: Mapping[str, Tensor], name: str, member: int, over_batch: bool) -> Tensor:
    """(x - mean) / sqrt(var + 1e-3), by the rows at hand or by the running statistics."""
    mean, var = critics[f"{name}.mean"][member], critics[f"{name}.var"][member]
    if over_batch:
        mean, var = x.mean(0), x.var(0, correction=0)
    y = (x - mean) / (var + 1e-3).sqrt()
    if f"{name}.weight" in critics:
        y = y * critics[f"{name}.weight"][member] + critics[f"{name}.bias"][member]
    return y


def by_hand(critics: Mapping[str, Tensor], obs: Tensor, action: Tensor, *, over_batch: bool) -> Tensor:
    """Outputs of the last layer [E, R, K], one member after the other, with torch's own mish."""
    members = []
    for e in range(len(critics["layers.0.weight"])):
        x = torch.cat([obs, action], 1)
        if "input_norm.mean" in critics:
            x = normal(x, critics, "input_norm", 0, over_batch)
        last = sum(name.startswith("layers.") and name.endswith("weight") for name in critics) - 1
        for i in range(last + 1):
            x = x @ critics[f"layers.{i}.weight"][e].T + critics[f"layers.{i}.bias"][e]
            if f"batch_norms.{i}.weight" in critics:
                x = normal(x, critics, f"batch_norms.{i}", e, over_batch)
            if f"norms.{i}.weight" in critics:
                x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
                x = x * critics[f"norms.{i}.weight"][e] + critics[f"norms.{i}.bias"][e]
            x = torch.nn.functional.mish(x) if i < last else x
        members.append(x)
    return torch.stack(members)


def value_by_hand(critics: Mapping[str, Tensor], outputs: Tensor) -> Tensor:
    """One value of each row of the outputs: [E, R]."""
    if "atoms" not in critics:
        return outputs[..., 0]
    share = outputs.exp() / outputs.exp().sum(2, keepdim=True)
    return (share * critics["atoms"]).sum(2)


# --- folding


@every_kind
@pytest.mark.parametrize("unit", [1.0, 7.5])
def test_folded_critics_have_the_values_of_the_running_statistics(norm, input_norm, atoms, unit):
    critics = critics_of(norm, input_norm, atoms)
    folded = fold(critics, torch.tensor(unit))
    obs, action = rows(24)
    got = q_values(folded, obs[::4], action.view(6, 4, ACTION))
    wide = obs[::4].repeat_interleave(4, 0)
    wanted = unit * value_by_hand(critics, by_hand(critics, wide, action, over_batch=False))
    torch.testing.assert_close(got, wanted.view(MEMBERS, 6, 4), atol=1e-11, rtol=1e-11)
    assert wanted.std() > 0.01 * unit, "constant values would agree with anything"
    assert not any(name.startswith(("batch_norms", "input_norm")) for name in folded)


@every_kind
def test_folding_in_float32_costs_no_more_than_rounding(norm, input_norm, atoms):
    critics = critics_of(norm, input_norm, atoms)
    obs, action = rows(24)
    small = fold({name: value.float() for name, value in critics.items()})
    got = q_values(small, obs.float(), action.float().unsqueeze(1))[..., 0]
    wanted = value_by_hand(critics, by_hand(critics, obs, action, over_batch=False))
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)


@every_kind
def test_folding_changes_nothing_of_what_is_folded_and_keeps_no_graph(norm, input_norm, atoms):
    critics = critics_of(norm, input_norm, atoms)
    for name, value in critics.items():
        if is_learnt(name):
            value.requires_grad_()
    before = {name: value.detach().clone() for name, value in critics.items()}
    for value in fold({name: value.detach() for name, value in critics.items()}, torch.tensor(3.0)).values():
        assert not value.requires_grad
    for name, value in before.items():
        assert torch.equal(value, critics[name]), name


def test_critics_without_a_norm_fold_to_themselves():
    critics = critics_of("layer", False, 11)
    folded = fold(critics)
    assert folded.keys() == critics.keys()
    for name, value in critics.items():
        assert torch.equal(value, folded[name]), name


# --- over the batch


@every_kind
def test_critics_that_learn_are_normalised_over_the_rows_at_hand(norm, input_norm, atoms):
    critics = critics_of(norm, input_norm, atoms)
    before = {name: value.clone() for name, value in critics.items()}
    obs, action = rows(33, seed=30)
    outputs = batch_outputs(critics, obs, action)
    wanted = by_hand(critics, obs, action, over_batch=True)
    torch.testing.assert_close(outputs, wanted, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(mean_value(critics, outputs), value_by_hand(critics, wanted))
    for name, value in critics.items():
        assert torch.equal(value, before[name]), f"{name} has moved"
    assert uses_batch(critics) is (input_norm or norm == "batch")
    running = by_hand(critics, obs, action, over_batch=False)
    assert torch.allclose(wanted, running, atol=1e-3) is not uses_batch(critics)


def test_a_row_alone_is_not_normalised_by_itself():
    critics = critics_of("layer", False, None)
    obs, action = rows(9)
    torch.testing.assert_close(
        batch_outputs(critics, obs[4:5], action[4:5])[:, 0], batch_outputs(critics, obs, action)[:, 4]
    )


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_running_statistics_move_by_a_hundredth_towards_those_of_the_rows(norm):
    """The variance is the unbiased one, that of the law and not of the rows."""
    critics = critics_of(norm, True, None)
    before = {name: value.clone() for name, value in critics.items()}
    obs, action = rows(33, seed=31)
    batch_outputs(critics, obs, action, move_statistics=True)
    x = torch.cat([obs, action], 1)
    moves = {"input_norm": x.expand(1, -1, -1)}
    if norm == "batch":
        x = normal(x, before, "input_norm", 0, True)
        first = torch.stack(
            [x @ before["layers.0.weight"][e].T + before["layers.0.bias"][e] for e in range(MEMBERS)]
        )
        moves["batch_norms.0"] = first
    for name, seen in moves.items():
        for part, statistic in (("mean", seen.mean(1)), ("var", seen.var(1))):
            wanted = before[f"{name}.{part}"] + 0.01 * (statistic - before[f"{name}.{part}"])
            torch.testing.assert_close(critics[f"{name}.{part}"], wanted, atol=1e-12, rtol=1e-12)
    moved = {name for name, value in critics.items() if not torch.equal(value, before[name])}
    layers = [f"batch_norms.{i}" for i in range(len(HIDDEN))] if norm == "batch" else []
    assert moved == {f"{name}.{part}" for name in ["input_norm", *layers] for part in ("mean", "var")}
    assert BATCH_NORM_RATE == 0.01


def test_running_statistics_find_those_of_the_data():
    critics = critics_of("none", True, None)
    for seed in range(100, 1100):
        batch_outputs(critics, *rows(64, seed), move_statistics=True)
    x = torch.cat(rows(100_000, seed=5), 1)
    torch.testing.assert_close(critics["input_norm.mean"][0], x.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(critics["input_norm.var"][0], x.var(0), atol=0, rtol=0.1)


# --- parameters


@every_kind
def test_an_optimiser_moves_weights_and_not_statistics_or_atoms(norm, input_norm, atoms):
    critics = critics_of(norm, input_norm, atoms)
    learnt = {name for name in critics if is_learnt(name)}
    assert learnt == {name for name in critics if name.endswith((".weight", ".bias"))}
    names = {"none": 0, "layer": 4, "batch": 8}[norm] + 6 + 2 * input_norm + (atoms is not None)
    assert len(critics) == names


def test_rows_of_weights_are_scaled_to_norm_1_and_nothing_else_is():
    critics = critics_of("batch", True, 11)
    critics["layers.1.weight"][1, 3] = 0.0
    before = {name: value.clone() for name, value in critics.items()}
    project_rows(critics)
    for i in range(3):
        old, new = before[f"layers.{i}.weight"], critics[f"layers.{i}.weight"]
        norms = old.square().sum(2, keepdim=True).sqrt()
        if i == 1:
            assert not new[1, 3].any(), "a row of zeros stays one"
            norms[1, 3] = 1.0
        torch.testing.assert_close(new, old / norms)
    for name, value in critics.items():
        if not (name.startswith("layers.") and name.endswith("weight")):
            assert torch.equal(value, before[name]), name


def test_members_have_weights_and_statistics_of_their_own():
    critics = critics_of("batch", False, None)
    for name, value in critics.items():
        for one, other in itertools.combinations(value, 2):
            assert not torch.equal(one, other), name


# --- plain critics


def test_layer_norm_and_any_ensemble_size_equal_the_plain_networks():
    g = generator(9)
    critics = {
        name: value + 0.1 * torch.randn(value.shape, generator=g)
        for name, value in init_critics(5, 3, [16, 16], generator(), members=3, norm="layer").items()
    }
    obs, action = torch.randn(4, 5, generator=generator(1)), torch.randn(4, 6, 3, generator=generator(2))
    got = q_values(critics, obs, action)
    assert got.shape == (3, 4, 6)
    for member in range(3):
        x = torch.cat([obs.unsqueeze(1).expand(4, 6, 5), action], -1)
        for i in range(3):
            x = x @ critics[f"layers.{i}.weight"][member].T + critics[f"layers.{i}.bias"][member]
            if i < 2:
                x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
                x = x * critics[f"norms.{i}.weight"][member] + critics[f"norms.{i}.bias"][member]
                x = torch.nn.functional.mish(x)
        torch.testing.assert_close(got[member], x.squeeze(-1), atol=1e-5, rtol=1e-5)


def test_q_values_equal_the_concatenated_networks():
    g = generator(9)
    critics = {
        name: value + 0.1 * torch.randn(value.shape, generator=g)
        for name, value in init_critics(5, 3, [32, 32], generator()).items()
    }
    obs, action = torch.randn(4, 5, generator=generator(1)), torch.randn(4, 6, 3, generator=generator(2))
    got = q_values(critics, obs, action)
    wide = torch.cat([obs.unsqueeze(1).expand(4, 6, 5), action], -1)
    for member in range(2):
        x = wide
        for i in range(3):
            x = x @ critics[f"layers.{i}.weight"][member].T + critics[f"layers.{i}.bias"][member]
            x = torch.nn.functional.mish(x) if i < 2 else x
        torch.testing.assert_close(got[member], x.squeeze(-1), atol=1e-5, rtol=1e-5)


def test_select_value_by_hand():
    q = torch.tensor([[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]])
    assert select_value(q).tolist() == [1.0, 5.0]
    assert select_value(q, "mean").tolist() == [4.0, 5.0]
    std = math.sqrt((9 + 1 + 16) / 3)
    assert select_value(q, "mean_std", -0.5).tolist() == pytest.approx([4.0 - 0.5 * std, 5.0])


def test_choose_best_takes_the_highest_value():
    action, q = torch.randn(7, 6, 3, generator=generator(1)), torch.randn(7, 6, generator=generator(2))
    best, value = choose_best(action, q)
    for row in range(7):
        index = int(q[row].argmax())
        assert torch.equal(best[row], action[row, index])
        assert value[row] == q[row, index]
    assert len({int(row.argmax()) for row in q}) > 1
