"""How critics of every kind learn: their loss by hand, what moves, and values that are known."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from rsm_common.errors import ConfigError
from rsm_train.algorithms.common import Batch, copy_params
from rsm_train.algorithms.critic_config import CriticConfig
from rsm_train.algorithms.critics import Critics
from rsm_train.config import resolve
from rsm_train.model.critic import fold, is_learnt, q_values
from rsm_train.model.kernels import DEFAULT_COMPUTE
from rsm_train.model.networks import Params
from tests.rsm_train.algorithms.test_dpmd import random_batch
from tests.rsm_train.critic_kinds import ALL_AT_ONCE, CROSSQ, KINDS
from tests.rsm_train.model.test_critic import by_hand, value_by_hand

every_kind = pytest.mark.parametrize("kind", KINDS)
ROWS = 24


def make(kind: str = "plain", *, seed: int = 0, moved: bool = True, **changes: Any) -> Critics:
    """Critics whose networks, target included, all differ from their initial values."""
    settings = {"width": 16, "depth": 2, "value_limit": 3.0, "critic_lr": 1e-3, **KINDS[kind], **changes}
    config = CriticConfig(**settings)
    generator = torch.Generator().manual_seed(seed)
    critics = Critics(config, 3, 2, generator=generator, device="cpu", compute=DEFAULT_COMPUTE)
    g = torch.Generator().manual_seed(8)
    for params in critics.networks().values() if moved else ():
        for name, value in params.items():
            if name != "atoms":
                value.data += 0.2 * torch.rand(value.shape, generator=g)
    return critics


def batch_and_action() -> tuple[Batch, Tensor]:
    """Transitions whose two halves differ in scale and place, and a'."""
    batch = random_batch(ROWS)
    batch = dataclasses.replace(batch, next_obs=2 * batch.next_obs + 1, reward=3 * batch.reward)
    return batch, torch.rand(ROWS, 2, generator=torch.Generator().manual_seed(3)) - 0.3


def double(params: Params) -> Params:
    return {name: value.detach().double() for name, value in params.items()}


def select(critics: Critics, q_EB: Tensor) -> Tensor:
    selection = critics.config.critic_selection
    if selection == "min":
        return q_EB.amin(0)
    spread = q_EB.std(0, correction=0) if selection == "mean_std" else 0.0
    return q_EB.mean(0) + critics.config.critic_std_factor * spread


def projected(atoms: Tensor, values: Tensor, mass: Tensor) -> Tensor:
    """Masses at values onto atoms: each to its two neighbours, by a triangle of the atoms' distance."""
    distance = (values.clamp(atoms[0], atoms[-1])[:, :, None] - atoms).abs() / (atoms[1] - atoms[0])
    return (mass[:, :, None] * (1 - distance).clamp(min=0)).sum(1)


def loss_by_hand(critics: Critics, params: Params, target: Params, batch: Batch, next_action: Tensor):
    """The loss and the mean of the target, [B], in float64 and differentiable in `params`."""
    obs, action, next_obs = batch.obs.double(), batch.action.double(), batch.next_obs.double()
    next_action = next_action.double()
    joint = any("norm" in name and name.endswith("mean") for name in params)
    both = torch.cat([obs, next_obs]), torch.cat([action, next_action])
    if joint:
        outputs = by_hand(params, *both, over_batch=True)[:, :ROWS]
        next_outputs = by_hand(target, *both, over_batch=True)[:, ROWS:]
    else:
        outputs = by_hand(params, obs, action, over_batch=False)
        next_outputs = by_hand(target, next_obs, next_action, over_batch=False)
    reward = critics.config.reward_scale * batch.reward.double()
    discount = critics.config.gamma * (1 - batch.terminated.double())
    next_values = value_by_hand(target, next_outputs)
    if "atoms" not in params:
        y = (reward + discount * select(critics, next_values)).detach()
        return sum(((q[:, 0] - y) ** 2).mean() for q in outputs), y
    atoms, share = params["atoms"], torch.softmax(next_outputs, 2)
    if critics.config.critic_selection == "mean":
        law = share.mean(0)
    else:
        law = torch.stack([share[int(next_values[:, row].argmin()), row] for row in range(ROWS)])
    law = projected(atoms, reward[:, None] + discount[:, None] * atoms, law).detach()
    return sum(-(law * torch.log_softmax(logits, 1)).sum(1).mean() for logits in outputs), law @ atoms


