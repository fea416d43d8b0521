import pytest
import torch

from rsm_common.errors import CheckpointError, ConfigError
from rsm_train.algorithms.common import Batch
from rsm_train.run.replay import (
    ReplayBuffer,
    list_segments,
    load_segments,
    remove_segments,
    write_segments,
)


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


@pytest.mark.parametrize("capacity", [10**15, 2**62])
def test_memory_that_is_not_there_is_one_sentence(capacity):
    with pytest.raises(
        ConfigError, match=rf"wanted [\d,.]+ GiB of memory on cpu for a replay_size of {capacity:,}"
    ):
        ReplayBuffer(capacity, 17, 6)


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


def filled(capacity, added, step=3, directory=None, every=10_000):
    """A buffer after `added` transitions, and its files, written every so many."""
    replay = ReplayBuffer(capacity, 2, 1)
    for first in range(0, added, step):
        replay.add(rows(first, min(step, added - first)))
        if directory is not None and replay.added % every < step:
            write_segments(directory, replay, {})
    return replay


def assert_equal(first, second):
    assert (first.added, first.capacity) == (second.added, second.capacity)
    for name, value in vars(first._data).items():
        assert torch.equal(value[: len(first)], getattr(second._data, name)[: len(second)]), name


@pytest.mark.parametrize(
    ("capacity", "added", "every"), [(100, 30, 9), (20, 66, 9), (20, 66, 33), (7, 30, 30), (20, 20, 5)]
)
def test_the_ring_is_read_back_in_its_old_places(tmp_path, capacity, added, every, monkeypatch):
    monkeypatch.setattr("rsm_train.run.replay.SEGMENT_ROWS", 8)
    replay = filled(capacity, added, directory=tmp_path, every=every)
    write_segments(tmp_path, replay, {})
    remove_segments(tmp_path, before=replay.oldest)
    segments = list_segments(tmp_path)
    assert segments[0].first <= replay.oldest < segments[0].end
    assert max(segment.end - segment.first for segment in segments) <= 8
    loaded = ReplayBuffer(capacity, 2, 1)
    load_segments(tmp_path, loaded, replay.added, {})
    assert_equal(replay, loaded)
    assert torch.equal(
        replay.sample(50, torch.Generator().manual_seed(1)).reward,
        loaded.sample(50, torch.Generator().manual_seed(1)).reward,
    )


def test_only_what_is_new_is_written(tmp_path):
    replay = filled(100, 30, directory=tmp_path, every=15)
    before = {segment.path: segment.path.stat().st_mtime_ns for segment in list_segments(tmp_path)}
    replay.add(rows(30, 5))
    write_segments(tmp_path, replay, {})
    assert [(segment.first, segment.end) for segment in list_segments(tmp_path)][-1] == (30, 35)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    write_segments(tmp_path, replay, {})
    assert len(list_segments(tmp_path)) == len(before) + 1, "nothing new, nothing written"


def test_an_older_checkpoint_ignores_later_transitions_which_can_be_removed(tmp_path):
    filled(100, 60, directory=tmp_path, every=15)
    early = filled(100, 30)
    loaded = ReplayBuffer(100, 2, 1)
    load_segments(tmp_path, loaded, 30, {})
    assert_equal(early, loaded)
    remove_segments(tmp_path, beyond=30)
    assert list_segments(tmp_path)[-1].end == 30


def test_missing_and_damaged_files_are_refused(tmp_path):
    filled(100, 60, directory=tmp_path, every=15)
    middle = list_segments(tmp_path)[1].path
    content = middle.read_bytes()
    for damage in (content[:-8], b"x" + content[1:], b"", None):
        if damage is None:
            middle.unlink()
        else:
            middle.write_bytes(damage)
        with pytest.raises(CheckpointError, match="is damaged|got only those") as caught:
            load_segments(tmp_path, ReplayBuffer(100, 2, 1), 60, {})
        assert "\n" not in str(caught.value)
    middle.write_bytes(list_segments(tmp_path)[0].path.read_bytes())
    load_segments(tmp_path, ReplayBuffer(100, 2, 1), 60, {})
    with pytest.raises(CheckpointError, match="damaged"):
        load_segments(tmp_path, ReplayBuffer(100, 3, 1), 60, {})
