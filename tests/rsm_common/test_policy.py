"""The Policy contract: specification, argument rules, agreement with an environment."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from rsm_common.errors import BundleError, InvalidRequestError, UnsupportedEnvError
from rsm_common.policy import act_rows
from rsm_common.spec import BoxSpec, PolicySpec, check_env
from tests.bundles import make_spec

SPEC = make_spec()


def test_a_specification_survives_json():
    assert PolicySpec.from_json(SPEC.to_json()) == SPEC


@pytest.mark.parametrize(
    ("change", "version"), [({}, 2), ({"sampler": "gaussian"}, 3), ({"env_args": {"frame_skip": 2}}, 3)]
)
def test_a_file_has_the_lowest_version_that_holds_it(change, version):
    spec = dataclasses.replace(SPEC, **change)
    assert json.loads(spec.to_json())["schema_version"] == version
    assert PolicySpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 4}, "schema version 1, 2 or 3, got 4; install a newer rsm-toolkit"),
        ({"noise_shape": [3, 2, 9]}, "contradicts itself"),
        ({"steps": 0}, "steps >= 1"),
        ({"steps": "3"}, "steps >= 1.*got '3'"),
        ({"steps": 3.5}, "steps"),
        ({"name": 5}, "name"),
        ({"surprise": 1}, "surprise"),
        ({"observation": {"names": ["a"], "low": [], "high": [1.0]}}, "equally many"),
        ({"action": {"names": ["a0", "a1"], "low": [None, 0.0], "high": [1.0, 1.0]}}, "finite low and high"),
        ({"action": {"names": ["a0", "a1"], "low": [1.0, 0.0], "high": [1.0, 1.0]}}, "low < high"),
        ({"action": {"names": ["a0", "a1"], "low": ["x", 0.0], "high": [1.0, 1.0]}}, "numbers"),
    ],
)
def test_a_wrong_policy_json_is_told_apart(change, message):
    data = json.loads(SPEC.to_json()) | change
    with pytest.raises(BundleError, match=message):
        PolicySpec.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", b"\xff\xfe"])
def test_what_is_no_policy_json_at_all(text):
    with pytest.raises(BundleError):
        PolicySpec.from_json(text)


def test_a_missing_field():
    data = json.loads(SPEC.to_json())
    del data["env_id"]
    with pytest.raises(BundleError, match="env_id"):
        PolicySpec.from_json(json.dumps(data))


def test_one_observation_and_a_batch_become_rows():
    assert act_rows(SPEC, [1, 2, 3, 4]).obs_BO.tolist() == [[1, 2, 3, 4]]
    assert act_rows(SPEC, [1, 2, 3, 4]).single
    rows = act_rows(SPEC, np.zeros((3, 4)), seed=9)
    assert rows.obs_BO.dtype == np.float32
    assert (rows.obs_BO.shape, rows.single) == ((3, 4), False)
    assert rows.seeds_B is not None
    assert len(set(rows.seeds_B.tolist())) == 3


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        ([1, 2, 3], r"\[4\] or \[B, 4\].*got \[3\]"),
        (np.zeros((2, 2, 4)), r"got \[2, 2, 4\]"),
        (np.zeros((0, 4)), r"got \[0, 4\]"),
        (1.0, r"got \[\]"),
        (["a", "b", "c", "d"], "dtype"),
        ([[1, 2, 3, 4], [1, 2, 3]], "equally long"),
        ([1, [2], 3, 4], "array of numbers"),
        ([1, 2, 3, 1j], "dtype complex"),
        ([1, float("nan"), 3, 4], r"finite numbers, got nan in the observation at index \[0, 1\]"),
        (np.full((2, 4), np.inf), "inf"),
        (np.array([1e300, 0, 0, 0]), "inf"),
    ],
)
def test_wrong_observations_are_refused(obs, message):
    with pytest.raises(InvalidRequestError, match=message):
        act_rows(SPEC, obs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1, "noise": np.zeros((3, 2, 2), np.float32)}, "got both"),
        ({"deterministic": True, "noise": np.zeros((3, 2, 2), np.float32)}, "got both"),
        ({"deterministic": True, "seed": 1}, "got both"),
        ({"noise": np.zeros((3, 2, 1), np.float32)}, r"wanted noise of shape \[1, 3, 2, 2\].*got \[3, 2, 1\]"),
        ({"noise": np.full((3, 2, 2), np.nan, np.float32)}, "in the noise"),
        ({"seed": -1}, "0 to 2"),
        ({"seed": 2**64}, "0 to 2"),
        ({"seed": [1, 2]}, "wanted 1 seeds"),
        ({"seed": 1.7}, "whole numbers.*got 1.7"),
        ({"seed": np.array([1.0])}, "whole numbers"),
        ({"seed": "seven"}, "whole numbers.*got 'seven'"),
        ({"seed": "7"}, "whole numbers"),
        ({"noise": [[[1.0, 2.0], [1.0]]]}, "noise as an array of numbers"),
        (
            {"noise": [["a"]]},
            "wanted float32 numbers as noise, got dtype <U1 of list; give numbers instead of text",
        ),
    ],
)
def test_wrong_randomness_is_refused(arguments, message):
    with pytest.raises(InvalidRequestError, match=message):
        act_rows(SPEC, np.zeros(4), **arguments)


def box(low, high):
    return SimpleNamespace(shape=np.shape(low), low=np.array(low), high=np.array(high))


def environment(obs_size=4, low=(-3.0, -3.0), high=(1.0, 1.0)):
    return SimpleNamespace(
        observation_space=box([-9.0] * obs_size, [9.0] * obs_size), action_space=box(low, high)
    )


def test_the_right_environment_is_accepted():
    check_env(SPEC, environment())


def test_of_a_vector_environment_the_single_spaces_count():
    env = environment()
    env.single_observation_space, env.single_action_space = env.observation_space, env.action_space
    env.observation_space, env.action_space = box([[0.0] * 4] * 8, [[0.0] * 4] * 8), None
    check_env(SPEC, env)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (environment(obs_size=5), "wanted 4 observation elements, the environment has 5"),
        (environment(low=(-3.0,), high=(1.0,)), "wanted 2 action elements, the environment has 1"),
        (environment(low=(-1.0, -3.0)), "action bounds"),
        (environment(high=(1.0, 2.0)), "action bounds"),
        (SimpleNamespace(observation_space=SimpleNamespace(n=3)), "flat box"),
        (SimpleNamespace(), "flat box"),
    ],
)
def test_the_wrong_environment_is_refused(env, message):
    with pytest.raises(UnsupportedEnvError, match=message):
        check_env(SPEC, env)


def test_bounds_are_float32():
    spec = dataclasses.replace(SPEC, action=BoxSpec(("a", "b"), (-0.4, -0.4), (0.4, 0.4)))
    assert spec.action_low.dtype == np.float32
    assert spec.action_low.tolist() == [np.float32(-0.4)] * 2
