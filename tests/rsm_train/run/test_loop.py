import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rsm_common.errors import CheckpointError, ConfigError, TrainingError
from rsm_train.algorithms.dpmd import DPMD
from rsm_train.config import resolve
from rsm_train.environments.evaluation import Evaluation
from rsm_train.model.samplers.diffusion import DiffusionSampler
from rsm_train.policy import act_best_of_n, action_scale
from rsm_train.run.checkpoint import load_checkpoint, load_torch_policy, load_training, save_checkpoint
from rsm_train.run.checkpoint_files import find_checkpoint, list_checkpoints, prune_checkpoints
from rsm_train.run.loop import Trainer
from rsm_train.run.machine import pick_device
from tests.rsm_train.runs import TINY, tiny_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("runs") / "tiny")


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def timeless(run_dir):
    """The metrics but for those that tell the speed of the machine."""
    ignored = {"wall_s", "cpu_s", "steps_per_s", "updates_per_s"}
    return [{key: value for key, value in line.items() if key not in ignored} for line in lines(run_dir)]


def test_a_run_leaves_metrics_configuration_and_checkpoints(run_dir):
    records = lines(run_dir)
    train = [record for record in records if record["kind"] == "train"]
    evals = [record for record in records if record["kind"] == "eval"]
    assert [record["step"] for record in evals] == [80, 160]
    assert train[-1]["step"] == 160
    assert train[-1]["updates"] == 60
    for name in ("critic_loss", "policy_loss", "weight_ess_fraction", "temperature", "steps_per_s"):
        assert np.isfinite(train[-1][name]), name
    assert len(evals[0]["eval_returns"]) == 2
    assert evals[0]["eval_mean"] == pytest.approx(np.mean(evals[0]["eval_returns"]))
    config = json.loads((run_dir / "config.json").read_text())
    assert config["run"]["env"] == "InvertedPendulum-v5"
    assert config["algorithm"]["particles"] == 4
    assert list((run_dir / "tensorboard").glob("events*"))
    assert [path.name for path in list_checkpoints(run_dir)] == ["step_000000080", "step_000000160"]


def test_a_checkpoint_acts_like_the_networks_it_was_made_from(run_dir):
    checkpoint = load_checkpoint(list_checkpoints(run_dir)[-1])
    spec = checkpoint.spec
    assert (spec.env_id, spec.noise_shape, spec.algorithm) == ("InvertedPendulum-v5", (5, 4, 1), "dpmd")
    assert (spec.action.low, spec.action.high) == ((-3.0,), (3.0,))
    assert spec.control_dt_s == pytest.approx(0.04)
    assert checkpoint.probe_obs.shape[1] == 4
    policy = checkpoint.policy()
    obs = checkpoint.probe_obs.numpy()[:5]
    result = policy.act(obs, seed=3)
    assert result.seed is not None
    again = policy.act(obs[2], seed=int(result.seed[2]))
    np.testing.assert_allclose(again.action, result.action[2], atol=1e-5)
    assert (np.abs(result.action) <= 3).all()
    assert not np.array_equal(policy.act(obs, seed=4).action, result.action)


def test_same_seed_same_run_and_other_seed_another(run_dir, tmp_path):
    again = tiny_run(tmp_path / "again")
    other = tiny_run(tmp_path / "other", seed=1)

    def weights(run):
        return load_file(list_checkpoints(run)[-1] / "networks.safetensors")

    first, second, third = weights(run_dir), weights(again), weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["policy.layers.1.weight"], third["policy.layers.1.weight"])
    ignored = {"wall_s", "cpu_s", "steps_per_s", "updates_per_s"}
    for a, b in zip(lines(run_dir), lines(again), strict=True):
        assert {k: v for k, v in a.items() if k not in ignored} == {
            k: v for k, v in b.items() if k not in ignored
        }


