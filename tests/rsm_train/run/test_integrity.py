"""Damaged files of a run: each is noticed, named, and passed over where an older checkpoint is sound."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rsm_export.cli import main as rsm_export
from safetensors.torch import load_file, save_file

from rsm_common.errors import CheckpointError, ConfigError, DamagedCheckpointError
from rsm_common.policy import ActResult
from rsm_eval.cli import main as rsm_eval
from rsm_train.cli import main
from rsm_train.run.checkpoint import load_checkpoint, load_torch_policy, load_training
from rsm_train.run.checkpoint_files import find_checkpoint, list_checkpoints
from rsm_train.run.run_directory import lock
from tests.rsm_train.model.test_critic import by_hand
from tests.rsm_train.run.test_resume import SETTINGS, assert_same_run, resume
from tests.rsm_train.runs import tiny_run

GOLDEN = Path(__file__).parents[2] / "data" / "run_v1"
FILES = ("networks.safetensors", "policy.json", "config.json", "state.json", "probe.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "whole", **SETTINGS)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def flip(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def newest_files(run: Path) -> list[Path]:
    """The files of the newest checkpoint, and the replay files that it needs."""
    checkpoint = list_checkpoints(run)[-1]
    needed = load_training(checkpoint).replay_records
    assert len(needed) >= 3
    return [*sorted(checkpoint.iterdir()), *(run / "replay" / name for name in sorted(needed))]


def test_every_flipped_bit_is_noticed_and_its_file_named(whole, tmp_path):
    """At least ten flips in each file, of a mantissa, an exponent and a JSON text among them."""
    choose = random.Random(0)
    for name in [path.relative_to(whole) for path in newest_files(whole)]:
        original = (whole / name).read_bytes()
        for _ in range(10):
            run = tmp_path / "run"
            shutil.copytree(whole, run)
            flip(run / name, choose.randrange(len(original)), choose.randrange(8))
            with pytest.raises(CheckpointError) as caught:
                read_everything(run)
            assert name.name in str(caught.value) or name.name == "sha256.json", str(caught.value)
            shutil.rmtree(run)


def read_everything(run: Path) -> None:
    from rsm_train.run.replay import ReplayBuffer, load_segments

    checkpoint = load_training(list_checkpoints(run)[-1])
    replay = ReplayBuffer(SETTINGS["replay_size"], 11, 3)
    load_segments(
        run / "replay", replay, checkpoint.state["training"]["added"], dict(checkpoint.replay_records)
    )


def test_export_and_evaluation_name_the_damaged_file_and_a_sound_checkpoint(run, tmp_path, capsys):
    best = find_checkpoint(run)
    flip(best / "networks.safetensors", 3000)
    other = None
    for command in (
        lambda: rsm_export([str(run), "--repo", str(tmp_path / "repo")]),
        lambda: rsm_eval(["--env", SETTINGS["env"], "--policy", str(best), "--episodes", "1"]),
    ):
        assert command() == 2
        error = capsys.readouterr().err
        assert f"checkpoint {best} is damaged: cannot read networks.safetensors" in error
        other = re.search(r"name another checkpoint of the run, such as (\S+)", error)
        assert other
    assert other
    assert rsm_export([other[1], "--repo", str(tmp_path / "repo")]) == 0


def test_a_lone_damaged_checkpoint_is_not_said_to_have_another(run, tmp_path):
    alone = shutil.copytree(list_checkpoints(run)[-1], tmp_path / "alone")
    flip(alone / "policy.json", 5)
    with pytest.raises(DamagedCheckpointError, match=r"policy\.json .*; copy it again from where"):
        load_checkpoint(alone)


def deleted(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.fixture(scope="module")
def from_older(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as it goes on from its older checkpoint, the newest one having been deleted."""
    run = shutil.copytree(whole, tmp_path_factory.mktemp("runs") / "older")
    shutil.rmtree(list_checkpoints(run)[-1])
    return resume(run, total_steps=270)


@pytest.mark.parametrize("damage", [deleted, truncated, emptied])
@pytest.mark.parametrize("name", [*FILES, "training.safetensors"])
def test_resume_takes_the_older_checkpoint_and_names_both(
    run: Path, from_older: Path, capsys: Any, name: str, damage: Callable[[Path], None]
) -> None:
    older, newest = list_checkpoints(run)[-2:]
    damage(newest / name)
    resume(run, total_steps=270)
    error = capsys.readouterr().err
    (warning,) = [line for line in error.splitlines() if line.startswith("warning: checkpoint")]
    assert str(newest) in warning
    assert f"goes on from the older checkpoint {older}" in warning
    assert "train again" not in error
    kept = newest.with_name(f"damaged_{newest.name}")
    assert f"kept as {kept}" in warning
    assert kept.is_dir()
    assert_same_run(run, from_older)


def test_resume_takes_the_older_checkpoint_if_the_last_replay_file_is_damaged(run, from_older, capsys):
    segment = sorted((run / "replay").iterdir())[-1]
    flip(segment, segment.stat().st_size - 1, 6)
    resume(run, total_steps=270)
    error = capsys.readouterr().err
    assert f"warning: replay file {segment} is damaged" in error
    assert_same_run(run, from_older)


def test_without_a_sound_checkpoint_the_policy_is_named(run):
    shutil.rmtree(run / "replay")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint of the run can be resumed, use the policy in (\S+),"
    ) as caught:
        resume(run, total_steps=270)
    path = re.search(r"use the policy in (\S+),", str(caught.value))
    assert path
    load_torch_policy(path[1])