# --- the loss


def test_td_target_by_hand():
    critics = make(reward_scale=0.2, gamma=0.9, moved=False)
    for params in critics.networks().values():
        params["layers.2.weight"].data.zero_()
        params["layers.2.bias"].data.fill_(10.0)
    batch = dataclasses.replace(
        random_batch(2), reward=torch.tensor([1.0, 1.0]), terminated=torch.tensor([0.0, 1.0])
    )
    reward, discount = critics.backup(batch)
    torch.testing.assert_close(reward, torch.tensor([0.2, 0.2]))
    torch.testing.assert_close(discount, torch.tensor([0.9, 0.0]))
    metrics = critics.update(batch, torch.zeros(2, 2), critics.backup(batch))
    # y = 9.2 and 0.2; both critics say 10.
    assert metrics["target_mean"].item() == pytest.approx((9.2 + 0.2) / 2)
    assert metrics["q_mean"].item() == pytest.approx(10.0)
    assert metrics["critic_loss"].item() == pytest.approx(2 * (0.8**2 + 9.8**2) / 2, rel=1e-5)


@every_kind
def test_loss_and_target_by_hand(kind):
    critics = make(kind, reward_scale=0.5, gamma=0.9)
    batch, next_action = batch_and_action()
    params = double(critics.params)
    target = params if critics.target is None else double(critics.target)
    assert (critics.target is None) is (KINDS[kind].get("critic_target") == "none")
    wanted, y = loss_by_hand(critics, params, target, batch, next_action)
    metrics = critics.update(batch, next_action, critics.backup(batch))
    assert metrics["critic_loss"].item() == pytest.approx(float(wanted), rel=1e-4)
    assert metrics["target_mean"].item() == pytest.approx(float(y.mean()), rel=1e-4)
    assert not any(value.requires_grad for value in metrics.values())


@every_kind
def test_the_gradient_is_that_of_the_loss_with_the_target_held(kind):
    """Of a joint batch, the rows of s' move the statistics, and the gradient goes through these."""
    critics = make(kind)
    batch, next_action = batch_and_action()
    params = double(critics.params)
    learnt = {name: value.requires_grad_() for name, value in params.items() if is_learnt(name)}
    target = params if critics.target is None else double(critics.target)
    loss, _ = loss_by_hand(critics, params, target, batch, next_action)
    wanted = dict(zip(learnt, torch.autograd.grad(loss, list(learnt.values())), strict=True))
    held = copy_params(critics.target or {})
    critics.update(batch, next_action, critics.backup(batch))
    moments = critics.optimizer.state()
    for name, gradient in wanted.items():
        found = moments[f"exp_avg.{name}"] / 0.1  # of the first step: 1 - 0.9 of the gradient
        size = gradient.abs().max().item()
        # A bias before a normalisation over the batch has no effect: its gradient is rounding around 0.
        torch.testing.assert_close(found.double(), gradient, atol=1e-4 * size + 1e-6, rtol=1e-3, msg=name)
    assert {name.removeprefix("exp_avg.") for name in moments if name.startswith("exp_avg.")} == set(wanted)
    for name, value in held.items():
        assert critics.target is not None
        assert torch.equal(value, critics.target[name]), f"{name} of the target has moved"


