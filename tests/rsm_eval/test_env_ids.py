"""Ids that are known here, and what is said of the others."""

from __future__ import annotations

import pytest

from rsm_eval.env_ids import unknown_env
from tests.rsm_eval.bad_envs import BAD


@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", BAD])
def test_known_ids_need_no_words(env_id):
    assert unknown_env(env_id) is None


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("InvertedPendulom-v5", "no environment 'InvertedPendulom-v5'; did you mean InvertedPendulum-v5"),
        ("HalfCheetah-v99", "did you mean HalfCheetah-v"),
        ("", "no environment ''"),
        ("robot on the desk", "no environment 'robot on the desk'"),
        ("no_such_module_here:Env-v0", "cannot be imported (ModuleNotFoundError: "),
    ],
)
def test_unknown_ids_are_told_with_close_matches(env_id, words):
    sentence = unknown_env(env_id)
    assert sentence is not None
    assert words in sentence
    assert "\n" not in sentence
