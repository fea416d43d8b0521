import dataclasses
import math

import numpy as np
import pytest
import torch

from rsm_train.algorithms.common import Batch, copy_params
from rsm_train.algorithms.sac import SAC, SACConfig, sample
from rsm_train.model.critic import q_values
from rsm_train.model.networks import gaussian, init_gaussian
from rsm_train.run.checkpoint import load_torch_policy
from tests.rsm_train.algorithms.test_dpmd import random_batch
from tests.rsm_train.runs import tiny_run

SMALL = SACConfig(width=32, policy_lr=2e-3, critic_lr=2e-3, tau=0.05)


def make(config=SMALL, obs=3, action=2, seed=0):
    return SAC(config, obs, action, generator=torch.Generator().manual_seed(seed))


def test_density_is_that_of_torchs_squashed_normal():
    g = torch.Generator().manual_seed(0)
    policy = init_gaussian(3, 2, [16], g)
    obs, noise = torch.randn(50, 3, generator=g), 2 * torch.randn(50, 2, generator=g)
    action, log_p = sample(policy, obs, noise)
    mean, log_std = gaussian(policy, obs)
    squash = torch.distributions.TanhTransform(cache_size=1)
    law = torch.distributions.TransformedDistribution(torch.distributions.Normal(mean, log_std.exp()), squash)
    torch.testing.assert_close(log_p, law.log_prob(squash(mean + log_std.exp() * noise)).sum(1))
    assert action.abs().max() < 1


def test_density_is_finite_where_tanh_is_1():
    policy = {"layers.0.weight": torch.zeros(4, 3), "layers.0.bias": torch.tensor([30.0, -30.0, 0.0, 0.0])}
    action, log_p = sample(policy, torch.zeros(1, 3), torch.zeros(1, 2))
    assert action.abs().tolist() == [[1.0, 1.0]]
    # log(1 - tanh(u)^2) -> 2 (log 2 - |u|)
    assert log_p.item() == pytest.approx(2 * (-0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - 30)), rel=1e-6)


def test_one_update_by_hand():
    algorithm = make(dataclasses.replace(SMALL, temperature=0.3, target_entropy=-0.7, reward_scale=0.5))
    agent = algorithm.agent
    g = torch.Generator().manual_seed(8)
    for params in agent.networks().values():
        for value in params.values():
            value.data += 0.1 * torch.randn(value.shape, generator=g)
    batch, noise = random_batch(12), algorithm.draw_noise(12, g)
    policy, critic, target = (
        copy_params(agent.networks()[name]) for name in ("policy", "critic", "critic_target")
    )
    next_action, next_log_p = sample(policy, batch.next_obs, noise.next_action)
    next_q = q_values(target, batch.next_obs, next_action[:, None])[..., 0].amin(0)
    y = 0.5 * batch.reward + 0.99 * (1 - batch.terminated) * (next_q - 0.3 * next_log_p)
    critic_loss = (q_values(critic, batch.obs, batch.action[:, None])[..., 0] - y).square().mean(1).sum()
    metrics = algorithm.update(batch, noise)
    torch.testing.assert_close(metrics["critic_loss"], critic_loss)
    action, log_p = sample(policy, batch.obs, noise.action)
    q = q_values(agent.critics.params, batch.obs, action[:, None])[..., 0].amin(0)
    torch.testing.assert_close(metrics["policy_loss"], (0.3 * log_p - q).mean().detach())
    torch.testing.assert_close(metrics["entropy"], -log_p.mean())
    # Entropy above its target lowers the temperature, by Adam's first step; below, it raises it.
    sign = 1 if -log_p.mean().item() < -0.7 * 2 else -1
    assert agent.temperature == pytest.approx(0.3 * math.exp(sign * 2e-3), rel=1e-5)
    expected = target["layers.1.weight"] + 0.05 * (
        agent.critics.params["layers.1.weight"] - target["layers.1.weight"]
    )
    torch.testing.assert_close(agent.critics.target["layers.1.weight"], expected.detach())


def test_the_policys_loss_does_not_move_the_critics():
    algorithm = make(dataclasses.replace(SMALL, critic_lr=1e-12))
    before = copy_params(algorithm.agent.critics.params)
    start = copy_params(algorithm.agent.policy)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        algorithm.update(random_batch(), algorithm.draw_noise(16, generator))
    for name, value in algorithm.agent.critics.params.items():
        torch.testing.assert_close(value.detach(), before[name], atol=1e-9, rtol=0)
    assert not torch.equal(algorithm.agent.policy["layers.1.weight"], start["layers.1.weight"])


def test_learns_a_quadratic_problem_and_tunes_its_entropy():
    matrix = torch.tensor([[0.5, -0.3, 0.1], [0.2, 0.4, -0.4]])
    algorithm = make(dataclasses.replace(SMALL, temperature=0.02))
    generator = torch.Generator().manual_seed(1)
    for _ in range(800):
        obs = torch.rand(128, 3, generator=generator) * 2 - 1
        action = torch.rand(128, 2, generator=generator) * 2 - 1
        reward = -(action - obs @ matrix.T).square().sum(1)
        batch = Batch(obs, action, reward, torch.zeros(128, 3), torch.ones(128))
        metrics = algorithm.update(batch, algorithm.draw_noise(128, generator))
    obs = torch.rand(200, 3, generator=generator) * 2 - 1
    mean = torch.tanh(gaussian(algorithm.agent.policy, obs)[0])
    assert (mean - obs @ matrix.T).square().sum(1).mean() < 0.02, "a uniform random policy has 0.9"
    assert metrics["entropy"].item() == pytest.approx(-2.0, abs=0.4)


def test_restored_sac_continues_bit_for_bit():
    first, second = make(), make(seed=9)
    generator = torch.Generator().manual_seed(5)
    noises = [first.draw_noise(16, generator) for _ in range(6)]
    for noise in noises[:3]:
        first.update(random_batch(), noise)
    networks = {name: copy_params(params) for name, params in first.agent.networks().items()}
    state = {name: value.detach().clone() for name, value in first.agent.state().items()}
    second.agent.restore(networks, state, first.agent.updates)
    for noise in noises[3:]:
        ours, theirs = first.update(random_batch(), noise), second.update(random_batch(), noise)
    assert ours == theirs
    assert first.agent.temperature == second.agent.temperature


def test_a_deterministic_request_gets_the_mean_and_a_seed_a_sample(tmp_path):
    policy = load_torch_policy(tiny_run(tmp_path / "run", algo="sac", particles=None))
    obs = torch.randn(5, 4).numpy()
    zero = np.zeros((5, 1, 1, 1), np.float32)
    assert (policy.act(obs, deterministic=True).action == policy.act(obs, noise=zero).action).all()
    assert (policy.act(obs, seed=1).action != policy.act(obs, seed=2).action).all()
    assert (policy.spec.algorithm, policy.spec.noise_shape) == ("sac", (1, 1, 1))
