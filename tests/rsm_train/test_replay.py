import pytest
import torch

from rsm_train.algorithms.common import Batch
from rsm_train.replay import ReplayBuffer


def rows(first, count):
    values = torch.arange(first, first + count, dtype=torch.float32)
    return Batch(
        obs=values[:, None].repeat(1, 2),
        action=values[:, None],
        reward=values,
        next_obs=values[:, None].repeat(1, 2) + 0.5,
        terminated=(values % 2),
    )


def test_ring_overwrites_the_oldest_and_keeps_rows_together():
    replay = ReplayBuffer(10, 2, 1)
    for first in range(0, 21, 3):
        replay.add(rows(first, 3))
    assert len(replay) == 10
    batch = replay.sample(2000, torch.Generator().manual_seed(0))
    assert sorted(set(batch.reward.tolist())) == list(range(11, 21))
    assert torch.equal(batch.obs[:, 1], batch.reward)
    assert torch.equal(batch.next_obs[:, 0], batch.reward + 0.5)
    assert torch.equal(batch.action[:, 0], batch.reward)
    assert torch.equal(batch.terminated, batch.reward % 2)


def test_sampling_is_uniform_and_only_over_what_was_stored():
    replay = ReplayBuffer(1000, 2, 1)
    replay.add(rows(1, 4))
    rewards = replay.sample(8000, torch.Generator().manual_seed(0)).reward
    for value in (1, 2, 3, 4):
        assert (rewards == value).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_same_generator_same_rows():
    replay = ReplayBuffer(100, 2, 1)
    replay.add(rows(0, 50))
    first, second = (replay.sample(8, torch.Generator().manual_seed(7)).reward for _ in range(2))
    assert torch.equal(first, second)
