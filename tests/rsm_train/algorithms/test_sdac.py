import dataclasses

import pytest
import torch

from rsm_train.algorithms.common import Batch, copy_params
from rsm_train.algorithms.sdac import SDAC, SDACConfig, policy_loss, truncated_reverse, untruncated_reverse
from rsm_train.model.critic import choose_best, q_values
from rsm_train.model.diffusion import forward_noise, make_schedule
from rsm_train.model.networks import observe, predict_noise, sample_actions, split_denoiser
from tests.rsm_train.algorithms.test_dpmd import random_batch

SMALL = SDACConfig(
    diffusion_steps=5,
    particles=4,
    target_particles=3,
    proposal_particles=3,
    reverse_samples=8,
    prior_std=0.5,
    width=32,
    depth=2,
    policy_lr=2e-3,
    critic_lr=2e-3,
    policy_every=1,
    tau=0.05,
    reward_scale=1.0,
    temperature_schedule="constant",
    temperature=0.5,
    temperature_scale=1.0,
)


def make(config=SMALL, obs=3, action=2, seed=0):
    return SDAC(config, obs, action, generator=torch.Generator().manual_seed(seed))


def draws(schedule, t, a_t, count=200_000, seed=0):
    uniform = torch.rand(1, count, 1, generator=torch.Generator().manual_seed(seed))
    return truncated_reverse(schedule, torch.full((1, 1, 1), a_t), torch.full((1, 1), t), uniform)


@pytest.mark.parametrize(
    ("t", "a_t"), [(0, 0.97), (0, 1.75), (0, -3.1), (3, -0.5), (10, 1.4), (18, -2.5), (19, 3.9), (19, -0.01)]
)
def test_truncated_draws_have_the_law_of_rejection(t, a_t):
    """Against the same law computed the other way: actions of the box, weighted by how they explain a_t."""
    schedule = make_schedule("cosine", 20)
    eps, action = draws(schedule, t, a_t)
    assert action.min() >= -1
    assert action.max() <= 1
    signal, noise = schedule.sqrt_alpha_bars[t].item(), schedule.sqrt_one_minus_alpha_bars[t].item()
    grid = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    weight = torch.softmax(-0.5 * ((a_t - signal * grid) / noise).square(), 0)
    mean = (weight * grid).sum()
    std = (weight * (grid - mean).square()).sum().sqrt()
    assert action.mean().item() == pytest.approx(mean.item(), abs=5 * std.item() / 200_000**0.5 + 1e-4)
    assert action.std().item() == pytest.approx(std.item(), rel=0.02)
    assert torch.unique(action).numel() > 1000
    torch.testing.assert_close(signal * action + noise * eps, torch.full_like(eps, a_t), atol=2e-4, rtol=0)


def test_where_no_probability_is_left_the_draw_is_the_nearest_action():
    _, action = draws(make_schedule("cosine", 20), 0, 9.0, count=100)
    assert (action == 1).all()
    _, action = draws(make_schedule("cosine", 20), 0, -9.0, count=100)
    assert (action == -1).all()


def test_untruncated_draws_are_standard_normal():
    schedule = make_schedule("cosine", 20)
    uniform = torch.rand(1, 100_000, 1, generator=torch.Generator().manual_seed(0))
    a_t, t = torch.full((1, 1, 1), 0.7), torch.full((1, 1), 5)
    eps, action = untruncated_reverse(schedule, a_t, t, uniform)
    assert eps.mean().item() == pytest.approx(0, abs=0.02)
    assert eps.std().item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(forward_noise(schedule, action, t.expand(1, 100_000), eps), a_t.expand_as(eps))
    assert torch.isfinite(untruncated_reverse(schedule, a_t, t, torch.zeros(1, 1, 1))[0]).all()


