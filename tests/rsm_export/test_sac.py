"""SAC from learning to serving: the Gaussian policy as a graph with noise as input."""

from __future__ import annotations

import numpy as np
import pytest
from rsm_export.cli import main
from rsm_export.config import ExportConfig
from rsm_export.exporter import export_checkpoint

from rsm_common.policy import Policy
from rsm_eval.rollout import episode_seeds, rollout
from rsm_serve.client import PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.local import open_policy
from rsm_serve.server import background_server
from rsm_train.run.checkpoint import load_torch_policy
from tests.rsm_train.runs import TINY, tiny_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "sac"
    given = {name: value for name, value in TINY.items() if name != "particles"}
    return tiny_run(directory, algo="sac", particles=None, **{k: given[k] for k in ("width", "num_envs")})


def observations(rows):
    return np.random.default_rng(0).normal(0, 1, (rows, 4)).astype(np.float32)


@pytest.mark.parametrize("particles", [None, 3])
def test_torch_bundle_and_server_agree_on_sampled_and_mean_actions(run_dir, tmp_path, particles):
    made = export_checkpoint(run_dir, tmp_path, "sac", ExportConfig(particles=particles))
    assert (made.spec.sampler, made.spec.steps, made.spec.particles) == ("gaussian", 1, particles or 1)
    assert made.spec.has_q == (particles is not None)
    local = open_policy(made.path)
    policies: list[Policy] = [local, load_torch_policy(run_dir)] if particles is None else [local]
    obs = observations(5)
    with (
        background_server(ServerConfig(repo=tmp_path, addresses=("127.0.0.1:0",))) as server,
        PolicyClient(server.addresses[0], timeout_s=10) as client,
    ):
        sampled = client.act(obs, seed=[1, 2, 3, 4, 5])
        again = client.act(obs[2], seed=3)
        mean = client.act(obs, deterministic=True)
        unsampled = client.act(obs, noise=np.zeros((5, *made.spec.noise_shape), np.float32))
    assert again.action == pytest.approx(sampled.action[2], abs=1e-5)
    assert mean.action == pytest.approx(unsampled.action, abs=1e-6)
    assert np.abs(sampled.action - mean.action).max() > 0.1
    for policy in policies:
        assert policy.act(obs, seed=[1, 2, 3, 4, 5]).action == pytest.approx(sampled.action, abs=1e-4)
        assert policy.act(obs, deterministic=True).action == pytest.approx(mean.action, abs=1e-4)


def test_training_evaluates_the_mean_action(run_dir):
    policy = load_torch_policy(run_dir)
    evaluation = policy.spec.evaluation
    assert evaluation is not None
    seeds = episode_seeds(evaluation["seed"], evaluation["episodes"])
    mean = rollout(policy, "InvertedPendulum-v5", seeds, deterministic=True).returns.mean()
    sampled = rollout(policy, "InvertedPendulum-v5", seeds).returns.mean()
    assert evaluation["mean"] == pytest.approx(mean)
    assert evaluation["mean"] != pytest.approx(sampled)


def test_a_search_among_chains_is_refused(run_dir, tmp_path, capsys):
    assert main([str(run_dir), "--repo", str(tmp_path / "r"), "--auto"]) == 2
    assert "wanted a diffusion policy for --auto, got sac" in capsys.readouterr().err
    for option in (["--steps", "1"], ["--sampler", "ddim"], ["--prior-std", "0.5"]):
        assert main([str(run_dir), "--repo", str(tmp_path / "r"), *option]) == 2
        assert f"wanted no {option[0]} for a Gaussian policy" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
