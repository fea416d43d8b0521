"""Environments: which are taken, which are refused and how, and pools of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rsm_common.errors import UnsupportedEnvError
from rsm_eval.envs import (
    EnvPool,
    action_bounds,
    control_dt_s,
    env_boxes,
    make_env,
    observation_size,
    time_limit,
)
from tests.rsm_eval import tiny_env

MODULE = "tests.rsm_eval.tiny_env"


def test_facts_of_a_mujoco_environment():
    env = make_env("InvertedPendulum-v5")
    low, high = action_bounds(env)
    assert low.dtype == high.dtype == np.float32
    assert (low.tolist(), high.tolist()) == ([-3.0], [3.0])
    assert (observation_size(env), time_limit(env), control_dt_s(env)) == (4, 1000, 0.04)
    observation, action = env_boxes(env)
    assert observation.low == (None,) * 4
    assert (action.names, action.low, action.high) == (("action_0",), (-3.0,), (3.0,))
    env.close()


def test_an_environment_without_limit_or_period_says_so():
    env = make_env(f"{MODULE}:RsmNoLimit-v0")
    assert time_limit(env) is None
    assert control_dt_s(make_env("MountainCarContinuous-v0")) is None


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("HalfCheetah-v99", ["HalfCheetah-v99", "v5"]),
        ("NoSuchThing-v1", ["NoSuchThing", "check the spelling"]),
        ("", ["''"]),
        ("no_such_module_here:Env-v0", ["no_such_module_here"]),
        (f"{MODULE}:RsmDiscrete-v0", ["flat Box action space", "Discrete(2)"]),
        (f"{MODULE}:RsmImage-v0", ["flat Box observation space", "(8, 8, 3)"]),
        (f"{MODULE}:RsmUnbounded-v0", ["finite action bounds", "inf"]),
        (f"{MODULE}:RsmInteger-v0", ["real-valued actions", "int64"]),
        (f"{MODULE}:RsmFlat-v0", ["lower action bounds are below"]),
    ],
)
def test_unsuitable_environments_are_one_clear_sentence(env_id, words):
    with pytest.raises(UnsupportedEnvError) as caught:
        make_env(env_id)
    sentence = str(caught.value)
    assert sentence.startswith("wanted")
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


def test_a_pool_keeps_its_environments_until_closed():
    with EnvPool(tiny_env.ENV_ID) as pool:
        three = pool.take(3)
        assert len({id(env) for env in three}) == 3
        assert pool.take(2) == three[:2]
        assert pool.take(4)[:3] == three
        pool.close()
        assert pool.take(1)[0] not in three


def test_a_pool_rejects_an_unknown_environment_at_once():
    with pytest.raises(UnsupportedEnvError):
        EnvPool("NoSuchThing-v1")


def test_a_warning_of_mujoco_is_told_once_and_leaves_no_file(tmp_path):
    code = (
        "import mujoco; from rsm_eval.envs import make_env; make_env('InvertedPendulum-v5')\n"
        "for _ in range(2):\n"
        "    mujoco.MjModel.from_xml_string('<mujoco><compiler settotalmass=\"1\"/></mujoco>')\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr.count("settotalmass") <= 1
    assert list(tmp_path.iterdir()) == []
