"""docs/howto/foreign-weights.md, executed; what comes out is compared with a plain numpy program."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from rsm_export.cli import main as rsm_export
from safetensors.numpy import save_file

from rsm_common.seeds import draw_noise, expand_seed
from rsm_eval.cli import main as rsm_eval
from rsm_serve.client import PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.local import open_policy
from rsm_serve.server import background_server
from rsm_train.run.checkpoint import load_torch_policy
from tests.foreign import act, critic_arrays, policy_arrays, time_features

DOC = Path(__file__).parent.parent.parent / "docs" / "howto" / "foreign-weights.md"
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = {"rsm-export": rsm_export, "rsm-eval": rsm_eval}
POLICY = policy_arrays(4, 1, 32)
CRITICS = [critic_arrays(4, 1, 32, seed) for seed in (1, 2)]
ROWS = 64
STEPS, PARTICLES = 10, 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where the document's blocks have been run, in order, beside the weights that it speaks of."""
    directory = tmp_path_factory.mktemp("foreign")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        save_file(POLICY, "policy.safetensors")
        for index, arrays in enumerate(CRITICS):
            save_file(arrays, f"q{index + 1}.safetensors")
        for kind, text in BLOCK.findall(DOC.read_text()):
            if kind == "python":
                exec(compile(text, DOC.name, "exec"), {})
                continue
            for line in text.splitlines():
                name, *arguments = shlex.split(line.removeprefix("$ "))
                assert COMMANDS[name](arguments) == 0, line
    return directory


@pytest.fixture(scope="module")
def wanted():
    """(obs, seeds, action, q) of the numpy program, where no two particles nearly tie."""
    obs = np.random.default_rng(5).normal(size=(ROWS, 4)).astype(np.float32)
    seeds = expand_seed(17, ROWS)
    noise = draw_noise(seeds, (STEPS, PARTICLES, 1))
    low, high = np.array([-3.0]), np.array([3.0])
    action, q, gap = act(POLICY, CRITICS, obs, noise, schedule="cosine", prior_std=0.5, low=low, high=high)
    clear = gap > 1e-4
    assert clear.sum() > ROWS * 0.8
    assert action.std() > 0.3, "a constant policy would agree with anything"
    return obs[clear], seeds[clear], action[clear], q[clear]


def check(policy, wanted):
    obs, seeds, action, q = wanted
    answer = policy.act(obs, seed=seeds)
    assert np.abs(answer.action - action).max() / 6.0 <= 1e-5
    np.testing.assert_allclose(answer.q, q, atol=1e-5, rtol=1e-5)


def test_the_checkpoint_acts_like_the_numpy_program(directory, wanted):
    check(load_torch_policy(directory / "foreign" / "pendulum"), wanted)


def test_the_bundle_acts_like_the_numpy_program(directory, wanted):
    policy = open_policy(directory / "bundles" / "pendulum")
    check(policy, wanted)
    assert policy.spec.algorithm == "foreign"
    assert policy.spec.provenance["run"] == "pendulum"


def test_the_server_acts_like_the_numpy_program(directory, wanted):
    config = ServerConfig(repo=directory / "bundles", addresses=("127.0.0.1:0",))
    with background_server(config) as server, PolicyClient(server.addresses[0], timeout_s=10) as client:
        check(client, wanted)


def test_the_comparison_can_fail(directory, wanted, monkeypatch):
    obs, seeds, _, _ = wanted
    noise = draw_noise(seeds, (STEPS, PARTICLES, 1))
    monkeypatch.setattr("tests.foreign.time_features", lambda t: time_features(t + 1))
    bounds = {"low": np.array([-3.0]), "high": np.array([3.0])}
    action, q, _ = act(POLICY, CRITICS, obs, noise, schedule="cosine", prior_std=0.5, **bounds)
    with pytest.raises(AssertionError):
        check(open_policy(directory / "bundles" / "pendulum"), (obs, seeds, action, q))