def test_the_lower_mean_chooses_the_whole_distribution_and_not_its_parts():
    """Row by row: member 0 is lower at one state, member 1 at another; no mixture of the two."""
    critics = make("categorical", value_atoms=3, value_limit=1.0, gamma=1.0, moved=False)
    assert critics.target is not None
    laws = torch.tensor([[0.6, 0.0, 0.4], [0.0, 1.0, 0.0]])  # means -0.2 and 0
    logits = (laws + 1e-12).log()
    critics.target["layers.2.weight"].zero_()
    critics.target["layers.2.bias"].copy_(logits)
    batch = dataclasses.replace(random_batch(2), reward=torch.zeros(2), terminated=torch.zeros(2))
    metrics = critics.update(batch, torch.zeros(2, 2), critics.backup(batch))
    assert metrics["target_mean"].item() == pytest.approx(-0.2, abs=1e-6)
    critics.target["layers.2.bias"].copy_(logits.flip(0))
    metrics = critics.update(batch, torch.zeros(2, 2), critics.backup(batch))
    assert metrics["target_mean"].item() == pytest.approx(-0.2, abs=1e-6)


def test_a_backup_of_a_variant_takes_the_place_of_the_ordinary_one():
    batch, next_action = batch_and_action()
    plain, other = make(), make()
    first = plain.update(batch, next_action, plain.backup(batch))
    second = other.update(batch, next_action, (torch.full((ROWS,), 2.0), torch.zeros(ROWS)))
    assert second["target_mean"].item() == pytest.approx(2.0)
    assert first["target_mean"].item() != pytest.approx(2.0)


# --- the joint batch


@pytest.mark.parametrize("kind", ["batch", "batch without target", "input norm", "all at once"])
def test_the_running_statistics_are_those_of_both_halves(kind):
    critics = make(kind)
    batch, next_action = batch_and_action()
    name = "input_norm" if "input_norm.mean" in critics.params else "batch_norms.0"
    before = double(critics.params)
    x = torch.cat([torch.cat([batch.obs, batch.next_obs]), torch.cat([batch.action, next_action])], 1).double()
    seen = x.expand(1, -1, -1)
    if name != "input_norm":
        seen = torch.stack([x @ before["layers.0.weight"][e].T + before["layers.0.bias"][e] for e in range(2)])
    held = copy_params(critics.target or {})
    critics.update(batch, next_action, critics.backup(batch))
    for part, statistic in (("mean", seen.mean(1)), ("var", seen.var(1))):
        wanted = before[f"{name}.{part}"] + 0.01 * (statistic - before[f"{name}.{part}"])
        torch.testing.assert_close(critics.params[f"{name}.{part}"].double(), wanted, atol=1e-5, rtol=1e-5)
    for key, value in held.items():
        assert critics.target is not None
        assert torch.equal(value, critics.target[key]), "statistics of the target move with its weights alone"


def test_one_normalisation_sees_both_halves():
    """The values of (s, a) depend on the rows of (s', a'); without normalisation over a batch, they do not."""
    batch, next_action = batch_and_action()
    for kind, depends in (("batch without target", True), ("layer", False)):
        q = []
        for shift in (0.0, 1.0):
            critics = make(kind)
            moved = dataclasses.replace(batch, next_obs=batch.next_obs + shift)
            q.append(critics.update(moved, next_action, critics.backup(moved))["q_mean"].item())
        assert (q[0] != pytest.approx(q[1], rel=1e-4)) is depends


# --- what an update moves


@pytest.mark.parametrize(
    "kind", ["unit weights", "layer, unit weights, categorical, input norm", "all at once"]
)
def test_rows_of_weights_have_norm_1_from_the_first_on(kind):
    critics = make(kind, moved=False)

    def norms(params: Params) -> Tensor:
        found = [params[f"layers.{i}.weight"].detach().square().sum(2).sqrt().flatten() for i in range(3)]
        return torch.cat(found)

    torch.testing.assert_close(norms(critics.params), torch.ones_like(norms(critics.params)))
    batch, next_action = batch_and_action()
    for _ in range(5):
        before = critics.params["layers.1.weight"].detach().clone()
        critics.update(batch, next_action, critics.backup(batch))
        torch.testing.assert_close(norms(critics.params), torch.ones_like(norms(critics.params)))
        assert not torch.equal(before, critics.params["layers.1.weight"])
    assert critics.params["layers.1.bias"].detach().abs().max() > 0, "biases are free"


