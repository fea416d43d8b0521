"""Several seeds at once: the results of lone runs, and what happens when some fail or all are stopped."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from rsm_common.errors import ConfigError
from rsm_train.cli import main
from rsm_train.run.checkpoint_files import list_checkpoints
from rsm_train.run.many_seeds import Worker, failures, format_results, interrupted, plan, run_seeds, unfinished
from tests.hang import HANG_S
from tests.rsm_train.runs import tiny_run

ENV = "InvertedPendulum-v5"
TINY = (
    f"--env {ENV} --preset quick --total-steps 160 --warmup-steps 100 --eval-every 80 --eval-episodes 2 "
    "--log-every 40 --batch-size 16 --num-envs 2 --width 16"
).split()


def weights(run_dir):
    return load_file(list_checkpoints(run_dir)[-1] / "networks.safetensors")


def test_every_seed_is_its_lone_run_and_a_failing_one_stops_no_other(tmp_path, capfd):
    (tmp_path / "s1").mkdir()
    old = {"step": 7, "kind": "eval", "eval_returns": [9.0], "eval_mean": 9.0, "eval_std": 0.0}
    (tmp_path / "s1" / "metrics.jsonl").write_text(json.dumps(old))
    assert main([*TINY, "--seeds", "0-2", "--jobs", "2", "--out", str(tmp_path / "s{seed}")]) == 2
    output = capfd.readouterr()
    sentence = output.err.splitlines()[-1]
    assert sentence == (
        f"rsm-train: 1 of 3 seeds failed: 1 (status 2, log {tmp_path}/s1.log); "
        "read there why and train these again"
    )
    assert re.search(r"^seed 1: rsm-train: wanted a new run directory", output.err, re.M)
    assert re.search(r"^seed 2: step       160  evaluation", output.err, re.M)
    assert "wanted a new run directory" in (tmp_path / "s1.log").read_text()
    assert re.search(r"^1 +- +- +- +- +-$", output.out, re.M)
    assert re.search(r"^2 +\d+\.\d ± \d+\.\d +\d+\.\d +\d+\.\d ± \d+\.\d +\d+\.\d +(80|160)$", output.out, re.M)
    assert re.search(r"^95 % +-?\d+\.\d to \d+\.\d", output.out, re.M)
    for seed in (0, 2):
        assert main([*TINY, "--seed", str(seed), "--out", str(tmp_path / f"lone{seed}")]) == 0
        together, lone = weights(tmp_path / f"s{seed}"), weights(tmp_path / f"lone{seed}")
        assert together.keys() == lone.keys()
        assert all(torch.equal(together[name], lone[name]) for name in lone)
    assert not torch.equal(weights(tmp_path / "s0")["policy.layers.0.weight"], lone["policy.layers.0.weight"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seeds", "0-1", "--seed", "1"], "--seed or --seeds, got both"),
        (["--seeds", "0-1", "--out", "here"], "here-s{seed}"),
        (["--seeds", "1-0"], "wanted seeds such as 0-4"),
        (["--seeds", "0,0"], "every seed once"),
        (["--seeds", str(2**63)], "wanted a seed from 0 to"),
        (["--seeds", "0-1", "--particles", "0"], "particles"),
        (["--seeds", "0-1", "--device", "cuda:9"], "cuda:9"),
    ],
)
def test_mistakes_are_told_once_and_start_nothing(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--env", ENV, *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_worker_is_the_lone_command_line(monkeypatch):
    monkeypatch.setattr("rsm_train.run.many_seeds._cores", lambda: 8)
    given = {"env": ENV, "gamma": 0.9, "seed": None, "eval_one_particle": False, "device": "cpu"}
    first, second = plan(given, [3, 7], None).workers
    assert first.command[1:3] == ("-m", "rsm_train.cli")
    assert sorted(first.command[3:]) == sorted(
        f"--env={ENV} --gamma=0.9 --no-eval-one-particle --device=cpu --seed=3 --threads=1".split()
    )
    assert str(second.run_dir) == f"runs/{ENV}-dpmd-paper-s7"
    assert str(second.log) == f"runs/{ENV}-dpmd-paper-s7.log"


@pytest.mark.parametrize(
    ("given", "seeds", "jobs", "expected"),
    [
        ({}, 5, None, 5),
        ({}, 20, None, 8),
        ({"threads": 3}, 5, None, 2),
        ({"threads": 16}, 5, None, 1),
        ({"preset": "quick"}, 20, None, 8),
        ({}, 5, 2, 2),
    ],
)
def test_as_many_at_once_as_there_are_cores(given, seeds, jobs, expected, monkeypatch):
    monkeypatch.setattr("rsm_train.run.many_seeds._cores", lambda: 8)
    assert plan({"env": ENV, "device": "cpu", **given}, range(seeds), jobs).jobs == expected


@pytest.mark.parametrize(
    ("given", "seeds", "jobs", "expected"),
    [
        ({}, 4, None, (4, ["--threads=2"])),
        ({}, 30, None, (30, ["--threads=1"])),
        ({}, 30, 2, (2, ["--threads=4"])),
        ({"threads": 3}, 4, None, (4, ["--threads=3"])),
        ({"preset": "quick"}, 4, None, (4, [])),
    ],
)
def test_on_a_gpu_all_at_once_share_the_cores(given, seeds, jobs, expected, monkeypatch):
    monkeypatch.setattr("rsm_train.run.many_seeds._cores", lambda: 8)
    monkeypatch.setattr("rsm_train.run.many_seeds.pick_device", lambda name: torch.device("cuda"))
    made = plan({"env": ENV, **given}, range(seeds), jobs)
    threads = [argument for argument in made.workers[0].command if argument.startswith("--threads")]
    assert (made.jobs, threads) == expected


def test_a_dry_run_says_what_the_seeds_set(monkeypatch, capsys):
    monkeypatch.setattr("rsm_train.run.estimate.BUDGET_S", 0.1)
    options = [
        "--env",
        ENV,
        "--dry-run",
        "--seeds",
        "3-4",
        "--device",
        "cpu",
        "--width",
        "16",
        "--compile",
        "off",
    ]
    assert main(options) == 0
    output = capsys.readouterr().out
    for line in (r"seed +3 +--seeds", r"threads +1 +--seeds", r"width +16 +command line"):
        assert re.search(f"^{line}$", output, re.M), line
    assert main([*options, "--threads", "1", "--particles", "2"]) == 0
    assert re.search(r"^threads +1 +command line$", capsys.readouterr().out, re.M)


def steps(run_dir):
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(run_dir)]


def test_stopped_seeds_are_saved_and_resumed_by_the_printed_command(tmp_path, capfd):
    out = tmp_path / "s{seed}"
    options = [*TINY, "--checkpoint-every", "40", "--seeds", "0-2", "--jobs", "2", "--out", str(out)]

    # In a process of its own: a signal to this one would reach whatever else listens here.
    process = subprocess.Popen(
        [sys.executable, "-m", "rsm_train.cli", *options, "--total-steps", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # Past the warm-up of 100 steps: the resumed run below is given 40 steps more than were taken.
    while not all(max(steps(tmp_path / name), default=0) >= 100 for name in ("s0", "s1")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, err
    assert re.search(r"^0 +stopped at step [\d,]+ +- +- +- +-$", out, re.M)
    assert re.search(r"^2 +not started +-", out, re.M)
    assert "mean" not in out
    command = shlex.split(err.splitlines()[-1].partition("go on with: ")[2])
    assert command[0] == "rsm-train"
    assert command[-1] == "--resume"
    before = steps(tmp_path / "s0")[-1]
    assert main([*command[1:], f"--total-steps={before + 40}", "--seeds=0,2"]) == 0
    output = capfd.readouterr()
    assert f"seed 0: resuming at step {before:,}" in output.err
    assert "go on with" not in output.err
    assert re.search(r"^mean +\d", output.out, re.M)
    assert [steps(tmp_path / f"s{seed}")[-1] for seed in (0, 2)] == [before + 40] * 2


def test_a_seed_that_stopped_is_not_in_the_mean(tmp_path):
    workers = []
    for seed, given in enumerate((None, None, 200)):
        directory = tiny_run(tmp_path / f"s{seed}", seed=seed)
        workers.append(Worker(seed, directory, (), given))
    alone = format_results(workers[:2], {0: 0, 1: 0})
    both = format_results(workers, {0: 0, 1: 0, 2: 0})
    assert re.search(r"^2 +stopped at step 160 +- +- +- +-$", both, re.M)
    assert alone.split()[-12:] == both.split()[-12:]
    assert unfinished(workers, {0: 0, 1: 0, 2: 0})
    assert not unfinished(workers[:2], {0: 0, 1: 0})


def test_a_worker_that_a_signal_ended_is_interrupted_and_not_failed(tmp_path):
    workers = [script(tmp_path, seed, "") for seed in range(4)]
    statuses = {0: 130, 1: -signal.SIGTERM, 2: None, 3: 1}
    rows = [line.split() for line in format_results(workers, statuses).splitlines()[2:]]
    assert [row[1] for row in rows] == ["interrupted", "interrupted", "not", "-"]
    assert interrupted(statuses)
    assert unfinished(workers, statuses)
    sentence = failures(workers, statuses)
    assert sentence is not None
    assert sentence.startswith("1 of 4 seeds failed: 3 (status 1")


def test_a_log_that_cannot_be_written_fails_its_seed(tmp_path):
    (tmp_path / "file").touch()
    said: list[str] = []
    workers = [script(tmp_path / "file", 0, "print(1)"), script(tmp_path, 1, "print(1)")]
    assert run_seeds(workers, 2, said.append) == {0: 2, 1: 0}
    assert [line for line in said if "Not a directory" in line or "File exists" in line]


def test_no_jobs_at_all_is_refused():
    with pytest.raises(ConfigError, match="--jobs"):
        plan({"env": ENV}, [1, 2], 0)


def script(tmp_path, seed, code):
    return Worker(seed, tmp_path / f"s{seed}", (sys.executable, "-uc", code))


HELD = f"""
import os, signal, sys, time
def held(name):
    for _ in range({100 * HANG_S}):
        if os.path.exists(name): return
        time.sleep(0.01)
    sys.exit("hung")
