"""--dry-run: where the configuration comes from, what the run would cost."""

from __future__ import annotations

import re

import pytest

from rsm_train.cli import main
from rsm_train.config import resolve
from rsm_train.run import estimate as module
from rsm_train.run.checkpoint_files import list_checkpoints
from rsm_train.run.estimate import (
    Estimate,
    disk_bytes,
    estimate,
    format_estimate,
    kept_checkpoints,
    size,
    total_s,
)
from tests.rsm_train.runs import TINY, tiny_run

COST = Estimate(
    device="cpu",
    threads=1,
    random_step_s=0.001,
    step_s=0.01,
    update_s=0.1,
    eval_step_s=0.02,
    eval_limit=1000,
    replay_bytes=2**31,
    network_bytes=2**20,
    learning_bytes=2**21,
    program_bytes=2**30,
    checkpoint_bytes=2**20,
)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(module, "BUDGET_S", 0.2)


def test_a_dry_run_explains_and_estimates_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--preset", "quick", "--env", "InvertedPendulum-v5", "--gamma", "0.9", "--no-eval-one-particle"]
    assert main(["--dry-run", *options]) == 0
    output = capsys.readouterr().out
    for line in (
        r"gamma +0\.9 +command line",
        r"particles +8 +preset quick",
        r"policy_every +2 +default",
        r"eval_one_particle +off +command line",
        r"update +[\d.]+ ms +5,850 +.*",
        r"step of 4 environments, random +[\d.]+ ms +75 +.*",
        r"step of 4 environments, acting +[\d.]+ ms +2,925 +.*",
        r"evaluation, at most +[\d.]+ m?s +12 +.*",
        # (4 + 1 + 1 + 4 + 1) float32 for each of 100,000 transitions
        r"replay buffer, full +4\.2 MiB",
    ):
        assert re.search(f"^{line}$", output, re.M), line
    assert list(tmp_path.iterdir()) == []


def test_the_time_adds_up():
    run, _ = resolve(TINY | {"total_steps": 1_000, "warmup_steps": 100, "num_envs": 5, "eval_every": 300})
    # 20 random and 180 acting steps of 5 environments, 900 updates, 4 evaluations of 1,000 control steps
    assert total_s(run, COST) == pytest.approx(20 * 0.001 + 180 * 0.01 + 900 * 0.1 + 4 * 1000 * 0.02)
    text = format_estimate(run, COST)
    assert re.search(r"^all +2 min 52 s$", text, re.M)
    assert re.search(r"^process, .* +3\.0 GiB$", text, re.M)
    # Evaluations at 300, 600, 900 and the end; a buffer for 100,000 is never full with 1,000 steps.
    assert re.search(r"^checkpoints, 4 kept +4\.0 MiB$", text, re.M)
    assert re.search(r"^transitions to resume from +20\.5 MiB$", text, re.M)
    assert re.search(r"^all but metrics +24\.5 MiB$", text, re.M)


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint_every": 50, "keep_checkpoints": 9},
        {"checkpoint_every": 40, "keep_checkpoints": 2, "replay_size": 64},
        {"algo": "sac", "particles": None, "checkpoint_every": 9, "keep_checkpoints": 5},
    ],
)
def test_the_disk_that_a_run_takes(changes, tmp_path):
    # Optimisers have a state from the first update on, so the warm-up ends before the first checkpoint.
    settings = {"width": 64, "num_envs": 4, "warmup_steps": 20, **changes}
    run, algorithm = resolve(TINY | settings)
    cost = estimate(run, algorithm, tmp_path / "none")
    directory = tiny_run(tmp_path / "run", **settings)
    saved = list_checkpoints(directory)
    # The best is one more where it is not among the newest, which one cannot know before.
    assert len(saved) in (kept_checkpoints(run), kept_checkpoints(run) - 1)
    files = [path for path in directory.rglob("*") if path.is_file()]
    real = sum(path.stat().st_size for path in files if not re.search("tfevents|metrics", path.name))
    missing = kept_checkpoints(run) - len(saved)
    assert disk_bytes(run, cost) - missing * cost.checkpoint_bytes == pytest.approx(real, rel=0.2)


@pytest.mark.parametrize(
    ("changes", "saves"),
    [
        ({"eval_every": 80, "checkpoint_every": 1_000}, 2),
        ({"eval_every": 80, "checkpoint_every": 50}, 5),
        ({"eval_every": 200, "checkpoint_every": 200}, 1),
        ({"eval_every": 160, "checkpoint_every": 1}, 40),
        ({"eval_every": 80, "checkpoint_every": 50, "keep_checkpoints": 3}, 4),
    ],
)
def test_checkpoints_are_counted_once(changes, saves):
    run, _ = resolve(TINY | {"num_envs": 4, "keep_checkpoints": 100, **changes})
    assert kept_checkpoints(run) == saves


def test_what_is_measured_is_what_a_run_takes(tmp_path):
    run, algorithm = resolve(TINY)
    cost = estimate(run, algorithm, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert min(cost.random_step_s, cost.step_s, cost.update_s) > 0
    assert cost.random_step_s < cost.step_s, "acting costs the network's time"
    saved = list_checkpoints(tiny_run(tmp_path / "run"))[-1]
    tensors = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
    assert cost.checkpoint_bytes == pytest.approx(tensors, rel=0.5)
    assert cost.network_bytes < cost.checkpoint_bytes
    # Two of the four networks are learnt: two moments and a gradient each.
    assert cost.learning_bytes == pytest.approx(1.5 * cost.network_bytes, rel=0.02)
    larger, algorithm = resolve(TINY | {"width": 256, "depth": 4, "batch_size": 64})
    assert estimate(larger, algorithm, tmp_path / "none").update_s > 2 * cost.update_s


def test_a_run_without_a_warm_up_worth_the_name_is_estimated_too(tmp_path):
    run, algorithm = resolve(TINY | {"warmup_steps": 2, "updates_per_step": 1e-6})
    cost = estimate(run, algorithm, tmp_path)
    assert cost.random_step_s > 0
    assert cost.update_s > 0
    assert {name: number for name, _, number in module._parts(run, cost)}["update"] == 0


@pytest.mark.parametrize(("count", "text"), [(512, "0.5 KiB"), (3 * 2**20, "3.0 MiB"), (2**41, "2,048.0 GiB")])
def test_sizes(count, text):
    assert size(count) == text
