"""--normalize-reward and --noise-hold: in learning, in checkpoints, and in the value that is served."""

from __future__ import annotations

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rsm_common.errors import CheckpointError, ConfigError
from rsm_train.config import resolve
from rsm_train.model.critic import fold, q_values
from rsm_train.model.normalizer import ReturnStatistics
from rsm_train.policy import act_best_of_n
from rsm_train.run.checkpoint import load_checkpoint
from rsm_train.run.checkpoint_files import list_checkpoints
from rsm_train.run.loop import Trainer
from rsm_train.run.run_directory import resume_settings
from rsm_train.run.start import train
from tests.rsm_train.critic_kinds import ALL_AT_ONCE
from tests.rsm_train.runs import TINY, tiny_run
from tests.rsm_train.training_envs import MODULE

STEADY = f"{MODULE}:RsmSteady-v0"


def settings(algo, **changes):
    return {name: value for name, value in TINY.items() if name != "particles" or algo != "sac"} | {
        "algo": algo,
        **changes,
    }


def trainer_of(tmp_path, algo="dpmd", **changes):
    return Trainer(*resolve(settings(algo, **changes)), tmp_path)


def test_the_networks_learn_from_rewards_in_the_unit_of_the_moment(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, normalize_reward=True, normalize_observation=True)
    learner = trainer.learner
    by_hand = ReturnStatistics(2, 0.99)
    step, drawn, learnt = learner.envs.step, [], []
    sample, update = learner.replay.sample, learner.algorithm.update

    def recorded_step(action):
        batch, returns = step(action)
        by_hand.add(batch.reward, learner.envs.ended)
        return batch, returns

    def recorded_sample(*arguments):
        drawn.append(sample(*arguments))
        return drawn[-1]

    def recorded_update(batch, noise):
        learnt.append((batch.reward, by_hand.unit))
        return update(batch, noise)

    monkeypatch.setattr(learner.envs, "step", recorded_step)
    monkeypatch.setattr(learner.replay, "sample", recorded_sample)
    monkeypatch.setattr(learner.algorithm, "update", recorded_update)
    while learner.step < 120:
        learner.collect()
        learner.learn()
    trainer.close()
    assert len(learnt) == len(drawn) == 20
    for raw, (reward, unit) in zip(drawn, learnt, strict=True):
        assert set(raw.reward.unique().tolist()) <= {0.0, 1.0}, (
            "the replay buffer has the environment's rewards"
        )
        torch.testing.assert_close(reward, raw.reward / unit)
    assert len({unit for _, unit in learnt}) > 5
    assert learnt[-1][1] > 1.5
    stored = learner.networks()["value"]["unit"]
    assert stored.item() == pytest.approx(by_hand.unit / 0.1, rel=1e-6), "reward_scale is a part of the unit"


@pytest.mark.parametrize("algo", ["dpmd", "sdac", "sac"])
def test_without_it_the_unit_is_that_of_reward_scale(tmp_path, algo):
    trainer = trainer_of(tmp_path, algo, reward_scale=0.25)
    trainer.learner.collect()
    assert trainer.learner.networks()["value"]["unit"].item() == 4.0
    trainer.close()


@pytest.mark.parametrize("kind", ["plain", "normalised", "composed"])
def test_the_served_value_is_in_the_rewards_of_the_environment(tmp_path, kind):
    """7 in each step, for ever, and gamma 0.5: 14, in whatever unit the critics have learnt."""
    changes = {
        "plain": {},
        "normalised": {"normalize_reward": True},
        "composed": {**ALL_AT_ONCE, "normalize_reward": True, "normalize_observation": True, "noise_hold": 4},
    }[kind]
    run = tiny_run(
        tmp_path / "run",
        **{"env": STEADY, "gamma": 0.5, "total_steps": 600, "eval_every": 600, "batch_size": 64, **changes},
        **{"eval_episodes": 1, "reward_scale": 0.5, "critic_lr": 3e-3},
    )
    checkpoint = load_checkpoint(run)
    unit = checkpoint.networks["value"]["unit"].item()
    assert unit == (2.0 if kind == "plain" else pytest.approx(14 / 5 / 0.5, rel=0.05))
    obs = checkpoint.probe_obs.numpy()
    answer = checkpoint.policy().act(obs, seed=3)
    assert answer.q is not None
    assert np.median(answer.q) == pytest.approx(14.0, rel=0.1)


