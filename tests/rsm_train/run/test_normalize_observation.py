"""--normalize-observation: statistics in learning, resuming, policy and exported graph."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from rsm_export.exporter import export_checkpoint
from safetensors.torch import load_file, save_file

from rsm_common.errors import CheckpointError
from rsm_serve.local import open_policy
from rsm_train.config import resolve
from rsm_train.model.normalizer import ObservationScale
from rsm_train.run.checkpoint import Checkpoint, load_checkpoint, load_training
from rsm_train.run.checkpoint_files import list_checkpoints
from rsm_train.run.loop import Trainer
from rsm_train.run.run_directory import resume_settings
from rsm_train.run.start import train
from tests.rsm_train.runs import TINY, tiny_run

ALGORITHMS = ("dpmd", "sdac", "sac")


@pytest.fixture(scope="module", params=ALGORITHMS)
def run(request, tmp_path_factory):
    return made(tmp_path_factory.mktemp(request.param) / "run", algo=request.param)


def made(path, **changes):
    changes = {"normalize_observation": True, **changes}
    settings = {name: value for name, value in TINY.items() if name != "particles" or changes["algo"] != "sac"}
    run, algorithm = resolve(settings | changes)
    return train(run, algorithm, path)


def newest(run) -> Checkpoint:
    return load_training(list_checkpoints(run)[-1])


def test_the_statistics_are_those_of_the_stored_observations(run):
    segments = sorted((run / "replay").glob("*.safetensors"))
    stored = torch.cat([load_file(path)["obs"] for path in segments]).double()
    checkpoint = newest(run)
    scale, training = checkpoint.networks["normalizer"], checkpoint.training
    assert training is not None
    assert training["normalizer.count"] == len(stored) == 160
    torch.testing.assert_close(scale["mean"], stored.mean(dim=0).float())
    torch.testing.assert_close(scale["inv_std"], stored.var(dim=0, correction=0).add(1e-8).rsqrt().float())


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(run, tmp_path):
    algo = newest(run).config["run"]["algo"]
    other = made(tmp_path / "run", algo=algo, total_steps=120)
    settings, algorithm, _ = resume_settings({"out": str(other), "total_steps": 160})
    train(settings, algorithm, other, resume=True)
    first, second = newest(run), newest(other)
    for name, params in first.networks.items():
        for key, value in params.items():
            assert torch.equal(value, second.networks[name][key]), f"{name}.{key}"
    assert first.training is not None
    assert second.training is not None
    for name, value in first.training.items():
        assert torch.equal(value, second.training[name]), name


def test_the_policy_normalises_what_it_is_given(run):
    checkpoint = load_checkpoint(run)
    scale = checkpoint.networks["normalizer"]
    obs = checkpoint.probe_obs[:8]
    plain = {name: params for name, params in checkpoint.networks.items() if name != "normalizer"}
    by_hand = ((obs - scale["mean"]) * scale["inv_std"]).clamp(-10, 10)
    wanted = dataclasses.replace(checkpoint, networks=plain).policy().act(by_hand.numpy(), seed=3)
    given = checkpoint.policy().act(obs.numpy(), seed=3)
    np.testing.assert_array_equal(given.action, wanted.action)
    assert not np.array_equal(
        given.action, dataclasses.replace(checkpoint, networks=plain).policy().act(obs.numpy(), seed=3).action
    )


def test_the_exported_graph_takes_raw_observations(run, tmp_path):
    exported = export_checkpoint(run, tmp_path / "bundles", "pole")
    policy = load_checkpoint(run).policy()
    obs = np.concatenate([load_checkpoint(run).probe_obs.numpy()[:16], np.full((2, 4), 1e6, np.float32)])
    bundle = open_policy(exported.path)
    answer, wanted = bundle.act(obs, seed=5), policy.act(obs, seed=5)
    bundle.close()
    np.testing.assert_allclose(answer.action, wanted.action, atol=3e-4)


def test_the_networks_learn_from_normalised_observations(tmp_path, monkeypatch):
    run, algorithm = resolve(TINY | {"normalize_observation": True})
    trainer = Trainer(run, algorithm, tmp_path)
    learner = trainer.learner
    drawn, learnt = [], []
    sample, update = learner.replay.sample, learner.algorithm.update

    def recorded_sample(*arguments):
        drawn.append(sample(*arguments))
        return drawn[-1]

    def recorded_update(batch, noise):
        learnt.append((batch, ObservationScale(**trainer.checkpoint().networks["normalizer"])))
        return update(batch, noise)

    monkeypatch.setattr(learner.replay, "sample", recorded_sample)
    monkeypatch.setattr(learner.algorithm, "update", recorded_update)
    while learner.step < 120:
        learner.collect()
        learner.learn()
    trainer.close()
    assert len(learnt) == len(drawn) == 20
    for raw, (batch, scale) in zip(drawn, learnt, strict=True):
        assert torch.equal(batch.obs, scale.normalize(raw.obs))
        assert torch.equal(batch.next_obs, scale.normalize(raw.next_obs))
        assert torch.equal(batch.reward, raw.reward)


@pytest.mark.parametrize("value", [torch.zeros(3), torch.full((4,), float("inf"))])
def test_a_damaged_scale_is_refused(tmp_path, value):
    run = tiny_run(tmp_path / "run", normalize_observation=True, total_steps=100, warmup_steps=100)
    checkpoint = load_checkpoint(run)
    networks = checkpoint.networks | {"normalizer": checkpoint.networks["normalizer"] | {"mean": value}}
    path = checkpoint.path / "networks.safetensors"
    save_file({f"{n}.{k}": v for n, params in networks.items() for k, v in params.items()}, path)
    with pytest.raises(CheckpointError, match=r"normalizer|networks\.safetensors"):
        load_checkpoint(run)