def test_without_the_setting_rows_keep_their_norms():
    critics = make("batch", moved=False)
    batch, next_action = batch_and_action()
    critics.update(batch, next_action, critics.backup(batch))
    assert (critics.params["layers.1.weight"].detach().square().sum(2) - 1).abs().min() > 1e-4


@every_kind
def test_every_learnt_parameter_moves_and_the_target_follows(kind):
    critics = make(kind, tau=0.1)
    batch, next_action = batch_and_action()
    before = copy_params(critics.params)
    held = None if critics.target is None else copy_params(critics.target)
    critics.update(batch, next_action, critics.backup(batch))
    critics.move_target()
    for name, value in critics.params.items():
        moved = not torch.equal(value.detach(), before[name])
        assert moved is (name != "atoms"), name
    assert set(critics.networks()) == {"critic"} | (set() if held is None else {"critic_target"})
    for name, value in (held or {}).items():
        assert critics.target is not None
        wanted = value + 0.1 * (critics.params[name].detach() - value)
        torch.testing.assert_close(critics.target[name], wanted)


@every_kind
def test_folded_critics_have_the_values_of_the_running_statistics(kind):
    critics = make(kind)
    batch, next_action = batch_and_action()
    critics.update(batch, next_action, critics.backup(batch))
    target = critics.params if critics.target is None else critics.target
    for params in (critics.params, target):
        got = q_values(fold(copy_params(params)), batch.obs, batch.action[:, None])[..., 0]
        outputs = by_hand(double(params), batch.obs.double(), batch.action.double(), over_batch=False)
        torch.testing.assert_close(got.double(), value_by_hand(double(params), outputs), atol=1e-5, rtol=1e-4)


def test_critics_of_their_own_size():
    critics = make(width=16, depth=2, critic_width=24, critic_depth=3)
    assert [tuple(critics.params[f"layers.{i}.weight"].shape) for i in range(4)] == [
        (2, 24, 5),
        (2, 24, 24),
        (2, 24, 24),
        (2, 1, 24),
    ]


# --- learning rates


def test_a_decayed_rate_is_a_line_between_two_constants():
    settings: dict[str, Any] = {"policy_lr": 1e-3, "policy_lr_decay_start": 10, "policy_lr_decay_updates": 40}
    falling = CriticConfig(**settings, policy_lr_final=2e-4)
    rates = [falling.policy_lr_after(updates) for updates in (0, 10, 20, 50, 60)]
    assert rates == pytest.approx([1e-3, 1e-3, 8e-4, 2e-4, 2e-4])
    assert CriticConfig(**settings).policy_lr_after(60) == 1e-3


def test_the_critics_learning_rate_falls_with_their_updates():
    critics = make(critic_lr=1e-3, critic_lr_final=2e-4, critic_lr_decay_start=2, critic_lr_decay_updates=4)
    rates = []
    for updates in range(8):
        critics.begin_update(updates)
        rates.append(critics.optimizer.learning_rate.item())
    assert rates == pytest.approx([1e-3] * 3 + [8e-4, 6e-4, 4e-4, 2e-4, 2e-4])
    constant = make(critic_lr=1e-3)
    constant.begin_update(10**9)
    assert constant.optimizer.learning_rate.item() == pytest.approx(1e-3)