def test_weighted_terms_and_the_weighted_mean_target_give_the_same_gradient():
    algorithm = make()
    g = torch.Generator().manual_seed(0)
    obs, a_t, t = torch.randn(6, 3, generator=g), torch.randn(6, 1, 2, generator=g), torch.full((6, 1), 2)
    eps = torch.randn(6, 8, 2, generator=g)
    weight = torch.softmax(torch.randn(6, 8, generator=g), 1)
    params = algorithm.agent.policy

    def gradient(loss):
        return torch.cat([value.flatten() for value in torch.autograd.grad(loss, list(params.values()))])

    target = (weight.unsqueeze(2) * eps).sum(1, keepdim=True)
    ours = gradient(policy_loss(5, params, obs, a_t, t, target))
    denoiser = split_denoiser(params, 5)
    predicted = predict_noise(denoiser, observe(denoiser, obs), a_t, t)
    terms = (weight.unsqueeze(2) * (predicted - eps).square()).sum(1).mean()
    torch.testing.assert_close(ours, gradient(terms), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("reverse", "proposals"), [("truncated", "policy"), ("clipped", "policy"), ("truncated", "replay")]
)
def test_one_update_by_hand_with_every_network_different(reverse, proposals):
    config = dataclasses.replace(
        SMALL,
        policy_lr=1e-3,
        critic_lr=3e-3,
        temperature=0.7,
        temperature_scale=0.6,
        reverse_draws=reverse,
        proposal_actions=proposals,
    )
    algorithm = make(config)
    agent = algorithm.agent
    g = torch.Generator().manual_seed(8)
    for params in agent.networks().values():
        for value in params.values():
            value.data += 0.1 * torch.randn(value.shape, generator=g)
    batch, noise = random_batch(12), algorithm.draw_noise(12, g)
    live, critic, target = (
        copy_params(agent.networks()[name]) for name in ("policy", "critic", "critic_target")
    )

    def best(obs, z):
        particles = sample_actions(split_denoiser(live, 5), agent.schedule, obs, z, prior_std=0.5)
        return particles, obs

    with torch.no_grad():
        particles, obs = best(batch.next_obs, noise.next_action)
        a_next = choose_best(particles, q_values(critic, obs, particles).amin(0))[0]
        y = batch.reward + 0.99 * (1 - batch.terminated) * q_values(target, obs, a_next[:, None])[..., 0].amin(
            0
        )
        critic_loss = (q_values(critic, batch.obs, batch.action[:, None])[..., 0] - y).square().mean(1).sum()
    metrics = algorithm.update(batch, noise)
    torch.testing.assert_close(metrics["critic_loss"], critic_loss)
    with torch.no_grad():
        obs, proposal = batch.obs, batch.action
        assert noise.action.shape[2] == (3 if proposals == "policy" else 0)
        if proposals == "policy":
            particles, obs = best(batch.obs, noise.action)
            proposal = choose_best(particles, q_values(agent.critics.params, obs, particles).amin(0))[0]
        a_t = forward_noise(agent.schedule, proposal[:, None], noise.t, noise.eps)
        reverse_draw = truncated_reverse if reverse == "truncated" else untruncated_reverse
        eps, clean = reverse_draw(agent.schedule, a_t, noise.t, noise.reverse)
        outside = (clean.abs() > 1).float().mean()
        q = q_values(agent.critics.params, obs, clean.clamp(-1, 1)).amin(0)
        weight = torch.softmax(q / (0.7 * 0.6), 1)
        wanted = (weight.unsqueeze(2) * eps).sum(1, keepdim=True)
        denoiser = split_denoiser(live, 5)
        predicted = predict_noise(denoiser, observe(denoiser, obs), a_t, noise.t)
    torch.testing.assert_close(metrics["policy_loss"], (predicted - wanted).square().mean())
    if reverse == "clipped":
        torch.testing.assert_close(metrics["reverse_clipped"] * 2, outside * 2)
        assert outside > 0
    moved = (agent.policy["layers.1.weight"].detach() - live["layers.1.weight"]).abs().max()
    assert moved.item() == pytest.approx(1e-3, rel=0.01)


def test_noisy_backup_moves_what_is_learnt_from_and_is_not_clipped():
    calm, noisy = make(), make(dataclasses.replace(SMALL, noisy_backup=True, exploration_noise=10.0))
    noise = calm.draw_noise(16, torch.Generator().manual_seed(0))
    obs = random_batch().obs
    plain = calm.agent.backup_action(obs, noise.next_action, noise.exploration)
    moved = noisy.agent.backup_action(obs, noise.next_action, noise.exploration)
    torch.testing.assert_close(moved, plain + 10.0 * 0.5 * noise.exploration)
    assert moved.abs().max() > 1


def test_learns_a_quadratic_problem_to_its_closed_form_optimum():
    """One step, reward -|a - W s|^2 and a low temperature: the optimal action is W s."""
    matrix = torch.tensor([[0.5, -0.3, 0.1], [0.2, 0.4, -0.4]])
    algorithm = make(dataclasses.replace(SMALL, reverse_samples=32, temperature=0.05))
    generator = torch.Generator().manual_seed(1)
    for _ in range(800):
        obs = torch.rand(128, 3, generator=generator) * 2 - 1
        action = torch.rand(128, 2, generator=generator) * 2 - 1
        reward = -(action - obs @ matrix.T).square().sum(1)
        batch = Batch(obs, action, reward, torch.zeros(128, 3), torch.ones(128))
        algorithm.update(batch, algorithm.draw_noise(128, generator))
    obs = torch.rand(200, 3, generator=generator) * 2 - 1
    action = algorithm.agent.act(obs, torch.randn(200, 5, 4, 2, generator=generator), torch.zeros(200, 2))
    error = (action - obs @ matrix.T).square().sum(1)
    assert error.mean() < 0.05, "a uniform random policy has 0.9"


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="reverse_samples"):
        SDACConfig(reverse_samples=0)
