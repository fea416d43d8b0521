import dataclasses

import pytest
import torch

from rsm_train.algorithms.common import Batch, copy_params, weight_health
from rsm_train.algorithms.dpmd import DPMD, DPMDConfig, policy_loss, resample, scale_q
from rsm_train.model.critic import choose_best, q_values
from rsm_train.model.networks import mlp_tail, sample_actions, split_denoiser

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
    target = algorithm.agent.critics.target
    assert target is not None
    with torch.no_grad():
        action = algorithm.agent.best_action(batch.next_obs, noise.next_action)
        next_q = q_values(target, batch.next_obs, action[:, None])[..., 0].min(0).values
        y = batch.reward + 0.99 * (1 - batch.terminated) * next_q
        q = q_values(algorithm.agent.critics.params, batch.obs, batch.action[:, None])[..., 0]
        wanted = (q - y).square().mean(1).sum()
    torch.testing.assert_close(algorithm.update(batch, noise)["critic_loss"], wanted)


def test_policy_loss_is_the_weighted_noise_error():
    algorithm = make()
    batch = random_batch(6)
    noise = algorithm.draw_noise(6, torch.Generator().manual_seed(1))
    action = torch.rand(6, 8, 2) * 2 - 1
    weight = torch.softmax(torch.randn(6, 8), 1)
    got = policy_loss(
        algorithm.agent.schedule, algorithm.agent.policy, batch.obs, action, weight, noise.t, noise.eps
    )
    params, schedule = algorithm.agent.policy, algorithm.agent.schedule
    total = 0.0
    from rsm_train.model.networks import embed_time

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


CHEAP = {"policy_chains": 2, "resample_actions": True}


@pytest.mark.parametrize(("scaling", "cheap"), [("raw", {}), ("state", {}), ("raw", CHEAP)])
def test_one_update_by_hand_with_every_network_different(scaling, cheap):
    """Networks, learning rates and temperature all differ, so none can be taken for another."""
    config = dataclasses.replace(
        SMALL, policy_lr=1e-3, critic_lr=3e-3, temperature=0.7, q_scaling=scaling, target_particles=3, **cheap
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
        clean = sample(average, batch.obs, noise.action)
        assert clean.shape[1] == (2 if cheap else 8)
        if cheap:
            clean = torch.stack([clean[:, k // 4] for k in range(8)], 1)
        proposals = (clean + 0.2 * noise.proposal).clamp(-1, 1)
        weights = policy_weights(
            q_values(algorithm.agent.critics.params, batch.obs, proposals).amin(0), 0.7, scaling
        )
        if cheap:
            chosen = [
                next(k for k in range(8) if weights[row, : k + 1].sum() > noise.choice[row])
                for row in range(12)
            ]
            assert len(set(chosen)) > 2
            proposals = torch.stack([proposals[row, k : k + 1] for row, k in enumerate(chosen)])
            weights = torch.ones(12, 1)
        loss = policy_loss(algorithm.agent.schedule, live, batch.obs, proposals, weights, noise.t, noise.eps)
    torch.testing.assert_close(metrics["policy_loss"], loss)
    # Adam's first step is the learning rate in every weight that has a gradient.
    for before, after, rate in (
        (live, algorithm.agent.policy, 1e-3),
        (critic, algorithm.agent.critics.params, 3e-3),
    ):
        moved = (after["layers.1.weight"].detach() - before["layers.1.weight"]).abs().max()
        assert moved.item() == pytest.approx(rate, rel=0.01)


def test_resampled_actions_have_the_weights_as_probabilities():
    rows = 40_000
    action = torch.arange(4.0).view(1, 4, 1).expand(rows, 4, 1)
    weight = torch.tensor([0.5, 0.0, 0.375, 0.125])
    uniform = torch.rand(rows, 1, generator=torch.Generator().manual_seed(0))
    chosen, ones = resample(action, weight.expand(rows, 4), uniform)
    shares = torch.bincount(chosen.flatten().long(), minlength=4) / rows
    torch.testing.assert_close(shares, weight, atol=0.01, rtol=0)
    assert shares[1] == 0
    assert torch.equal(ones, torch.ones(rows, 1))


def test_a_row_whose_sum_is_a_rounding_below_one_gives_its_last_action():
    chosen, _ = resample(
        torch.tensor([[[1.0], [2.0]]]), torch.tensor([[0.5, 0.4999]]), torch.tensor([[0.99995]])
    )
    assert chosen.item() == 2.0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"policy_chains": 3}, "policy_chains.*divisor of policy_samples, 8"),
        ({"policy_chains": 0}, "policy_chains.*>= 1"),
        ({"policy_chains": 2, "proposal_noise": 0.0}, "wanted proposal_noise > 0 with fewer policy_chains"),
        (
            {"resample_actions": True, "weighting": "exp", "q_scaling": "running"},
            "wanted weighting softmax with resample_actions, got exp",
        ),
    ],
)
def test_cheap_proposals_that_cannot_be_drawn_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(SMALL, **changes)


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
    q = q_values(algorithm.agent.critics.params, obs, (obs @ matrix.T)[:, None]).mean()
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


# --- the deviations of the published program, and the other settings, one by one -----------------------------