@pytest.mark.parametrize("algo", ["dpmd", "sdac", "sac"])
def test_every_algorithm_lowers_the_learning_rate_of_its_critics(algo):
    from rsm_train.config import find_algorithm

    settings = {"env": "none", "algo": algo, "width": 8, "depth": 1, "critic_lr": 1e-3, "critic_lr_final": 1e-4}
    settings |= {
        "critic_lr_decay_updates": 9,
        **({} if algo == "sac" else {"diffusion_steps": 2, "particles": 2}),
    }
    config: Any = resolve(settings)[1]
    algorithm: Any = find_algorithm(algo)(config, 3, 2, generator=torch.Generator().manual_seed(0))
    noise = algorithm.draw_noise(16, torch.Generator().manual_seed(0))
    rates = []
    for _ in range(11):
        algorithm.update(random_batch(), noise)
        rates.append(algorithm.agent.critics.optimizer.learning_rate.item())
    assert rates == pytest.approx([1e-3 - 1e-4 * step for step in range(10)] + [1e-4])


# --- learning


@every_kind
def test_every_kind_learns_the_values_of_a_random_policy(kind):
    """r = s a + s and s' = a, under uniform actions: V(s) = s, and so Q(s, a) = s a + s + gamma a."""
    critics = make(
        kind,
        moved=False,
        width=32,
        gamma=0.5,
        tau=0.05,
        critic_lr=4e-3,
        critic_lr_final=1e-4,
        critic_lr_decay_start=200,
        critic_lr_decay_updates=400,
    )
    g = torch.Generator().manual_seed(1)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g) * 2 - 1

    zero = torch.zeros(128, 1)
    for update in range(600):
        s, a, next_a = uniform(128, 1), uniform(128, 1), uniform(128, 1)
        obs, next_obs = torch.cat([s, zero, zero], 1), torch.cat([a, zero, zero], 1)
        batch = Batch(obs, torch.cat([a, zero], 1), (s * a + s)[:, 0], next_obs, torch.zeros(128))
        critics.begin_update(update)
        critics.update(batch, torch.cat([next_a, zero], 1), critics.backup(batch))
        critics.move_target()
    s, a = uniform(1000, 1), uniform(1000, 1)
    obs, action = torch.cat([s, s * 0, s * 0], 1), torch.cat([a, a * 0], 1)
    q = critics.select(q_values(fold(critics.params), obs, action[:, None])[..., 0])
    error = (q - (s * a + s + 0.5 * a)[:, 0]).abs()
    assert error.mean() < 0.1, "critics that are 0 have 0.6"
    assert error.max() < 0.5


# --- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"critic_loss": "categorical", "critic_selection": "mean_std"},
            "min or mean with critic_loss categorical",
        ),
        ({"value_atoms": 1}, "value_atoms >= 2"),
        ({"value_limit": 0.0}, "value_limit > 0"),
        ({"critic_width": 0}, "critic_width >= 1"),
        ({"critic_depth": 0}, "critic_depth >= 1"),
        ({"critic_lr_final": -1.0}, "critic_lr_final >= 0"),
        ({"critic_lr_decay_start": -1}, "critic_lr_decay_start >= 0"),
        ({"critic_lr_decay_updates": 0}, "critic_lr_decay_updates >= 1"),
        ({"critic_std_factor": 0.5}, "mean_std"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CriticConfig(**settings)


@pytest.mark.parametrize("algo", ["dpmd", "sdac", "sac"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"value_limit": 9.0}, "wanted critic_loss categorical with --value-limit"),
        ({"value_atoms": 9}, "wanted critic_loss categorical with --value-atoms"),
        ({"critic_lr_decay_start": 9}, "wanted critic_lr_final with --critic-lr-decay-start"),
        ({"critic_lr_decay_updates": 9}, "wanted critic_lr_final with --critic-lr-decay-updates"),
        ({"policy_lr_decay_updates": 9}, "wanted policy_lr_final with --policy-lr-decay-updates"),
    ],
)
def test_settings_without_an_effect_and_unknown_ones_are_refused(algo, settings, message):
    with pytest.raises(ConfigError, match=message):
        resolve({"env": "none", "algo": algo, **settings})
    resolve({"env": "none", "algo": algo, **ALL_AT_ONCE, "value_limit": 9.0})
    resolve({"env": "none", "algo": algo, **CROSSQ, "critic_lr_final": 1e-5, "critic_lr_decay_start": 9})