def test_a_run_whose_checkpoints_were_deleted_does_not_begin_again_silently(run):
    metrics = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match=r"got none although the run reached step 240; restore"):
        resume(run, total_steps=270)
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_a_run_that_was_ended_before_its_first_checkpoint_says_that_it_begins_again(run, capsys):
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "replay")
    (run / "metrics.jsonl").write_text('{"step": 8, "kind": "train"}\n')
    resume(run)
    assert (
        f"warning: the run in {str(run)!r} has no checkpoint, so it begins again at step 0"
        in capsys.readouterr().err
    )


# Runs that were written before there was a sha256.json


def test_a_run_of_an_older_version_is_resumed_with_one_warning(tmp_path, capsys, caplog):
    run = shutil.copytree(GOLDEN, tmp_path / "run")
    before = (run / "metrics.jsonl").read_text().splitlines()
    (old,) = list_checkpoints(run)
    assert main(["--resume", "--out", str(run), "--total-steps", "240"]) == 0
    warnings = [record.getMessage() for record in caplog.records if "sha256.json" in record.getMessage()]
    assert warnings == [
        f"checkpoint {old} has no sha256.json, which older versions did not write: damage to its files may "
        "not be noticed"
    ]
    assert (run / "metrics.jsonl").read_text().splitlines()[: len(before)] == before
    newest = list_checkpoints(run)[-1]
    assert newest.name == "step_000000240"
    records = json.loads((newest / "sha256.json").read_text())["files"]
    segments = {f"replay/{path.name}" for path in (run / "replay").iterdir()}
    assert segments <= set(records), "the files of the older version are recorded, too"


@pytest.mark.parametrize("layer_norm", [True, False])
def test_a_run_with_critics_of_an_older_version_goes_on_as_if_it_were_of_this_one(tmp_path, layer_norm):
    """Before critics were composed, their one setting was critic_layer_norm, and values had no unit."""
    settings = {**SETTINGS, "critic_norm": "layer" if layer_norm else "none"}
    whole = tiny_run(tmp_path / "whole", **settings)
    run = tiny_run(tmp_path / "run", **{**settings, "total_steps": 120})
    (run / "config.json").write_text(of_older_version(run / "config.json", layer_norm))
    for checkpoint in list_checkpoints(run):
        (checkpoint / "config.json").write_text(of_older_version(checkpoint / "config.json", layer_norm))
        (checkpoint / "sha256.json").unlink()
        networks = load_file(checkpoint / "networks.safetensors")
        del networks["value.unit"]
        save_file(networks, checkpoint / "networks.safetensors")
    resume(run, total_steps=240)
    assert_same_run(run, whole)
    settings = json.loads((run / "config.json").read_text())["algorithm"]
    assert settings["critic_norm"] == ("layer" if layer_norm else "none")
    assert "critic_layer_norm" not in settings


def of_older_version(path: Path, layer_norm: bool) -> str:
    """The text of a config.json as versions before composed critics wrote it."""
    config = json.loads(path.read_text())
    old = json.loads((GOLDEN / "config.json").read_text())
    assert "critic_layer_norm" in old["algorithm"]
    for part in ("run", "algorithm"):
        added = config[part].keys() - old[part].keys()
        config[part] = {name: value for name, value in config[part].items() if name not in added}
    assert "critic_norm" not in config["algorithm"]
    config["algorithm"]["critic_layer_norm"] = layer_norm
    return json.dumps(config)


def test_a_checkpoint_without_a_unit_has_the_values_of_its_critics(tmp_path):
    run = shutil.copytree(GOLDEN, tmp_path / "run")
    old = load_checkpoint(run)
    assert "value" not in old.networks
    obs = old.probe_obs[:9]
    answer = old.policy().act(obs.numpy(), seed=3)
    critics = {name: value.double() for name, value in old.networks["critic"].items()}

    def value(act: ActResult) -> np.ndarray:
        action = torch.from_numpy(act.action).double() / 3
        return by_hand(critics, obs.double(), action, over_batch=False)[..., 0].amin(0).numpy()

    assert answer.q is not None
    np.testing.assert_allclose(answer.q, value(answer), rtol=1e-5, atol=1e-6)
    assert main(["--resume", "--out", str(run), "--total-steps", "240"]) == 0
    new = load_checkpoint(list_checkpoints(run)[-1])
    assert new.networks["value"]["unit"].item() == 10.0, "1 / reward_scale"
    critics = {name: value.double() for name, value in new.networks["critic"].items()}
    answer = new.policy().act(obs.numpy(), seed=3)
    assert answer.q is not None
    np.testing.assert_allclose(answer.q, 10 * value(answer), rtol=1e-5, atol=1e-5)


# Locks


def test_a_lock_file_that_cannot_be_opened_is_one_sentence(run, monkeypatch, capsys):
    original = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("/lock"):
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *arguments, **options)

    for number, remedy in (
        (errno.EROFS, "copy it to a file system that is"),
        (errno.EACCES, "writable for this user"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            assert main(["--resume", "--out", str(run), "--total-steps", "300"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"cannot open {str(run / 'lock')!r} for writing: {os.strerror(number)}" in error
        assert remedy in error
        assert error.endswith(" and give the same command again\n"), "a resume alone would forget --total-steps"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_directory_that_cannot_be_written_to_is_not_called_full(whole, capsys):
    """As an ordinary user, with the lock file alone writable."""
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        run = shutil.copytree(whole, Path(parent) / "run")
        for path in run.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        (run / "lock").chmod(0o666)
        os.seteuid(65534)
        try:
            status = main(["--resume", "--out", str(run), "--total-steps", "300"])
        finally:
            os.seteuid(0)
    error = capsys.readouterr().err
    assert status == 2
    assert "Permission denied" in error
    assert "make room" not in error
    assert "writable for this user" in error


def test_a_second_process_is_still_refused(run):
    with lock(run), pytest.raises(ConfigError, match="another process is writing"), lock(run):
        pass