def test_the_best_checkpoint_is_found_and_survives_pruning(tmp_path, monkeypatch):
    returns = iter([[1.0], [9.0], [2.0], [3.0]])
    monkeypatch.setattr(Trainer, "evaluate", lambda self: Evaluation(next(returns)))
    run = tiny_run(tmp_path / "run", eval_every=40, keep_checkpoints=1)
    assert [path.name for path in list_checkpoints(run)] == ["step_000000080", "step_000000160"]
    assert find_checkpoint(run).name == "step_000000080"
    evaluation = load_checkpoint(run).spec.evaluation
    assert evaluation is not None
    assert evaluation["mean"] == 9.0
    best, last = list_checkpoints(run)
    assert (last / "training.safetensors").is_file()
    assert not (best / "training.safetensors").exists(), "a policy only"
    with pytest.raises(CheckpointError, match="holds a policy but not the state of its training"):
        load_training(best)


def test_steps_of_more_digits_come_after_those_of_less(run_dir, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / "run")
    names = ["step_999999999", "step_1000000000", "step_2000000000"]
    first, second = list_checkpoints(run)
    for name, path in zip(names, (first, second, shutil.copytree(first, tmp_path / "third")), strict=True):
        path.rename(run / "checkpoints" / name)
    assert [path.name for path in list_checkpoints(run)] == names
    for path in list_checkpoints(run):
        (path / "state.json").write_text('{"evaluation": {"mean": 1.0}}')
    assert find_checkpoint(run).name == names[-1], "the newest of equals"
    prune_checkpoints(run, 2)
    assert [path.name for path in list_checkpoints(run)] == names[1:]


def test_a_missing_compiler_is_heard_of_before_environments_begin(tmp_path, monkeypatch):
    monkeypatch.setattr("rsm_train.run.machine.can_compile", lambda device: False)
    monkeypatch.setattr("rsm_train.run.learner.TrainingEnvs", None)
    with pytest.raises(ConfigError, match="--compile off"):
        tiny_run(tmp_path / "run", compile="on")


def test_a_replay_buffer_that_does_not_fit_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"GiB .* replay_size of 1,000,000,000,000,000, .*--replay-size"):
        tiny_run(tmp_path / "run", replay_size=10**15)
    assert not (tmp_path / "run").exists()


def test_an_update_that_diverges_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    original = DPMD.update

    def diverge(self, batch, noise):
        metrics = original(self, batch, noise)
        return metrics | {
            "critic_loss": metrics["critic_loss"] * float("nan" if self.agent.updates > 20 else 1)
        }

    monkeypatch.setattr(DPMD, "update", diverge)
    with pytest.raises(TrainingError, match="critic_loss became nan"):
        tiny_run(tmp_path / "run", eval_every=110)
    assert load_torch_policy(tmp_path / "run").act(np.zeros(4), seed=0).action.shape == (1,)


def test_an_occupied_run_directory_is_refused_and_untouched(run_dir):
    before = sorted(path.name for path in run_dir.iterdir())
    with pytest.raises(ConfigError, match="not empty"):
        tiny_run(run_dir)
    assert sorted(path.name for path in run_dir.iterdir()) == before


def test_a_run_directory_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        tiny_run(tmp_path / "file")
    with pytest.raises(ConfigError, match="Not a directory"):
        tiny_run(tmp_path / "file" / "run")


