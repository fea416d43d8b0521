import dataclasses

import pytest
import torch

from rsm_train.algorithms.common import Batch, copy_params, td_target, weight_health
from rsm_train.algorithms.dpmd import DPMD, DPMDConfig, scale_q
from rsm_train.critic import choose_best, q_values
from rsm_train.networks import mlp_tail, sample_actions, split_denoiser

SMALL = DPMDConfig(
    diffusion_steps=5,
    particles=4,
    prior_std=0.5,
    policy_samples=8,
    width=32,
    depth=2,
    policy_lr=2e-3,
    critic_lr=2e-3,
    policy_every=1,
    tau=0.05,
    reward_scale=1.0,
    temperature_schedule="constant",
    temperature=0.5,
    q_scaling="state",
    proposal_noise=0.2,
)


def policy_weights(q, temperature, scaling):
    zero, one = torch.zeros(()), torch.ones(())
    return torch.softmax(scale_q(q, scaling, zero, one) / temperature, dim=1)


def make(config=SMALL, obs=3, action=2, seed=0):
    return DPMD(config, obs, action, generator=torch.Generator().manual_seed(seed))


def random_batch(rows=16, obs=3, action=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Batch(
        obs=torch.randn(rows, obs, generator=g),
        action=torch.rand(rows, action, generator=g) * 2 - 1,
        reward=torch.randn(rows, generator=g),
        next_obs=torch.randn(rows, obs, generator=g),
        terminated=(torch.rand(rows, generator=g) < 0.5).float(),
    )


def test_td_target_by_hand():
    batch = dataclasses.replace(
        random_batch(2), reward=torch.tensor([1.0, 1.0]), terminated=torch.tensor([0.0, 1.0])
    )
    y = td_target(batch, torch.tensor([10.0, 10.0]), gamma=0.9, reward_scale=0.2)
    torch.testing.assert_close(y, torch.tensor([9.2, 0.2]))


def test_policy_weights_by_hand():
    q = torch.tensor([[1.0, 2.0, 3.0]])
    torch.testing.assert_close(policy_weights(q, 2.0, "raw"), torch.softmax(torch.tensor([[0.5, 1.0, 1.5]]), 1))
    standard = torch.tensor([[-1.0, 0.0, 1.0]]) * (3 / 2) ** 0.5  # population std is sqrt(2/3)
    torch.testing.assert_close(
        policy_weights(q, 1.0, "state"), torch.softmax(standard, 1), atol=1e-5, rtol=1e-5
    )
    # Neither an offset per state nor, when standardised, a scale changes the weights.
    torch.testing.assert_close(policy_weights(q + 100, 2.0, "raw"), policy_weights(q, 2.0, "raw"))
    torch.testing.assert_close(
        policy_weights(7 * q - 3, 1.0, "state"), policy_weights(q, 1.0, "state"), atol=1e-5, rtol=1e-5
    )


def test_weight_health_by_hand():
    even = weight_health(torch.full((2, 4), 0.25))
    assert even["weight_ess_fraction"] == 1.0
    assert even["weight_kl_uniform"].item() == pytest.approx(0.0, abs=1e-6)
    one = weight_health(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert one["weight_ess_fraction"] == 0.25
    assert one["weight_max"] == 1.0
    assert one["weight_kl_uniform"].item() == pytest.approx(1.3862944)


def test_critic_regresses_on_the_td_target():
    algorithm = make()
    batch = random_batch(64)
    noise = algorithm.draw_noise(64, torch.Generator().manual_seed(1))
    with torch.no_grad():
        action = algorithm.agent.best_action(batch.next_obs, noise.next_action)
        next_q = q_values(algorithm.agent.critic_target, batch.next_obs, action[:, None])[..., 0].min(0).values
        y = batch.reward + 0.99 * (1 - batch.terminated) * next_q
        q = q_values(algorithm.agent.critic, batch.obs, batch.action[:, None])[..., 0]
        wanted = (q - y).square().mean(1).sum()
    torch.testing.assert_close(algorithm.update(batch, noise)["critic_loss"], wanted)


def test_policy_loss_is_the_weighted_noise_error():
    algorithm = make()
    batch = random_batch(6)
    noise = algorithm.draw_noise(6, torch.Generator().manual_seed(1))
    action = torch.rand(6, 8, 2) * 2 - 1
    weight = torch.softmax(torch.randn(6, 8), 1)
    got = algorithm._loss(batch.obs, action, weight, noise)
    params, schedule = algorithm.agent.policy, algorithm.agent.schedule
    total = 0.0
    from rsm_train.networks import embed_time

    embedding = embed_time(params, 5)
    for b in range(6):
        for k in range(8):
            t = int(noise.t[b, k])
            alpha_bar = schedule.alpha_bars[t]
            noisy = alpha_bar.sqrt() * action[b, k] + (1 - alpha_bar).sqrt() * noise.eps[b, k]
            x = torch.cat([batch.obs[b], noisy, embedding[t]])
            first = params["layers.0.weight"] @ x + params["layers.0.bias"]
            error = mlp_tail(params, first) - noise.eps[b, k]
            total = total + weight[b, k] * error.square().mean() / 6
    torch.testing.assert_close(got, torch.as_tensor(total), atol=1e-5, rtol=1e-4)


def test_update_moves_what_it_should_when_it_should():
    algorithm = make(dataclasses.replace(SMALL, policy_every=2))
    generator = torch.Generator().manual_seed(0)

    def snapshot():
        return {
            name: torch.cat([value.detach().flatten() for value in params.values()]).clone()
            for name, params in algorithm.agent.networks().items()
        }

    start = snapshot()
    first = algorithm.update(random_batch(), algorithm.draw_noise(16, generator))
    middle = snapshot()
    assert "policy_loss" not in first
    assert not torch.equal(middle["critic"], start["critic"])
    for name in ("policy", "policy_average", "critic_target"):
        assert torch.equal(middle[name], start[name]), name
    second = algorithm.update(random_batch(), algorithm.draw_noise(16, generator))
    assert "policy_loss" in second
    end = snapshot()
    for name in end:
        assert not torch.equal(end[name], middle[name]), name
    expected = middle["critic_target"] + 0.05 * (end["critic"] - middle["critic_target"])
    torch.testing.assert_close(end["critic_target"], expected)
    for value in second.values():
        assert not value.requires_grad


def test_same_seed_same_networks_and_updates():
    results = []
    for _ in range(2):
        algorithm = make(seed=3)
        generator = torch.Generator().manual_seed(4)
        for _ in range(5):
            metrics = algorithm.update(random_batch(), algorithm.draw_noise(16, generator))
        results.append((metrics["policy_loss"].item(), algorithm.agent.policy["layers.1.weight"].sum().item()))
    assert results[0] == results[1]
    assert (
        make(seed=5).agent.policy["layers.1.weight"].sum() != make(seed=3).agent.policy["layers.1.weight"].sum()
    )


@pytest.mark.parametrize("scaling", ["raw", "state"])
def test_one_update_by_hand_with_every_network_different(scaling):
    """Networks, learning rates and temperature all differ, so none can be taken for another."""
    config = dataclasses.replace(
        SMALL, policy_lr=1e-3, critic_lr=3e-3, temperature=0.7, q_scaling=scaling, target_particles=3
    )
    algorithm = make(config)
    g = torch.Generator().manual_seed(8)
    for params in algorithm.agent.networks().values():
        for value in params.values():
            value.data += 0.1 * torch.randn(value.shape, generator=g)
    batch, noise = random_batch(12), algorithm.draw_noise(12, g)
    assert set(algorithm.draw_noise(200, g).t.flatten().tolist()) == set(range(5))
    live, average = (copy_params(algorithm.agent.networks()[name]) for name in ("policy", "policy_average"))
    critic, target = (copy_params(algorithm.agent.networks()[name]) for name in ("critic", "critic_target"))

    def sample(params, obs, z):
        return sample_actions(split_denoiser(params, 5), algorithm.agent.schedule, obs, z, prior_std=0.5)

    with torch.no_grad():
        particles = sample(live, batch.next_obs, noise.next_action)
        next_action = choose_best(particles, q_values(critic, batch.next_obs, particles).amin(0))[0]
        next_q = q_values(target, batch.next_obs, next_action[:, None])[..., 0].amin(0)
        y = batch.reward + 0.99 * (1 - batch.terminated) * next_q
        critic_loss = (q_values(critic, batch.obs, batch.action[:, None])[..., 0] - y).square().mean(1).sum()
    metrics = algorithm.update(batch, noise)
    torch.testing.assert_close(metrics["critic_loss"], critic_loss)
    with torch.no_grad():
        proposals = (sample(average, batch.obs, noise.action) + 0.2 * noise.proposal).clamp(-1, 1)
        weights = policy_weights(q_values(algorithm.agent.critic, batch.obs, proposals).amin(0), 0.7, scaling)
        algorithm.agent.policy, now = live, algorithm.agent.policy
        loss = algorithm._loss(batch.obs, proposals, weights, noise)
        algorithm.agent.policy = now
    torch.testing.assert_close(metrics["policy_loss"], loss)
    # Adam's first step is the learning rate in every weight that has a gradient.
    for before, after, rate in ((live, now, 1e-3), (critic, algorithm.agent.critic, 3e-3)):
        moved = (after["layers.1.weight"].detach() - before["layers.1.weight"]).abs().max()
        assert moved.item() == pytest.approx(rate, rel=0.01)


def test_exploration_noise_is_added_in_units_of_the_temperature():
    config = dataclasses.replace(SMALL, temperature=2.0, exploration_noise=0.05)
    algorithm = make(config)
    obs, noise = torch.randn(50, 3), torch.randn(50, 5, 4, 2)
    calm = algorithm.agent.act(obs, noise, torch.zeros(50, 2))
    moved = algorithm.agent.act(obs, noise, torch.ones(50, 2))
    torch.testing.assert_close(moved, (calm + 0.1).clamp(-1, 1))
    assert algorithm.agent.act(obs, noise, 100 * torch.ones(50, 2)).max() <= 1


def test_learns_a_quadratic_problem_to_its_closed_form_optimum():
    """One step, reward -|a - W s|^2: the optimal action is W s and its value is 0."""
    torch.manual_seed(0)
    matrix = torch.tensor([[0.5, -0.3, 0.1], [0.2, 0.4, -0.4]])
    algorithm = make()
    generator = torch.Generator().manual_seed(1)
    for _ in range(600):
        obs = torch.rand(128, 3, generator=generator) * 2 - 1
        action = torch.rand(128, 2, generator=generator) * 2 - 1
        reward = -(action - obs @ matrix.T).square().sum(1)
        batch = Batch(obs, action, reward, torch.zeros(128, 3), torch.ones(128))
        algorithm.update(batch, algorithm.draw_noise(128, generator))
    obs = torch.rand(200, 3, generator=generator) * 2 - 1
    noise = torch.randn(200, 5, 4, 2, generator=generator)
    action = algorithm.agent.act(obs, noise, torch.zeros(200, 2))
    error = (action - obs @ matrix.T).square().sum(1)
    assert error.mean() < 0.02, "a uniform random policy has 0.9"
    q = q_values(algorithm.agent.critic, obs, (obs @ matrix.T)[:, None]).mean()
    assert abs(q.item()) < 0.1


@pytest.mark.parametrize(
    ("name", "value"),
    [("particles", 0), ("policy_lr", 0.0), ("gamma", 1.1), ("exploration_noise", -1.0), ("temperature", 0.0)],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        DPMDConfig(**{name: value})


def test_restored_algorithm_continues_bit_for_bit():
    noise_generator = torch.Generator().manual_seed(5)
    first = make()
    noises = [first.draw_noise(16, noise_generator) for _ in range(6)]
    for noise in noises[:3]:
        first.update(random_batch(), noise)
    saved_networks = {name: copy_params(params) for name, params in first.agent.networks().items()}
    saved_state = {name: value.clone() for name, value in first.agent.state().items()}
    second = make(seed=9)
    second.agent.restore(saved_networks, saved_state, first.agent.updates)
    for noise in noises[3:]:
        first.update(random_batch(), noise)
        second.update(random_batch(), noise)
    assert second.agent.updates == 6
    for (name, ours), theirs in zip(
        first.agent.networks().items(), second.agent.networks().values(), strict=True
    ):
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), (name, key)


def test_restore_refuses_another_shape():
    first = make()
    networks = {name: dict(params) for name, params in first.agent.networks().items()}
    networks["critic"]["layers.0.bias"] = torch.zeros(2, 33)
    with pytest.raises(ValueError, match="wanted shape"):
        make().agent.restore(networks, {}, 0)
