"""Environments: which are taken, which are refused and how, and pools of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from rsm_common.errors import UnsupportedEnvError
from rsm_eval.envs import (
    EnvPool,
    action_bounds,
    control_dt_s,
    env_boxes,
    make_env,
    observation_size,
    running_statistics,
    statistics_warning,
    time_limit,
)
from tests.rsm_eval import tiny_env
from tests.rsm_eval.bad_envs import BAD, BOX, MODULE, OddSpaces


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
    env = make_env("tests.rsm_eval.tiny_env:RsmNoLimit-v0")
    assert time_limit(env) is None
    assert control_dt_s(make_env("MountainCarContinuous-v0")) is None


UNSUITABLE: dict[str, tuple[str, ...]] = {
    "HalfCheetah-v99": ("HalfCheetah-v99", "v5"),
    "NoSuchThing-v1": ("NoSuchThing", "check the spelling"),
    "": ("''",),
    "no_such_module_here:Env-v0": ("no_such_module_here",),
    f"{MODULE}:RsmDictObs-v0": ("flat Box observation space", "Dict(", "FlattenObservation"),
    f"{MODULE}:RsmTupleObs-v0": ("flat Box observation space", "Tuple(", "FlattenObservation"),
    f"{MODULE}:RsmDiscreteObs-v0": ("flat Box observation space", "Discrete(3)", "FlattenObservation"),
    f"{MODULE}:RsmImageObs-v0": ("flat Box observation space", "(4, 4, 3)", "FlattenObservation"),
    f"{MODULE}:RsmSequenceObs-v0": ("flat Box observation space", "; choose another environment"),
    f"{MODULE}:RsmTextObs-v0": ("flat Box observation space", "Text("),
    f"{MODULE}:RsmDictAction-v0": ("flat Box action space", "Dict(", "TransformAction"),
    f"{MODULE}:RsmTupleAction-v0": ("flat Box action space", "Tuple(", "TransformAction"),
    f"{MODULE}:RsmSquareAction-v0": ("flat Box action space", "(2, 2)", "TransformAction"),
    f"{MODULE}:RsmDiscreteAction-v0": ("flat Box action space", "Discrete(2)", "continuous actions"),
    f"{MODULE}:RsmMultiDiscreteAction-v0": ("flat Box action space", "MultiDiscrete", "continuous actions"),
    f"{MODULE}:RsmTextAction-v0": ("flat Box action space", "Text(", "continuous actions"),
    f"{MODULE}:RsmUnboundedAction-v0": ("finite action bounds", "inf", "TransformAction"),
    f"{MODULE}:RsmHalfBoundedAction-v0": ("finite action bounds", "inf", "TransformAction"),
    f"{MODULE}:RsmHugeAction-v0": ("action 0", "from -3e+38 to 3e+38", "float32", "TransformAction"),
    f"{MODULE}:RsmTooHugeAction-v0": ("action 0", "from -1e+39 to 1e+39", "float32"),
    f"{MODULE}:RsmNarrowAction-v0": ("lower action bounds are below", "float32"),
    f"{MODULE}:RsmIntegerAction-v0": ("real-valued actions", "int64"),
    f"{MODULE}:RsmNoSpaces-v0": ("flat Box observation space", "has none"),
    f"{MODULE}:RsmNotAnEnv-v0": ("wanted to create environment", "NotAnEnv"),
    f"{MODULE}:RsmNeedsSize-v0": ("missing 1 required", "'size'", "--env-arg NAME=VALUE"),
}


@pytest.mark.parametrize("env_id", UNSUITABLE)
def test_unsuitable_environments_are_one_clear_sentence(env_id):
    with pytest.raises(UnsupportedEnvError) as caught:
        make_env(env_id)
    sentence = str(caught.value)
    assert sentence.startswith("wanted")
    assert "\n" not in sentence
    for word in UNSUITABLE[env_id]:
        assert word in sentence


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("file", "FileNotFoundError: [Errno 2] No such file or directory: '/no/such/model.xml'"),
        ("gl", "AttributeError: 'NoneType' object has no attribute 'glGetError' (bad_envs.py, line "),
        ("import", "ImportError: cannot import name 'no_such_name'"),
        ("exit", "SystemExit: 3 (bad_envs.py, line "),
    ],
)
def test_a_constructor_that_fails_is_one_clear_sentence(fault, reason):
    with pytest.raises(UnsupportedEnvError) as caught:
        make_env(BAD, {"fault": f"constructor {fault}"})
    sentence = str(caught.value)
    assert sentence.startswith(f"wanted to create environment {BAD} --env-arg fault=constructor {fault}, got ")
    assert reason in sentence
    assert sentence.endswith("; correct the environment or its arguments")


def test_arguments_reach_the_constructor():
    assert observation_size(make_env(BAD, {"obs_size": 6})) == 6
    with pytest.raises(UnsupportedEnvError, match=r"unexpected keyword .* 'colour'.*--env-arg NAME=VALUE"):
        make_env(BAD, {"colour": "red"})


@pytest.mark.parametrize(
    "made",
    [
        lambda: gym.wrappers.FlattenObservation(gym.make(f"{MODULE}:RsmDictObs-v0")),
        lambda: gym.wrappers.FlattenObservation(gym.make(f"{MODULE}:RsmTupleObs-v0")),
        lambda: gym.wrappers.FlattenObservation(gym.make(f"{MODULE}:RsmDiscreteObs-v0")),
        lambda: gym.wrappers.FlattenObservation(gym.make(f"{MODULE}:RsmImageObs-v0")),
        lambda: gym.wrappers.FlattenObservation(gym.make(f"{MODULE}:RsmTextObs-v0")),
        *(
            lambda name=name: unflattened(gym.make(f"{MODULE}:Rsm{name}Action-v0"))
            for name in ("Dict", "Tuple", "Square")
        ),
        *(
            lambda name=name: bounded(gym.make(f"{MODULE}:Rsm{name}Action-v0"))
            for name in ("Unbounded", "HalfBounded", "Huge", "TooHuge")
        ),
    ],
)
def test_the_advice_of_each_sentence_works(made, monkeypatch):
    monkeypatch.setitem(gym.registry, "RsmAdvised-v0", gym.envs.registration.EnvSpec("RsmAdvised-v0", made))
    env = make_env("RsmAdvised-v0")
    env.reset(seed=0)
    env.step(env.action_space.sample())


def unflattened(env):
    """As the sentence about an action space says."""
    return gym.wrappers.TransformAction(
        env,
        lambda action: spaces.unflatten(env.action_space, action),
        spaces.flatten_space(env.action_space),
    )


def bounded(env):
    """As the sentence about action bounds says."""
    return gym.wrappers.TransformAction(env, lambda action: action, spaces.Box(0.0, 1.0, (2,)))


def test_bounds_of_observations_that_float32_cannot_hold_bound_nothing(monkeypatch):
    def wide(**kwargs: Any) -> Any:
        return OddSpaces(spaces.Box(np.array([-1e300, 0.0]), np.array([1.0, 1e300]), dtype=np.float64), BOX)

    monkeypatch.setitem(gym.registry, "RsmWide-v0", gym.envs.registration.EnvSpec("RsmWide-v0", wide))
    observation, _ = env_boxes(make_env("RsmWide-v0"))
    assert (observation.low, observation.high) == ((None, 0.0), (1.0, None))


def run(code, tmp_path, **environment):
    """Run code in a directory, where it finds this package but not by the directory."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_module_in_the_working_directory_is_found(tmp_path):
    (tmp_path / "my_robot.py").write_text(
        "import gymnasium\ngymnasium.register('Mine-v0', 'tests.rsm_eval.bad_envs:BadEnv')\n"
    )
    code = "from rsm_eval.envs import make_env; print(make_env('my_robot:Mine-v0').reset(seed=0)[0].shape)"
    assert run(code, tmp_path).stdout == "(4,)\n"