def test_the_value_of_a_policy_is_the_critics_times_the_unit(tmp_path):
    run = tiny_run(tmp_path / "run", **ALL_AT_ONCE, normalize_reward=True)
    checkpoint = load_checkpoint(run)
    unit = checkpoint.networks["value"]["unit"]
    assert unit.dtype == torch.float32
    obs, noise = checkpoint.probe_obs[:16], torch.randn(16, 5, 4, 1)
    weights = checkpoint.policy().weights
    particles, values = weights.particles(obs, noise)
    assert values is not None
    q = q_values(fold(checkpoint.networks["critic"]), obs, particles).amin(0)
    torch.testing.assert_close(values, unit * q, rtol=1e-5, atol=1e-5)
    other = (
        dataclasses.replace(checkpoint, networks=checkpoint.networks | {"value": {"unit": 3 * unit}})
        .policy()
        .weights
    )
    action, value = act_best_of_n(weights, obs, noise)
    action_3, value_3 = act_best_of_n(other, obs, noise)
    assert value is not None
    assert value_3 is not None
    torch.testing.assert_close(value_3, 3 * value)
    assert torch.equal(action, action_3), "the unit chooses no other particle"


def test_held_noise_is_what_acts(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, noise_hold=6, env=STEADY)
    learner = trainer.learner
    acted, act = [], learner.algorithm.agent.act

    def recorded(obs, noise, exploration):
        acted.append((noise.clone(), exploration.clone(), learner.envs.ended.clone()))
        return act(obs, noise, exploration)

    monkeypatch.setattr(learner.algorithm.agent, "act", recorded)
    while learner.step < 300:
        learner.collect()
    trainer.close()
    assert len(acted) == 100, "the warm-up does not act"
    held = 0
    for (noise, exploration, _), (next_noise, next_exploration, ended) in itertools.pairwise(acted):
        same = [torch.equal(noise[env], next_noise[env]) for env in range(2)]
        assert same == [torch.equal(exploration[env], next_exploration[env]) for env in range(2)]
        assert not any(one and bool(end) for one, end in zip(same, ended, strict=True)), "held past an episode"
        held += sum(same)
    assert 20 < held < 120


def test_without_holding_the_noise_is_that_of_the_generator(tmp_path, monkeypatch):
    """The random stream of a run without held noise is that of earlier versions."""
    trainer = trainer_of(tmp_path, warmup_steps=2)
    learner = trainer.learner
    learner.collect()
    generator = torch.Generator()
    generator.set_state(learner._acting_generator.get_state())
    acted, act = [], learner.algorithm.agent.act

    def recorded(*given):
        acted.append(given)
        return act(*given)

    monkeypatch.setattr(learner.algorithm.agent, "act", recorded)
    learner.collect()
    trainer.close()
    assert torch.equal(acted[0][1], torch.randn(2, 5, 4, 1, generator=generator))
    assert torch.equal(acted[0][2], torch.randn(2, 1, generator=generator))