"""
"""`held(name)` goes on when the test has made the file."""

SAVES = """
def save(number, frame):
    print("saving"); held({go!r}); print("saved"); sys.exit(0)
signal.signal(signal.{name}, save)
print("running")
while True: time.sleep(0.01)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_reaches_every_worker_and_waits_for_them(tmp_path, name):
    go = tmp_path / "go"
    workers = [script(tmp_path, seed, HELD + SAVES.format(go=str(go), name=name)) for seed in range(3)]
    said: list[str] = []

    def say(line):
        said.append(line)
        if said.count("seed 0: saving") + said.count("seed 1: saving") == 2:
            go.touch()  # neither ends before the signal has reached both
        if said.count("seed 0: running") + said.count("seed 1: running") == 2 and "running" in line:
            os.kill(os.getpid(), getattr(signal, name))

    before = signal.getsignal(signal.SIGTERM)
    assert run_seeds(workers, 2, say) == {0: 0, 1: 0, 2: None}
    words = ("running", "saving", "saved")
    assert sorted(said) == sorted(f"seed {seed}: {word}" for seed in (0, 1) for word in words)
    assert (tmp_path / "s1.log").read_text() == "running\nsaving\nsaved\n"
    assert not (tmp_path / "s2.log").exists(), "no other is started"
    assert signal.getsignal(signal.SIGTERM) == before


def test_at_most_so_many_at_once(tmp_path):
    go = tmp_path / "go"
    # None ends before two run. The sleep gives a third, which must not be, the time to show itself.
    code = f"{HELD}print('in'); held({str(go)!r}); time.sleep(0.3); print('out')"
    running = most = 0
    counting = threading.Lock()

    def say(line):
        nonlocal running, most
        with counting:
            running += 1 if line.endswith("in") else -1
            most = max(most, running)
        if most == 2:
            go.touch()

    workers = [script(tmp_path, seed, code) for seed in range(4)]
    assert run_seeds(workers, 2, say) == {0: 0, 1: 0, 2: 0, 3: 0}
    assert most == 2
    assert failures(workers, dict.fromkeys(range(4), 0)) is None