@pytest.mark.parametrize("gl", ["osmesa", "egl", "nonsense"])
def test_without_rendering_a_missing_gl_library_does_not_matter(tmp_path, gl):
    code = (
        "from rsm_eval.envs import make_env; env = make_env('InvertedPendulum-v5')\n"
        "env.reset(seed=0); print(env.step(env.action_space.sample())[1])"
    )
    done = run(code, tmp_path, MUJOCO_GL=gl)
    assert done.stdout == "1.0\n", done.stderr


def test_wrappers_with_running_statistics_are_named():
    normalized = make_env(f"{MODULE}:RsmNormalized-v0")
    assert running_statistics(normalized) == ["NormalizeReward", "NormalizeObservation"]
    warning = statistics_warning("RsmNormalized-v0", normalized)
    assert warning is not None
    assert "RsmNormalized-v0 has NormalizeReward and NormalizeObservation" in warning
    assert "--normalize-observation" in warning


class Filter:
    """A transformation with a state of its own."""

    def __call__(self, obs):
        return obs


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (Filter(), ["TransformObservation"]),
        (Filter().__call__, ["TransformObservation"]),
        (lambda obs: obs, []),
    ],
)
def test_transformations_by_an_object_may_have_a_state(function, names):
    env = make_env(BAD)
    wrapped = gym.wrappers.TransformObservation(env, function, env.observation_space)
    assert running_statistics(wrapped) == names
    assert statistics_warning(BAD, env) is None


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
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("settotalmass") <= 1
    assert list(tmp_path.iterdir()) == []