@pytest.mark.parametrize("name", ["cuda:99", "abacus", "xpu"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ConfigError, match="device"):
        pick_device(name)


def damaged(run_dir, tmp_path, file, change):
    checkpoint = load_checkpoint(run_dir)
    path = save_checkpoint(tmp_path, checkpoint)
    target = path / file
    content = target.read_bytes()
    target.write_bytes(change(content))
    return path


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("networks.safetensors", lambda content: content[: len(content) // 2]),
        ("networks.safetensors", lambda content: b"\x80\x04" + content),
        ("config.json", lambda content: b"{"),
        ("config.json", lambda content: content.replace(b'"schema_version": 1', b'"schema_version": 7')),
        (
            "config.json",
            lambda content: content.replace(b'"particles": 4,\n    "prior', b'"particles": 5,\n    "prior'),
        ),
        ("config.json", lambda content: content.replace(b'"cosine"', b'"square"')),
        ("config.json", lambda content: content.replace(b'"prior_std": 0.5', b'"prior_std": "x"')),
        ("policy.json", lambda content: content.replace(b'"steps": 5', b'"steps": "five"')),
        ("probe.safetensors", lambda content: b""),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(run_dir, tmp_path, file, change):
    path = damaged(run_dir, tmp_path, file, change)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.networks["policy_average"].pop("layers.1.weight"), "policy_average.layers.1 is missing"),
        (lambda c: c.networks["policy_average"].pop("time.layers.0.bias"), "time.layers.0 is missing"),
        (lambda c: c.networks.pop("critic"), "critic.layers.0 is missing"),
        (lambda c: c.networks["critic"].update({"layers.0.weight": torch.zeros(2, 16, 9)}), "5 inputs"),
        (lambda c: c.networks["critic"]["layers.1.bias"].fill_(float("nan")), "NaN"),
        (lambda c: c.probe_obs.fill_(float("inf")), "finite observations"),
    ],
)
def test_networks_that_do_not_fit_are_refused(run_dir, tmp_path, change, words):
    checkpoint = load_checkpoint(run_dir)
    change(checkpoint)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(save_checkpoint(tmp_path, checkpoint))


def test_an_unreadable_evaluation_does_not_hide_the_other_checkpoints(run_dir, tmp_path):
    checkpoint = load_checkpoint(run_dir)
    good = save_checkpoint(tmp_path, dataclasses.replace(checkpoint, state={**checkpoint.state, "step": 1}))
    bad = save_checkpoint(tmp_path, dataclasses.replace(checkpoint, state={**checkpoint.state, "step": 2}))
    (bad / "state.json").write_text('{"evaluation": {"x": 1}}')
    assert find_checkpoint(tmp_path) == good


def test_the_average_and_not_the_live_policy_is_what_acts(run_dir):
    checkpoint = load_checkpoint(list_checkpoints(run_dir)[-1])
    obs, noise = torch.randn(9, 4), torch.randn(9, 5, 4, 1)
    sampler, critic = checkpoint.sampler, checkpoint.networks["critic"]
    assert isinstance(sampler, DiffusionSampler)

    def actions(network):
        weights = sampler.prepare(checkpoint.networks[network], critic, action_scale(checkpoint.spec))
        return act_best_of_n(weights, obs, noise)[0].numpy()

    got = checkpoint.policy().act(obs.numpy(), noise=noise.numpy()).action
    assert np.array_equal(got, actions("policy_average"))
    assert not np.array_equal(got, actions("policy"))


def test_an_interrupted_write_leaves_no_checkpoint(run_dir, tmp_path, monkeypatch):
    checkpoint = load_checkpoint(run_dir)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rsm_train.run.checkpoint_files.records_json", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, checkpoint)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_full_disk_in_training_is_one_sentence(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rsm_train.run.saving.save_checkpoint", full)
    with pytest.raises(TrainingError, match="No space left on device; earlier checkpoints are intact"):
        tiny_run(tmp_path / "run")


def test_random_warm_up_then_policy_actions(tmp_path):
    run, algorithm = resolve(TINY)
    trainer = Trainer(run, algorithm, tmp_path)
    learner = trainer.learner
    while learner.step < run.warmup_steps:
        learner.collect()
        learner.learn()
    assert learner.updates == 0
    actions = learner.replay._data.action[:100, 0]
    assert actions.min() < -0.8
    assert actions.max() > 0.8
    assert abs(actions.mean()) < 0.2
    learner.collect()
    learner.learn()
    assert learner.updates == 2
    trainer.close()