def test_what_begins_anew_after_a_resume_begins_with_new_noise_and_a_new_return(tmp_path, capsys):
    """The open episodes of this environment cannot be restored."""
    changes = {
        "env": f"{MODULE}:RsmForgetful-v0",
        "normalize_reward": True,
        "noise_hold": 50,
        "total_steps": 110,
    }
    run = tiny_run(tmp_path / "run", **changes, eval_every=110)
    saved = load_file(list_checkpoints(run)[-1] / "training.safetensors")
    assert saved["returns.returns"].abs().min() > 0, "inside of an episode"
    settings_, algorithm, _ = resume_settings({"out": str(run), "total_steps": 112})
    seen = []
    collect = Trainer.restore

    def restored(self, checkpoint):
        collect(self, checkpoint)
        state = self.learner.state()
        seen.append((state["returns.returns"].tolist(), state["held.left"].tolist()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "restore", restored)
        train(settings_, algorithm, run, resume=True)
    assert "begin anew" in capsys.readouterr().err
    assert seen == [([0.0, 0.0], [0, 0])]


@pytest.mark.parametrize("value", [0, -1])
def test_a_span_of_no_step_is_refused(value):
    with pytest.raises(ConfigError, match=f"wanted noise_hold >= 1, got {value}"):
        resolve(TINY | {"noise_hold": value})


# --- damage


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("runs") / "run", **ALL_AT_ONCE, normalize_reward=True, noise_hold=5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value.unit": torch.tensor(float("nan"))}, r"value\.unit: wanted one finite number > 0"),
        ({"value.unit": torch.tensor(0.0)}, r"value\.unit: wanted one finite number > 0 .*, got 0"),
        ({"value.unit": torch.tensor(-2.0)}, r"value\.unit: wanted one finite number > 0 .*, got -2"),
        ({"value.unit": torch.tensor(float("inf"))}, r"value\.unit: wanted one finite number > 0 .*, got inf"),
        ({"value.unit": torch.ones(3)}, r"value\.unit: wanted one finite number > 0 .*, got shape \[3\]"),
        ({"value.unit": torch.ones(1, 1)}, r"value\.unit: wanted one finite number > 0 .*, got shape \[1, 1\]"),
        ({"value.unit": None, "value.other": torch.ones(())}, r"value\.unit: wanted one .*, got none"),
        (
            {"critic.atoms": torch.zeros(30)},
            r"critic\.layers\.2: .* with 16 inputs and 30 outputs",
        ),
        ({"critic.atoms": torch.zeros(1)}, r"critic\.atoms: wanted at least 2 finite numbers, got shape \[1\]"),
        ({"critic.atoms": torch.zeros(1, 31)}, r"critic\.atoms: wanted at least 2 finite numbers"),
        ({"critic.atoms": torch.full((31,), float("nan"))}, r"critic\.atoms: wanted at least 2 finite"),
        ({"critic.atoms": None}, r"critic\.layers\.2: wanted a weight with 16 inputs and 1 outputs"),
        ({"critic.input_norm.mean": None}, r"critic\.input_norm\.mean: wanted finite values of shape \[1, 5\]"),
        ({"critic.input_norm.var": None}, r"critic\.input_norm\.var: wanted finite values of shape \[1, 5\]"),
        ({"critic.input_norm.var": -torch.ones(1, 5)}, r"input_norm\.var: wanted no negative variance"),
        (
            {"critic.input_norm.mean": torch.zeros(5)},
            r"input_norm\.mean: wanted finite values of shape \[1, 5\]",
        ),
        ({"critic.batch_norms.0.mean": None}, r"batch_norms\.0\.mean: wanted finite values of shape \[2, 16\]"),
        ({"critic.batch_norms.1.weight": None}, r"batch_norms\.1\.weight: wanted finite values"),
        ({"critic.batch_norms.1.var": torch.full((2, 16), -1e-6)}, r"batch_norms\.1\.var: wanted no negative"),
        (
            {"critic.batch_norms.1.var": torch.full((2, 16), float("inf"))},
            r"batch_norms\.1\.var: wanted finite",
        ),
        ({"critic.batch_norms.1.mean": torch.zeros(2, 15)}, r"batch_norms\.1\.mean: wanted finite values of"),
        (
            {f"critic.batch_norms.0.{part}": None for part in ("weight", "bias", "mean", "var")},
            r"critic: wanted batch_norms of every hidden layer or of none, got .*: batch_norms\.0",
        ),
        (
            {f"critic.batch_norms.2.{part}": torch.ones(2, 31) for part in ("weight", "bias", "mean", "var")},
            r"critic: wanted batch_norms of every hidden layer or of none, got .*: batch_norms\.2",
        ),
        ({"critic.batch_norms.0.mean": torch.zeros(2, 16, dtype=torch.float64)}, "wanted float32, got"),
    ],
)
def test_damaged_critics_are_refused_in_one_sentence(composed, tmp_path, change, words):
    checkpoint = load_checkpoint(composed)
    tensors = load_file(checkpoint.path / "networks.safetensors")
    unknown = [name for name, value in change.items() if value is None and name not in tensors]
    assert unknown == []
    tensors = {name: value for name, value in (tensors | change).items() if value is not None}
    copy = tmp_path / "checkpoints" / checkpoint.path.name
    copy.mkdir(parents=True)
    for path in checkpoint.path.iterdir():
        if path.name not in ("sha256.json", "networks.safetensors"):
            (copy / path.name).write_bytes(path.read_bytes())
    save_file(tensors, copy / "networks.safetensors")
    with pytest.raises(CheckpointError, match=words) as caught:
        load_checkpoint(copy)
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["returns.returns", "returns.largest", "returns.squares", "held.left", "held.noise.policy"]
)
@pytest.mark.parametrize("how", ["missing", "misshapen"])
def test_damaged_state_of_rewards_and_noise_is_refused(composed, tmp_path, name, how):
    run = shutil.copytree(composed, tmp_path / "run")
    for older in list_checkpoints(run)[:-1]:
        shutil.rmtree(older)
    path = list_checkpoints(run)[-1] / "training.safetensors"
    tensors = load_file(path)
    if how == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(7)
    save_file(tensors, path)
    (path.parent / "sha256.json").unlink()
    run_config, algorithm, _ = resume_settings({"out": str(run), "total_steps": 200})
    with pytest.raises(CheckpointError, match=f"damaged .*{name.split('.')[-1]}"):
        train(run_config, algorithm, run, resume=True)
