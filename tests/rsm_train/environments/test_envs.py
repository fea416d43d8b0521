"""Termination, truncation, auto-reset, seeds and restoring, on environments that can be known."""

import importlib.util
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from rsm_common.errors import EnvFaultError, MissingExtraError, UnsupportedEnvError
from rsm_train.environments.envs import TrainingEnvs, _make_vector
from rsm_train.environments.episodes import episode_seed
from tests.hang import HANG_S
from tests.rsm_train.training_envs import MODULE, CountingEnv, FailingEnv

ENV_ID = f"{MODULE}:RsmCounting-v0"
PYTHON_ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.fixture
def small_seeds(monkeypatch):
    """Environment i of a run with seed s is always reset with s + i."""
    monkeypatch.setattr(
        "rsm_train.environments.episodes.episode_seed", lambda run_seed, index, episode: run_seed + index
    )


def test_final_observations_terminations_and_resets(small_seeds):
    envs = TrainingEnvs(ENV_ID, 3, seed=0)  # lengths 2, 3 and 4, of which the limit of 3 cuts the last
    assert envs.obs.tolist() == [[0, 0], [1, 0], [2, 0]]
    times, terminations, returns, ends = [], [], [], []
    assert envs.ended.tolist() == [False] * 3
    for _ in range(4):
        before = envs.obs.clone()
        batch, ended = envs.step(torch.full((3, 2), 0.5))
        assert torch.equal(batch.obs, before)
        times.append(batch.next_obs[:, 1].tolist())
        terminations.append(batch.terminated.tolist())
        returns.append(ended)
        ends.append(envs.ended.tolist())
    # next_obs is the final observation where an episode ended, and never the first of the next one.
    assert times == [[1, 1, 1], [2, 2, 2], [1, 3, 3], [2, 1, 1]]
    # A time limit is not a termination: environment 2 never terminates.
    assert terminations == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert ends == [[False] * 3, [True, False, False], [False, True, True], [True, False, False]]
    assert returns == [[], [2.0], [3.0, 3.0], [2.0]]
    assert envs.obs[:, 1].tolist() == [0, 1, 1]
    envs.close()