def test_q_scaling_by_hand():
    q = torch.tensor([[10.0, 14.0, 30.0]])
    mean, std = torch.tensor(12.0), torch.tensor(4.0)
    torch.testing.assert_close(scale_q(q, "running", mean, std), torch.tensor([[-0.5, 0.5, 3.0]]))
    # Deviation 1: q - mean / std, where 10 - 12 / 4 is far beyond the clip, and all weights are equal.
    assert scale_q(q, "running_slip", mean, std).tolist() == [[3.0, 3.0, 3.0]]
    low = scale_q(torch.tensor([[4.0]]), "running_slip", mean, std)
    torch.testing.assert_close(low, torch.tensor([[1.0]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scaling", ["running", "running_slip"])
def test_one_update_of_the_published_program_by_hand(scaling):
    """Deviations 1 to 4 at once: the pair (s', a') of the TD target, noisy and unclipped, weighted by exp."""
    config = dataclasses.replace(
        SMALL,
        policy_actions="backup",
        policy_samples=1,
        weighting="exp",
        q_scaling=scaling,
        noisy_backup=True,
        exploration_noise=0.8,
        critic_repeats=2,
        temperature=0.7,
        target_particles=3,
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
    with torch.no_grad():
        denoiser = split_denoiser(live, 5)
        particles = sample_actions(denoiser, agent.schedule, batch.next_obs, noise.next_action, prior_std=0.5)
        best = choose_best(particles, q_values(critic, batch.next_obs, particles).amin(0))[0]
        a_next = best + 0.8 * 0.7 * noise.exploration
        assert a_next.abs().max() > 1
        next_q = q_values(target, batch.next_obs, a_next[:, None])[..., 0].amin(0)
        y = batch.reward + 0.99 * (1 - batch.terminated) * next_q
        critic_loss = (q_values(critic, batch.obs, batch.action[:, None])[..., 0] - y).square().mean(1).sum()
    metrics = algorithm.update(batch, noise)
    torch.testing.assert_close(metrics["critic_loss"], critic_loss)
    with torch.no_grad():
        q = q_values(agent.critics.params, batch.next_obs, a_next[:, None]).amin(0)
        mean, std = 1e-3 * q.mean(), 1 + 1e-3 * (q.std(correction=0) - 1)
        scaled = (q - mean) / std if scaling == "running" else q - mean / std
        weight = (scaled.clamp(-3, 3) / 0.7).exp()
        loss = policy_loss(
            algorithm.agent.schedule, live, batch.next_obs, a_next[:, None], weight, noise.t, noise.eps
        )
    torch.testing.assert_close(metrics["policy_loss"], loss)
    # The second application of the same gradient moves about as far as the first.
    moved = (agent.critics.params["layers.1.weight"].detach() - critic["layers.1.weight"]).abs().max()
    assert moved.item() == pytest.approx(2 * SMALL.critic_lr, rel=0.05)


def test_pi_k_is_the_policy_of_the_last_copy():
    algorithm = make(dataclasses.replace(SMALL, old_policy_every=3))
    generator = torch.Generator().manual_seed(0)
    old = algorithm._policy_old
    assert old is not None
    for update in range(7):
        before = copy_params(algorithm.agent.policy)
        held = copy_params(old)
        algorithm.update(random_batch(), algorithm.draw_noise(16, generator))
        wanted = before if update % 3 == 0 else held
        for name, value in old.items():
            assert torch.equal(value, wanted[name]), (update, name)
    noise = algorithm.draw_noise(16, generator)
    with torch.no_grad():
        drawn = sample_actions(
            split_denoiser(old, 5), algorithm.agent.schedule, random_batch().obs, noise.action, prior_std=0.5
        )
    wanted_actions = (drawn + 0.2 * noise.proposal).clamp(-1, 1)
    torch.testing.assert_close(algorithm._propose(random_batch().obs, noise), wanted_actions)


def test_temperature_finds_the_wanted_kl():
    # With networks that stand still there is one temperature of this KL.
    config = dataclasses.replace(
        SMALL,
        temperature_schedule="kl",
        target_kl=0.3,
        q_scaling="raw",
        temperature=0.2,
        critic_lr=1e-12,
        policy_lr=1e-12,
    )
    algorithm = make(config)
    generator = torch.Generator().manual_seed(0)
    kl = []
    for _ in range(900):
        metrics = algorithm.update(random_batch(), algorithm.draw_noise(16, generator))
        kl.append(metrics["weight_kl_uniform"].item())
    assert kl[0] < 0.2
    assert sum(kl[-100:]) / 100 == pytest.approx(0.3, abs=0.05)


def test_temperature_rises_where_the_weights_are_too_sharp_and_only_with_its_schedule():
    tuned = make(dataclasses.replace(SMALL, temperature_schedule="kl", target_kl=0.3)).agent
    fixed = make().agent
    for kl, wanted in ((1.3, 0.01), (0.1, 0.01 - 0.002)):
        for agent in (tuned, fixed):
            agent.update_temperature(torch.tensor(kl))
        assert (tuned.log_alpha - fixed.log_alpha).item() == pytest.approx(wanted, rel=1e-4)
    assert fixed.temperature == pytest.approx(0.5)


def test_policy_learning_rate_falls_on_a_line():
    config = dataclasses.replace(
        SMALL,
        policy_lr=1e-3,
        policy_lr_final=2e-4,
        policy_lr_decay_start=2,
        policy_lr_decay_updates=4,
        policy_every=2,
    )
    algorithm = make(config)
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(16):
        algorithm.update(random_batch(), algorithm.draw_noise(16, generator))
        rates.append(algorithm.agent.policy_optimizer.learning_rate.item())
    wanted = [1e-3] * 3 + [8e-4, 6e-4, 4e-4] + [2e-4] * 2
    assert rates[1::2] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy_actions": "backup", "policy_samples": 1}, "weighting exp"),
        ({"policy_actions": "backup", "weighting": "exp", "q_scaling": "running"}, "policy_samples = 1"),
        ({"weighting": "exp"}, "q_scaling running"),
        ({"critic_std_factor": 0.5}, "mean_std"),
        ({"temperature_schedule": "kl", "policy_samples": 7}, "target_kl < log 7"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DPMDConfig(**settings)
