"""Each answer of an environment that is refused, in one sentence, and those that are taken."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

from rsm_common.errors import EnvFaultError
from rsm_eval.checked_env import CheckedEnv
from rsm_eval.envs import make_env
from tests.rsm_eval.bad_envs import BAD, FAULTS, FLAGS, GOOD_OBS, OBSERVATIONS, REWARDS

ACTION = np.zeros(2, np.float32)
WANTED = {
    "reward nan": "wanted a reward that is a finite float32 number in step 2 of its episode, got nan",
    "reward 1e39": "wanted a reward that is a finite float32 number in step 2 of its episode, got 1e+39",
    "reward of two": "wanted a number as reward in step 2 of its episode, got an array of shape [2], float64",
    "reward none": "wanted a number as reward in step 2 of its episode, got None",
    "obs short": "wanted an observation of shape [4], float64 in step 2 of its episode, got shape [3], float64",
    "obs 1e39": "finite float32 numbers in step 2 of its episode, got 1e+39 in element 1",
    "obs nan": "finite float32 numbers in step 2 of its episode, got nan in element 2",
    "flag none": "wanted True or False as terminated in step 2 of its episode, got None",
    "info list": "wanted a dictionary as info in step 2 of its episode, got []",
    "answer of four": "wanted observation, reward, terminated, truncated and info in step 2 of its episode",
    "raise": "failed in step: ZeroDivisionError: the spring (bad_envs.py, line ",
    "exit": "failed in step: SystemExit: no licence (bad_envs.py, line ",
}


def fault_of(fault: str, at: int) -> str:
    env = make_env(BAD, {"fault": fault, "at": at}, name="environment 7")

    def play():
        env.reset(seed=0)
        for _ in range(3):
            env.step(ACTION)

    with pytest.raises(EnvFaultError) as caught:
        play()
    return str(caught.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_step_is_one_sentence(fault):
    sentence = fault_of(fault, at=2)
    assert sentence.startswith("environment 7")
    assert sentence.endswith("; correct the environment")
    assert "\n" not in sentence
    assert WANTED.get(fault, "") in sentence


@pytest.mark.parametrize("fault", [*OBSERVATIONS, "info list", "raise", "exit"])
def test_each_fault_of_a_reset_is_one_sentence(fault):
    sentence = fault_of(fault, at=0)
    assert sentence.startswith("environment 7")
    assert "in reset" in sentence
    assert "\n" not in sentence


def test_a_reset_without_info_is_told():
    class Forgetful(gym.Wrapper):
        def reset(self, **kwargs):
            return super().reset(**kwargs)[0]

    env = CheckedEnv(Forgetful(make_env(BAD)), "environment 0")
    with pytest.raises(EnvFaultError, match="wanted an observation and a dictionary in reset, got an array"):
        env.reset()


def answer(**replaced):
    """The checked answer of an environment whose reward, observation or flags are replaced."""

    class Replaced(gym.Wrapper):
        def step(self, action):
            values = {"obs": GOOD_OBS, "reward": 1.0, "terminated": False, "truncated": False, "info": {}}
            return tuple((values | replaced).values())

    return CheckedEnv(Replaced(make_env(BAD)), "environment 0").step(ACTION)


@pytest.mark.parametrize(
    "reward",
    [2, 2.0, True + 1, np.float32(2), np.int64(2), np.array(2.0), np.array([2.0]), np.array([2]), [2.0]],
)
def test_numbers_and_arrays_of_one_number_are_rewards(reward):
    taken = answer(reward=reward)[1]
    assert (taken, type(taken)) == (2.0, float)


@pytest.mark.parametrize("flag", [True, np.bool_(True), np.array(True), np.array([True]), 1, np.int64(1)])
def test_booleans_in_every_form_are_flags(flag):
    _, _, terminated, truncated, _ = answer(terminated=flag, truncated=flag)
    assert terminated is True
    assert truncated is True


@pytest.mark.parametrize("obs", [GOOD_OBS.astype(np.float32), [0.5, -0.5, 0, 1], (GOOD_OBS * 2).astype(int)])
def test_observations_get_the_dtype_of_their_space(obs):
    taken = answer(obs=obs)[0]
    assert taken.dtype == np.float64
    np.testing.assert_array_equal(taken, np.asarray(obs))


def test_the_largest_float32_is_a_number():
    largest = float(np.finfo(np.float32).max)
    obs, reward, *_ = answer(obs=np.full(4, -largest), reward=largest)
    assert np.isfinite(obs.astype(np.float32)).all()
    assert np.isfinite(np.float32(reward))


def test_the_tables_of_faults_are_complete():
    assert {*REWARDS, *OBSERVATIONS, *FLAGS} < set(FAULTS)
    assert set(WANTED) < set(FAULTS)
