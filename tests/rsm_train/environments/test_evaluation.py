"""Best of N and one particle, evaluated in one batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rsm_eval.envs import EnvPool
from rsm_eval.rollout import action_seeds, episode_seeds, rollout
from rsm_train.environments.evaluation import both_ways, evaluate
from rsm_train.policy import TorchPolicy
from rsm_train.run.checkpoint import load_torch_policy
from tests.rsm_train.runs import tiny_run

SEEDS = episode_seeds(5, 6)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return load_torch_policy(tiny_run(tmp_path_factory.mktemp("runs") / "tiny"))


@pytest.fixture(scope="module")
def pool():
    with EnvPool("InvertedPendulum-v5") as pool:
        yield pool


def one_particle(policy):
    return TorchPolicy(dataclasses.replace(policy.spec, particles=1), policy.weights)


def test_both_ways_are_those_of_policies_of_their_own(policy, pool):
    evaluation = evaluate(policy, pool, SEEDS)
    assert evaluation.returns == rollout(policy, pool, SEEDS).returns.tolist()
    assert evaluation.one_particle == rollout(one_particle(policy), pool, SEEDS).returns.tolist()
    assert evaluation.returns != evaluation.one_particle


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, 4, 5], [0, 2, 4], [1, 2], [4, 5]])
def test_every_row_is_answered_as_if_alone(policy, numbers):
    obs = np.random.default_rng(1).normal(scale=0.1, size=(len(numbers), 4)).astype(np.float32)
    seeds = np.array([action_seeds(number, 1)[0] for number in numbers])
    result = both_ways(policy, 3)(obs, seeds, np.array(numbers))
    for row, number in enumerate(numbers):
        alone = (policy if number < 3 else one_particle(policy)).act(obs[row], seed=int(seeds[row]))
        np.testing.assert_allclose(result.action[row], alone.action, atol=1e-5)
        assert result.q is not None
        np.testing.assert_allclose(result.q[row], alone.q, atol=1e-4)


def test_all_episodes_are_one_batch_and_particles_are_its_rows(policy, pool, monkeypatch):
    rows = []
    act = TorchPolicy.act

    def counting(self, obs, **arguments):
        rows.append(len(obs))
        return act(self, obs, **arguments)

    monkeypatch.setattr(TorchPolicy, "act", counting)
    evaluate(policy, pool, episode_seeds(5, 40), max_steps=2)
    assert rows == [40 * 4 + 40] * 2


def test_one_particle_can_be_left_out_and_costs_nothing_where_there_is_no_other(policy, pool):
    assert evaluate(policy, pool, SEEDS, one_particle=False).one_particle is None
    alone = evaluate(one_particle(policy), pool, SEEDS)
    assert alone.one_particle == alone.returns
