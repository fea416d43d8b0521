"""Rollouts: exact returns, episodes that end at different times, seeds, reproducibility."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from rsm_common.errors import BackendError, ConfigError, UnsupportedEnvError
from rsm_common.policy import Timing
from rsm_common.seeds import expand_seed
from rsm_eval.envs import EnvPool, make_env
from rsm_eval.latency import measure_latency
from rsm_eval.rollout import action_seeds, episode_seeds, rollout
from tests.rsm_eval import tiny_env
from tests.rsm_eval.policies import FunctionPolicy, balancer, constant

ENV = tiny_env.ENV_ID


def noisy() -> FunctionPolicy:
    return FunctionPolicy(ENV, lambda obs, noise: 0.1 * noise + obs[:, :1])


def test_returns_lengths_and_ends_are_exact():
    result = rollout(constant(ENV, 0.5), ENV, range(8))
    assert result.lengths.tolist() == [3, 4, 5, 5, 3, 4, 5, 5]
    assert result.returns.tolist() == [1.5, 2.0, 2.5, 2.5, 1.5, 2.0, 2.5, 2.5]
    assert result.terminated.tolist() == [True, True, True, False] * 2
    # The terminal state of seed 2 and the time limit fall on the same step: Gymnasium reports both.
    assert result.truncated.tolist() == [False, False, True, True] * 2
    assert result.episode_seeds.tolist() == list(range(8))
    assert result.steps == 34


def test_a_finished_episode_is_not_restarted_and_leaves_the_batch():
    tiny_env.RESETS.clear()
    policy = constant(ENV, 1.0)
    rollout(policy, ENV, [0, 1, 2, 3])
    assert tiny_env.RESETS == [0, 1, 2, 3]
    assert policy.calls == [4, 4, 4, 3, 2]


def test_max_steps_truncates():
    result = rollout(constant(ENV, 1.0), ENV, [0, 1], max_steps=3)
    assert result.lengths.tolist() == [3, 3]
    assert result.terminated.tolist() == [True, False]
    assert result.truncated.tolist() == [False, True]


def test_large_batches_are_split_without_changing_anything():
    policy, whole = noisy(), rollout(noisy(), ENV, range(7))
    split = rollout(policy, ENV, range(7), max_batch_rows=3)
    assert policy.calls[:3] == [3, 3, 1]
    assert max(policy.calls) == 3
    np.testing.assert_array_equal(split.returns, whole.returns)


def test_an_episode_does_not_depend_on_its_company():
    together = rollout(noisy(), ENV, [5, 6, 7, 0])
    for index, seed in enumerate([5, 6, 7, 0]):
        alone = rollout(noisy(), ENV, [seed])
        assert alone.returns[0] == together.returns[index]
        assert alone.lengths[0] == together.lengths[index]
    assert len(set(together.returns.tolist())) == 4


def test_action_k_is_sampled_with_the_documented_seed():
    seed = 11
    result = rollout(noisy(), ENV, [3, seed], record=1)
    policy, env = noisy(), make_env(ENV)
    assert result.trajectory is not None
    obs, _ = env.reset(seed=seed)
    total = 0.0
    for step in range(tiny_env.expected_length(seed)):
        action = policy.act(obs, seed=int(action_seeds(seed, step + 1)[step])).action
        np.testing.assert_array_equal(result.trajectory.actions[step], action)
        obs, reward, *_ = env.step(action)
        total += float(reward)
    assert total == result.returns[1]


def test_seed_sequences_are_those_of_expand_seed_and_extend():
    assert episode_seeds(4, 3).tolist() == expand_seed(4, 3).tolist()
    assert episode_seeds(4, 9)[:3].tolist() == episode_seeds(4, 3).tolist()
    assert action_seeds(4, 5).tolist() == expand_seed(4 ^ 0x4143_5449_4F4E_5321, 5).tolist()
    assert not set(action_seeds(4, 50).tolist()) & set(episode_seeds(4, 50).tolist())


def test_seeds_of_64_bits_reset_environments_that_take_32(monkeypatch):
    monkeypatch.setattr(tiny_env, "RESETS", [])
    policy = constant(ENV, 1.0)
    result = rollout(policy, ENV, [2**64 - 1, 2**32 + 7, 7], record=0)
    measure_latency(policy, ENV, calls=1, warmup_calls=0, seed=2**32 + 7)
    assert tiny_env.RESETS[:4] == [2**32 - 1, 7, 7, 7]
    assert result.lengths.tolist() == [tiny_env.expected_length(seed) for seed in (2**64 - 1, 7, 7)]
    assert result.episode_seeds.tolist() == [2**64 - 1, 2**32 + 7, 7]
    assert result.trajectory is not None
    assert result.trajectory.episode_seed == 2**64 - 1, "the whole seed, which the actions have too"


def test_deterministic_actions_are_asked_for():
    policy = noisy()
    rollout(policy, ENV, [0], deterministic=True)
    assert all(policy.deterministic)
    rollout(policy, ENV, [0])
    assert not policy.deterministic[-1]


def test_the_recorded_trajectory_is_the_episode():
    result = rollout(noisy(), ENV, [1, 3], record=1)
    trajectory = result.trajectory
    assert trajectory is not None
    assert trajectory.episode_seed == 3
    assert trajectory.observations.shape == (6, 4)
    assert trajectory.actions.shape == (5, 2)
    assert trajectory.observations[:, 1].tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(trajectory.rewards, trajectory.actions[:, 0])
    assert trajectory.rewards.sum() == result.returns[1]
    assert rollout(noisy(), ENV, [1]).trajectory is None


def test_timings_keep_the_policys_split_and_measure_the_total():
    policy = FunctionPolicy(ENV, lambda obs, noise: noise * 0, Timing(queue_us=1, compute_us=2, total_us=-1))
    result = rollout(policy, ENV, [0, 3])
    assert len(result.timings) == 5
    assert {(timing.queue_us, timing.compute_us) for timing in result.timings} == {(1, 2)}
    assert all(timing.total_us > 0 for timing in result.timings)
    assert result.policy_s == pytest.approx(sum(timing.total_us for timing in result.timings) / 1e6)
    assert 0 < result.policy_s < result.wall_s


def test_environments_of_a_pool_give_what_fresh_ones_give():
    fresh = [rollout(noisy(), ENV, seeds) for seeds in ([1, 2, 3], [4, 5])]
    with EnvPool(ENV) as pool:
        reused = [rollout(noisy(), pool, seeds) for seeds in ([1, 2, 3], [4, 5])]
    for a, b in zip(fresh, reused, strict=True):
        np.testing.assert_array_equal(a.returns, b.returns)


def test_a_balancing_controller_keeps_the_pendulum_up():
    result = rollout(balancer(), "InvertedPendulum-v5", episode_seeds(0, 3))
    assert result.returns.tolist() == [1000.0] * 3
    assert result.truncated.all()
    assert not result.terminated.any()


def test_mujoco_episodes_repeat_alone_and_in_a_used_pool():
    seeds = [1, 2, 3]
    with EnvPool("InvertedPendulum-v5") as pool:
        first = rollout(balancer(4.0), pool, seeds, record=2, max_steps=150)
        again = rollout(balancer(4.0), pool, seeds[::-1], record=0, max_steps=150)
    alone = rollout(balancer(4.0), "InvertedPendulum-v5", [3], record=0, max_steps=150)
    np.testing.assert_array_equal(first.lengths, again.lengths[::-1])
    assert first.trajectory is not None
    for other in (again, alone):
        assert other.trajectory is not None
        np.testing.assert_array_equal(first.trajectory.observations, other.trajectory.observations)
        np.testing.assert_array_equal(first.trajectory.actions, other.trajectory.actions)


@pytest.mark.parametrize(
    ("seeds", "options"),
    [([], {}), ([1], {"max_steps": 0}), ([1], {"max_batch_rows": 0}), ([1], {"record": 1})],
)
def test_senseless_arguments_are_refused(seeds, options):
    with pytest.raises(ConfigError, match="wanted"):
        rollout(constant(ENV, 0.0), ENV, seeds, **options)


def test_a_policy_of_another_environment_is_refused():
    with pytest.raises(UnsupportedEnvError, match="InvertedPendulum-v5"):
        rollout(balancer(), ENV, [1])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_diverged_policy_is_reported_not_simulated(value, monkeypatch):
    policy = constant(ENV, 0.0)
    act = policy.act

    def broken(*arguments, **options):
        result = act(*arguments, **options)
        result.action[0, 0] = value
        return result

    monkeypatch.setattr(policy, "act", broken)
    with pytest.raises(BackendError, match="finite actions"):
        rollout(policy, ENV, [1])


def test_rollout_needs_neither_plots_nor_torch():
    heavy = ["torch", "matplotlib", "scipy", "grpc"]
    code = f"import sys, rsm_eval.rollout; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