def test_actions_are_scaled_to_the_bounds():
    envs = TrainingEnvs(ENV_ID, 2, seed=0)
    batch, _ = envs.step(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    assert batch.reward.tolist() == [-2.0, 2.0]
    assert batch.action.tolist() == [[-1.0, -1.0], [1.0, 1.0]], "the buffer holds normalised actions"
    envs.close()


def test_stored_observations_are_not_overwritten_by_later_steps():
    envs = TrainingEnvs(ENV_ID, 2, seed=0)
    first, _ = envs.step(torch.zeros(2, 2))
    copy = first.next_obs.clone()
    envs.step(torch.zeros(2, 2))
    assert torch.equal(first.next_obs, copy)
    envs.close()


def test_rounding_does_not_carry_actions_over_odd_bounds():
    envs = TrainingEnvs(f"{MODULE}:RsmOdd-v0", 1, seed=0)
    low, high = envs.action_bounds
    for sign, bound in ((-1.0, low), (1.0, high)):
        batch, _ = envs.step(torch.full((1, 300), sign))  # the environment asserts that it contains the action
        assert batch.reward.item() == pytest.approx(bound[0], abs=1e-6)
    envs.close()


def test_real_mujoco_bounds():
    envs = TrainingEnvs("InvertedPendulum-v5", 1, seed=0)
    low, high = envs.action_bounds
    assert (low.tolist(), high.tolist()) == ([-3.0], [3.0])
    assert (envs.obs_size, envs.action_size) == (4, 1)
    batch, _ = envs.step(torch.ones(1, 1))
    assert batch.reward.tolist() == [1.0]
    envs.close()


def test_every_episode_has_a_seed_of_its_own(monkeypatch):
    monkeypatch.setattr(CountingEnv, "seeds", ())
    envs = TrainingEnvs(ENV_ID, 2, seed=7)
    for _ in range(6):
        envs.step(torch.zeros(2, 2))
    got = CountingEnv.seeds
    assert got[:2] == (episode_seed(7, 0, 0), episode_seed(7, 1, 0))
    assert set(got[2:]) <= {episode_seed(7, index, episode) for index in (0, 1) for episode in (1, 2, 3)}
    many = [episode_seed(s, i, k) for s in (0, 1, 2**32, 2**32 + 1) for i in range(4) for k in range(50)]
    assert len({*many, *got}) == len(many) + len(got)
    assert max(many) < 2**32, "or environments with a numpy RandomState fail"
    # The episodes of a run must not change with a version of numpy, or of ours.
    assert episode_seed(0, 0, 0) == 4088532484
    assert episode_seed(2**40 + 1, 3, 12345) == 2776197115


def play(env_id, vector, *, state=None, steps=9, seed=5, count=3):
    """(batches and returns, states before each step and at the end) of steps with fixed actions."""
    envs = TrainingEnvs(env_id, count, seed, vector=vector, state=state)
    taken, states = [], [envs.state()]
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        action = torch.rand(count, envs.action_size, generator=generator) * 2 - 1
        taken.append(envs.step(action))
        states.append(envs.state())
    envs.close()
    return taken, states


def assert_same(first, second):
    for (batch, returns), (other, other_returns) in zip(first, second, strict=True):
        assert returns == other_returns
        for name, value in vars(batch).items():
            assert torch.equal(value, getattr(other, name)), name


@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", f"{MODULE}:RsmLong-v0"])
def test_processes_give_what_one_process_gives(env_id):
    first, states = play(env_id, "sync", steps=20)
    second, other_states = play(env_id, "async", steps=20)
    assert any(returns for _, returns in first), "an episode must end"
    assert_same(first, second)
    for name, value in states[-1].items():
        assert torch.equal(value, other_states[-1][name]), name


def continued(env_id, vector, state, taken):
    """Steps with the same actions as in `taken`, from a state."""
    envs = TrainingEnvs(env_id, 3, 5, vector=vector, state=state)
    again = [envs.step(batch.action) for batch, _ in taken]
    envs.close()
    return again, envs


@pytest.mark.parametrize("vector", ["sync", "async"])
@pytest.mark.parametrize("env_id", ["Hopper-v5", f"{MODULE}:RsmLong-v0"])
def test_open_episodes_are_restored_at_any_moment(env_id, vector):
    taken, states = play(env_id, "sync", steps=40)
    for moment in (0, 5, 7, 12, 33):
        again, envs = continued(env_id, vector, states[moment], taken[moment:])
        assert envs.restarted == []
        assert_same(taken[moment:], again)
        final = envs.state()
        for name, value in states[-1].items():
            assert torch.equal(value, final[name]), name


def test_what_cannot_be_restored_begins_anew():
    env_id = f"{MODULE}:RsmForgetful-v0"
    _, states = play(env_id, "sync", steps=9)
    envs = TrainingEnvs(env_id, 3, 5, state=states[9])
    assert envs.restarted == [0, 1, 2]
    assert envs.obs[:, 1].tolist() == [0, 0, 0]
    assert envs.state()["episode"].tolist() == [2, 2, 2], "a seed of its own, not that of the open episode"
    generator_free = [envs.step(torch.zeros(3, 2)) for _ in range(7)]
    returns = generator_free[-1][1]
    assert len(returns) == 3
    expected = sum(batch.reward.double() for batch, _ in generator_free)
    np.testing.assert_allclose(returns, expected, rtol=1e-5)  # nothing of the abandoned episode is in it
    envs.close()


def test_one_that_was_not_in_an_episode_is_restored_beside_those_that_forget(monkeypatch):
    """Restoring is judged for each environment: with no step taken there is nothing to forget."""
    env_id = f"{MODULE}:RsmForgetful-v0"
    _, states = play(env_id, "sync", steps=7)
    assert TrainingEnvs(env_id, 3, 5, state=states[7]).restarted == []


@pytest.mark.parametrize("vector", ["sync", "async"])
def test_a_failing_environment_is_one_sentence(vector, monkeypatch, capfd):
    monkeypatch.setenv("RSM_FAIL", "raise")
    monkeypatch.setattr(FailingEnv, "steps", 0)
    with pytest.raises(EnvFaultError) as caught:
        play(f"{MODULE}:RsmFailing-v0", vector, steps=40, count=2)
    message = str(caught.value)
    assert "failed in step: ValueError: the motor (training_envs.py, line " in message
    assert message.startswith(("environment 0 ", "environment 1 "))
    assert "\n" not in message
    assert "Traceback" not in capfd.readouterr().err


def test_a_worker_that_dies_is_one_sentence(monkeypatch):
    monkeypatch.setenv("RSM_FAIL", "die")
    envs = TrainingEnvs(f"{MODULE}:RsmFailing-v0", 2, 5, vector="async")
    workers = list(getattr(envs._envs, "processes"))  # noqa: B009

    def step(count):
        for _ in range(count):
            envs.step(torch.zeros(2, 2))

    with pytest.raises(EnvFaultError, match=r"the worker of environment [01] \(exit status -9\) of .* died"):
        step(40)
    envs.close()
    assert not any(worker.is_alive() for worker in workers)


def test_signals_for_the_trainer_do_not_end_its_workers():
    envs = TrainingEnvs(f"{MODULE}:RsmLong-v0", 2, 5, vector="async")
    workers = list(getattr(envs._envs, "processes"))  # noqa: B009
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(worker.pid, number)
    before = envs.obs.clone()
    batch, _ = envs.step(torch.zeros(2, 2))
    assert torch.equal(batch.obs, before)
    assert torch.isfinite(batch.next_obs).all()
    assert all(worker.is_alive() for worker in workers)
    envs.close()


def test_workers_end_with_a_process_that_did_not_close_them():
    code = (
        "from rsm_train.environments.envs import TrainingEnvs\n"
        f"envs = TrainingEnvs('{MODULE}:RsmLong-v0', 2, 5, vector='async')\n"
        "print(*(worker.pid for worker in envs._envs.processes))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=PYTHON_ENV, capture_output=True, text=True, timeout=HANG_S, check=True
    )
    for pid in map(int, done.stdout.split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_end_with_environments_that_were_not_closed():
    envs = TrainingEnvs(f"{MODULE}:RsmLong-v0", 2, 5, vector="async")
    workers = list(getattr(envs._envs, "processes"))  # noqa: B009
    assert all(worker.is_alive() for worker in workers)
    del envs
    for worker in workers:
        worker.join(timeout=HANG_S)
        assert not worker.is_alive()


def test_nan_from_an_environment_is_not_stored(monkeypatch):
    monkeypatch.setenv("RSM_FAIL", "nan")
    monkeypatch.setattr(FailingEnv, "steps", 0)
    sentence = r"^environment 2 \(.*Failing-v0\): wanted a reward .* finite float32 .* in step \d .*, got nan; "
    with pytest.raises(EnvFaultError, match=sentence):
        play(f"{MODULE}:RsmFailing-v0", "sync", steps=40, count=5, seed=1)
    assert FailingEnv.steps >= 33


def test_actions_are_recorded_only_where_they_restore_an_episode(monkeypatch):
    monkeypatch.setattr(
        "rsm_train.environments.envs._make_vector", lambda *args: _make_vector("sync", *args[1:])
    )
    for vector, length in (("sync", 5), ("envpool", 0)):
        _, states = play(f"{MODULE}:RsmLong-v0", vector, steps=5)
        assert states[-1]["actions.0"].shape == (length, 2)


def test_envpool_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "envpool", None)
    with pytest.raises(MissingExtraError, match="pip install envpool"):
        TrainingEnvs("Hopper-v5", 2, 0, vector="envpool")


@pytest.mark.skipif(importlib.util.find_spec("envpool") is None, reason="envpool is not installed")
class TestEnvPool:
    def test_episodes_and_final_observations(self):
        envs = TrainingEnvs("Hopper-v5", 3, 0, vector="envpool")
        lengths, resets = np.zeros(3, int), 0
        for _ in range(200):
            before = envs.obs.clone()
            batch, returns = envs.step(torch.rand(3, 3) * 2 - 1)
            lengths += 1
            for index in np.flatnonzero(batch.terminated):
                assert lengths[index] > 3, "no step is spent on a reset"
                assert not torch.equal(batch.next_obs[index], envs.obs[index])
                assert envs.obs[index, 0] == pytest.approx(1.25, abs=0.01), "a first observation"
                assert abs(batch.next_obs[index, 1]) > 0.05, "a fallen hopper"
                lengths[index], resets = 0, resets + 1
            assert len(returns) == int(batch.terminated.sum())
            assert torch.equal(batch.obs, before)
        assert resets > 5
        envs.close()

    def test_same_seed_same_episodes_and_time_limits(self):
        first, _ = play("InvertedPendulum-v5", "envpool", steps=60)
        second, _ = play("InvertedPendulum-v5", "envpool", steps=60)
        other, _ = play("InvertedPendulum-v5", "envpool", steps=60, seed=6)
        assert_same(first, second)
        assert not torch.equal(first[0][0].obs, other[0][0].obs)
        envs = TrainingEnvs("HalfCheetah-v5", 1, 0, vector="envpool")
        ended = [len(envs.step(torch.zeros(1, 6))[1]) for _ in range(1001)]
        assert ended.index(1) == 999
        assert sum(ended) == 1
        envs.close()

    def test_a_resume_begins_new_episodes(self):
        taken, states = play("Hopper-v5", "envpool", steps=5)
        envs = TrainingEnvs("Hopper-v5", 3, 5, vector="envpool", state=states[-1])
        assert envs.restarted == [0, 1, 2]
        assert not torch.equal(envs.obs, taken[0][0].obs)
        assert envs.state()["running_return"].tolist() == [0, 0, 0]
        envs.close()

    def test_what_it_does_not_have_is_refused(self):
        with pytest.raises(UnsupportedEnvError, match="--vector async"):
            TrainingEnvs(ENV_ID, 2, 0, vector="envpool")
