"""No run is lost: stopped, killed or out of disk at any moment, it goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rsm_common.errors import CheckpointError, ConfigError, TrainingError
from rsm_train.algorithms.dpmd import DPMD
from rsm_train.cli import main
from rsm_train.config import resolve
from rsm_train.run.checkpoint import load_torch_policy
from rsm_train.run.checkpoint_files import find_checkpoint, list_checkpoints
from rsm_train.run.learner import Learner
from rsm_train.run.loop import Trainer
from rsm_train.run.replay import ReplayBuffer, list_segments, load_segments
from rsm_train.run.run_directory import lock, resume_command, resume_settings, trim_metrics
from rsm_train.run.start import Caller, prepare, train
from rsm_train.run.stopping import RunStopped
from tests.hang import HANG_S
from tests.rsm_train.critic_kinds import ALL_AT_ONCE
from tests.rsm_train.launcher import ROOT, Launcher
from tests.rsm_train.runs import TINY, tiny_run
from tests.rsm_train.training_envs import MODULE, FailingEnv

# Checkpoints between evaluations, logs between checkpoints, a ring that wraps around.
SETTINGS: dict[str, Any] = {
    **TINY,
    "env": "Hopper-v5",
    "total_steps": 240,
    "eval_every": 120,
    "eval_episodes": 1,
    "checkpoint_every": 30,
    "log_every": 8,
    "replay_size": 100,
    "keep_checkpoints": 2,
}
TIMES = {"wall_s", "cpu_s", "steps_per_s", "updates_per_s"}


def options(settings: dict[str, Any]) -> list[str]:
    return [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]


def records(run: Path) -> list[list[tuple[str, Any]]]:
    """The lines of the metrics, in order and with the order of their keys, without times."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [[item for item in json.loads(line).items() if item[0] not in TIMES] for line in lines]


def states(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    assert state["training"].pop("wall_s") > 0
    assert state["training"].pop("cpu_s") > 0
    return state


def ring(run: Path, checkpoint: Path) -> ReplayBuffer:
    added = states(checkpoint)["training"]["added"]
    replay = ReplayBuffer(SETTINGS["replay_size"], 11, 3)
    load_segments(run / "replay", replay, added, {})
    return replay


def assert_same_run(run: Path, other: Path) -> None:
    """Networks, moments, generators, open episodes, transitions, counters and metrics, bit for bit."""
    first, second = list_checkpoints(run)[-1], list_checkpoints(other)[-1]
    assert first.name == second.name
    for file in ("networks.safetensors", "training.safetensors", "probe.safetensors"):
        a, b = load_file(first / file), load_file(second / file)
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert torch.equal(a[name], b[name]), f"{file}: {name}"
    assert states(first) == states(second)
    a_ring, b_ring = ring(run, first), ring(other, second)
    assert a_ring.added == b_ring.added > a_ring.capacity
    for name, value in vars(a_ring._data).items():
        assert torch.equal(value, getattr(b_ring._data, name)), name
    assert records(run) == records(other)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "uninterrupted", **SETTINGS)


@pytest.fixture(scope="module")
def launcher():
    with Launcher() as started:
        yield started


@pytest.fixture
def stop_at(monkeypatch):
    """A function that has signals sent to this process after given steps."""

    def install(*steps: int, number: int = signal.SIGTERM) -> None:
        original, left = Learner.collect, list(steps)

        def collect(self: Learner) -> None:
            original(self)
            if left and self.step >= left[0]:
                left.pop(0)
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Learner, "collect", collect)

    return install


def resume(run: Path, **given: Any) -> Path:
    run_config, algorithm, run_dir = resume_settings({"out": str(run), **given})
    return train(run_config, algorithm, run_dir, resume=True)


def stopped(start: Any) -> str:
    with pytest.raises(RunStopped) as caught:
        start()
    return str(caught.value)


def assert_stops_change_nothing(settings: dict[str, Any], tmp_path: Path, stop_at: Any) -> Path:
    """Compare a run that is stopped three times with one that is not; returns the stopped one."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(*resolve(settings), whole)
    stop_at(54, 133, 198)
    stopped(lambda: train(*resolve(settings), run))
    for _ in range(2):
        stopped(lambda: resume(run))
    resume(run)
    assert_same_run(run, whole)
    return run


# What a resumed run is


@pytest.mark.parametrize("vector", ["sync", "async"])
def test_a_resumed_run_is_the_uninterrupted_run(uninterrupted, tmp_path, stop_at, vector):
    run = tmp_path / "run"
    stop_at(54, 116, 120, 198)  # in the warm-up, before an evaluation, in it, and later
    message = stopped(lambda: tiny_run(run, **SETTINGS, vector=vector))
    assert message == f"SIGTERM: stopped and saved at step 54; go on with: {resume_command(run)}"
    episodes = load_file(list_checkpoints(run)[-1] / "training.safetensors")
    assert any(len(episodes[f"envs.actions.{index}"]) for index in (0, 1)), "stopped inside an episode"
    for step in (116, 120, 198):
        assert f"at step {step};" in stopped(lambda: resume(run))
    resume(run)
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize(
    ("algo", "preset"), [("sac", "quick"), ("sdac", "quick"), ("dpmd", "reference"), ("dpmd", "kl")]
)
def test_every_algorithm_is_resumed(tmp_path, stop_at, algo, preset):
    changes = {"algo": algo, "preset": preset, "depth": 2, "compile": "off", "threads": 1}
    if algo == "dpmd":
        changes |= {"diffusion_steps": 4, "target_particles": 2}
    if preset == "kl":
        changes |= {"policy_samples": 8, "old_policy_every": 25}
    settings = {key: value for key, value in SETTINGS.items() if key != "particles"} | changes
    assert_stops_change_nothing(settings, tmp_path, stop_at)


COMPOSED: dict[str, dict[str, Any]] = {
    "all at once": {
        **ALL_AT_ONCE,
        "normalize_reward": True,
        "normalize_observation": True,
        "noise_hold": 6,
        "critic_lr_final": 1e-5,
        "critic_lr_decay_updates": 60,
    },
    "layer": {"critic_norm": "layer", "normalize_observation": True, "normalize_reward": True},
    "batch": {"critic_norm": "batch", "critic_input_norm": True, "noise_hold": 3},
}


@pytest.mark.parametrize("algo", ["dpmd", "sdac", "sac"])
@pytest.mark.parametrize("kind", COMPOSED)
def test_critics_of_every_kind_are_resumed(tmp_path, stop_at, algo, kind):
    """With the unit of rewards, held noise and statistics, whose values depend on all steps before."""
    settings = {key: value for key, value in SETTINGS.items() if key != "particles" or algo != "sac"}
    settings |= {"algo": algo, "preset": "quick", "depth": 2, **COMPOSED[kind]}
    run = assert_stops_change_nothing(settings, tmp_path, stop_at)
    newest = load_file(list_checkpoints(run)[-1] / "training.safetensors")
    assert ("held.left" in newest) is ("noise_hold" in COMPOSED[kind])
    assert ("returns.returns" in newest) is ("normalize_reward" in COMPOSED[kind])


def test_composed_critics_that_were_killed_are_resumed(tmp_path, launcher):
    """Killed between two checkpoints, the run repeats the steps since the last one."""
    run, whole, error = tmp_path / "run", tmp_path / "whole", tmp_path / "stderr"
    flags = [f"--{key.replace('_', '-')}" for key, value in COMPOSED["all at once"].items() if value is True]
    given = {key: value for key, value in COMPOSED["all at once"].items() if value is not True}
    begin = [*options({**SETTINGS, **given, "log_every": 2}), *flags]
    for step in (110, 170):
        pid = launcher.start([*begin, "--out", str(run), "--resume"], error, hold=(step, tmp_path / "never"))
        wait_for(run, step - 2, pid)  # the step that it holds at is not logged yet
        os.kill(pid, signal.SIGKILL)
        assert launcher.wait() == -signal.SIGKILL, error.read_text()
    for out in (run, whole):
        launcher.start([*begin, "--out", str(out), "--resume"], error)
        assert launcher.wait() == 0, error.read_text()
    assert_same_run(run, whole)


def test_wall_time_goes_on_and_the_past_of_tensorboard_is_purged(uninterrupted, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    tiny_run(run, **SETTINGS)
    # As after a crash: lines and transitions of a future that the newest checkpoint does not know.
    shutil.rmtree(list_checkpoints(run)[-1])
    list_segments(run / "replay")[-1].path.write_bytes(b"stale")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 500, "kind": "train"}\n{"step": 4, "ki')
    assert list_checkpoints(run)[-1].name == "step_000000210"
    resume(run)
    assert_same_run(run, uninterrupted)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("wall_s", "cpu_s"):
        times = [line[name] for line in lines]
        assert times == sorted(times)
    board = accumulator.EventAccumulator(str(run / "tensorboard"), purge_orphaned_data=True).Reload()
    steps = [event.step for event in board.Scalars("train/critic_loss")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 240


@pytest.mark.parametrize("tail", ['{"step": 2, "kind": "train"}', '{"step": 2', "", "null\n", '{"step": 3}\n'])
def test_lines_of_the_future_and_half_lines_are_dropped(tmp_path, tail):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n' + tail)
    trim_metrics(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_finished_run_says_so_and_goes_on_when_it_may(uninterrupted, tmp_path, capsys):
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    before = records(run)
    assert main(["--resume", "--out", str(run)]) == 0
    assert "finished at step 240; raise --total-steps" in capsys.readouterr().err
    assert main(["--resume", "--out", str(run), "--total-steps", "300", "--eval-episodes", "2"]) == 0
    assert records(run)[: len(before)] == before
    assert list_checkpoints(run)[-1].name == "step_000000300"
    settings = json.loads((run / "config.json").read_text())["run"]
    assert (settings["total_steps"], settings["eval_episodes"]) == (300, 2)


def test_only_what_the_kept_checkpoints_need_is_kept(uninterrupted):
    names = [path.name for path in list_checkpoints(uninterrupted)]
    assert names[-2:] == ["step_000000210", "step_000000240"]
    assert set(names[:-2]) <= {"step_000000120"}, "at most the best one besides"
    segments = list_segments(uninterrupted / "replay")
    assert [(segment.first, segment.end) for segment in segments] == [
        (first, first + 30) for first in range(90, 240, 30)
    ], "the 100 transitions before step 210, and what followed"
    ring(uninterrupted, list_checkpoints(uninterrupted)[-2])


def test_an_environment_that_cannot_be_restored_begins_anew_and_says_so(tmp_path, stop_at, capsys):
    stop_at(110)
    changes = {"env": f"{MODULE}:RsmForgetful-v0", "eval_every": 160, "log_every": 1}
    stopped(lambda: tiny_run(tmp_path / "run", **changes))
    resume(tmp_path / "run")
    error = capsys.readouterr().err
    assert "warning: the open episodes of environments 0, 1 could not be restored and begin anew" in error
    assert records(tmp_path / "run")[-1][0] == ("step", 160)


def test_what_changes_the_arithmetic_of_a_resumed_run_is_said(tmp_path, stop_at, capsys):
    run, threads = tmp_path / "run", torch.get_num_threads()
    stop_at(54, 70)
    try:
        # Two threads wait for each other where another test uses the second core: few updates are theirs.
        stopped(lambda: tiny_run(run, **{**SETTINGS, "threads": 1, "total_steps": 102, "eval_every": 102}))
        stopped(lambda: resume(run))
        assert "warning" not in capsys.readouterr().err
        resume(run, threads=2)
    finally:
        torch.set_num_threads(threads)
    error = capsys.readouterr().err
    assert "warning: the run goes on with threads 2 instead of 1, so it is not bit for bit" in error
    effective = json.loads((list_checkpoints(run)[-1] / "config.json").read_text())["effective"]
    assert effective == {
        "threads": 2,
        "compiled": effective["compiled"],
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }
    assert isinstance(effective["compiled"], bool)


# Kills


def newest(run: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    checkpoints = list_checkpoints(run)
    return int(states(checkpoints[-1])["step"]) if checkpoints else 0


def logged(run: Path) -> int:
    """The last step in the metrics, which may end in half a line."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def wait_for(run: Path, step: int, pid: int) -> None:
    """Return once the metrics have the step; a process that ends before is an error."""
    deadline = time.monotonic() + HANG_S
    while logged(run) < step:
        os.kill(pid, 0)
        assert time.monotonic() < deadline, "hung"
        time.sleep(0.005)


def test_killed_at_twenty_random_moments(tmp_path, launcher):
    """Ten moments in time, ten between two operations on files, where a half-done save would be."""
    settings = {**SETTINGS, "total_steps": 100_000, "eval_every": 200, "log_every": 2, "checkpoint_every": 10}
    run, whole, error = tmp_path / "run", tmp_path / "whole", tmp_path / "stderr"
    choose = random.Random(int.from_bytes(os.urandom(4), "big"))
    begin = [*options(settings), "--out", str(run), "--resume"]  # begins, then goes on: the same command
    steps = [0]
    for life in range(20):
        pid = launcher.start(begin, error, choose.randrange(1, 90) if life % 2 else None)
        if life % 2 == 0:
            # Beyond what the life before may have logged, so that this one has saved, and at any moment then.
            wait_for(run, steps[-1] + choose.randrange(14, 24), pid)
            time.sleep(choose.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)
        assert launcher.wait() == -signal.SIGKILL, error.read_text()
        steps.append(newest(run))
        assert logged(run) - steps[-1] <= settings["checkpoint_every"] + settings["num_envs"]
        for path in list_checkpoints(run):
            load_torch_policy(path)  # whatever is there can be used as it is
    assert steps == sorted(steps), "a run never loses a checkpoint"
    assert len(set(steps)) > 10, "each of the ten saved once at least"
    end = ["--total-steps", str(steps[-1] + 100)]
    launcher.start(["--resume", "--out", str(run), *end], error)
    assert launcher.wait() == 0, error.read_text()
    assert not list(run.rglob(".*")), "what a killed process left is cleared away"
    launcher.start([*options(settings), "--out", str(whole), *end], error)
    assert launcher.wait() == 0, error.read_text()
    assert_same_run(run, whole)


def test_killed_at_every_step_of_a_save(tmp_path, launcher):
    """One save and its pruning, killed before each of its operations on files in turn."""
    settings = {**SETTINGS, "env": "InvertedPendulum-v5", "total_steps": 110, "checkpoint_every": 10}
    error = tmp_path / "stderr"
    begin = tmp_path / "begin"
    launcher.start([*options({**settings, "total_steps": 100}), "--out", str(begin)], error)
    assert launcher.wait() == 0
    seen = set()
    for at in range(1, 200, 4):
        run = shutil.copytree(begin, tmp_path / f"run{at}")
        launcher.start(["--resume", "--out", str(run), "--total-steps", "110"], error, at)
        status = launcher.wait()
        seen.add((newest(run), status))
        for path in list_checkpoints(run):
            load_torch_policy(path)
        assert newest(run) in (100, 110)
        if status == 0:
            break
        launcher.start(["--resume", "--out", str(run), "--total-steps", "110"], error)
        assert launcher.wait() == 0, error.read_text()
        assert newest(run) == 110
    assert (110, 0) in seen
    assert (100, -signal.SIGKILL) in seen


def test_a_run_killed_before_its_first_checkpoint_begins_again(uninterrupted, tmp_path, launcher):
    run, error = tmp_path / "run", tmp_path / "stderr"
    for at in range(1, 40):
        launcher.start([*options(SETTINGS), "--out", str(run)], error, at)
        assert launcher.wait() in (2, -signal.SIGKILL)
        if (run / "config.json").is_file():
            break
    assert list_checkpoints(run) == []
    (run / "metrics.jsonl").write_text('{"step": 2, "kind": "train"}\n')
    launcher.start([*options(SETTINGS), "--out", str(run)], error)
    assert launcher.wait() == 2, "not a new run"
    assert resume_command(run) in error.read_text()
    resume(run)
    assert_same_run(run, uninterrupted)


# Signals


@pytest.mark.parametrize(
    ("number", "vector"),
    [(signal.SIGINT, "async"), (signal.SIGTERM, "async"), (signal.SIGHUP, "async"), (signal.SIGTERM, "sync")],
)
def test_a_signal_to_all_of_its_processes_saves_and_exits_0(uninterrupted, tmp_path, launcher, number, vector):
    run, error = tmp_path / "a run", tmp_path / "stderr"
    go = tmp_path / "go"
    pid = launcher.start([*options({**SETTINGS, "vector": vector}), "--out", str(run)], error, hold=(30, go))
    wait_for(run, 24, pid)
    os.killpg(pid, number)
    go.touch()  # and until here it stayed at step 30
    assert launcher.wait() == 0, error.read_text()
    command = re.search(r"go on with: rsm-train (.*)$", error.read_text(), re.MULTILINE)
    assert command
    assert "Traceback" not in error.read_text()
    assert newest(run) >= logged(run) >= 20
    launcher.start(shlex.split(command[1]), error)
    assert launcher.wait() == 0, error.read_text()
    assert_same_run(run, uninterrupted)


def test_processes_of_environments_do_not_outlive_a_killed_run(tmp_path, launcher):
    run = tmp_path / "run"
    settings = {**SETTINGS, "vector": "async"}
    hold = (30, tmp_path / "never")
    pid = launcher.start([*options(settings), "--out", str(run)], tmp_path / "stderr", hold=hold)
    wait_for(run, 24, pid)
    os.kill(pid, signal.SIGKILL)
    assert launcher.wait() == -signal.SIGKILL

    def find_them(limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            os.killpg(pid, 0)

    with lock(run), pytest.raises(ProcessLookupError):
        find_them(HANG_S)


def test_the_command_itself(tmp_path):
    """The one test that starts Python anew: nothing of what the launcher prepares is needed."""
    run = tmp_path / "run"
    code = "from rsm_train.cli import main; raise SystemExit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options({**SETTINGS, "total_steps": 100_000}), "--out", str(run)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    while logged(run) < 10:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, error
    assert f"go on with: {resume_command(run)}" in error
    assert newest(run) >= 10


def test_a_run_goes_on_without_anybody_to_read_what_it_prints(tmp_path):
    """`rsm-train ... 2>&1 | head -1`"""
    run = tmp_path / "run"
    code = "from rsm_train.cli import main; raise SystemExit(main())"
    changes = {**SETTINGS, "env": "InvertedPendulum-v5", "eval_every": 40}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options(changes), "--out", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert process.stdout is not None
    assert "step        40  evaluation" in next(line for line in process.stdout if "evaluation" in line)
    process.stdout.close()
    assert newest(run) >= 40, "saved before it was printed"
    assert process.wait(timeout=HANG_S) == 0
    assert newest(run) == 240
    assert records(run)[-1][:2] == [("step", 240), ("kind", "eval")]


def test_the_second_signal_does_not_wait(tmp_path, monkeypatch):
    def stuck(self: Learner) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Learner, "learn", stuck)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "run", **{**SETTINGS, "vector": "async"})
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_before_the_first_step(tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:

        def prepare_and_stop(trainer: Trainer, caller: Caller) -> None:
            prepare(trainer, caller)
            os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr("rsm_train.run.start.prepare", prepare_and_stop)
        message = stopped(lambda: tiny_run(run, total_steps=100))
    assert message == f"SIGTERM: stopped before the first step; begin again with: {resume_command(run)}"
    assert newest(run) == 0
    resume(run)
    assert newest(run) == 100


def test_a_lost_terminal_sends_its_signal_twice(tmp_path, monkeypatch):
    def hang_up(self: Learner) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(Learner, "learn", hang_up)
    before = signal.getsignal(signal.SIGHUP)
    message = stopped(lambda: tiny_run(tmp_path / "run", **SETTINGS))
    assert message.startswith("SIGHUP: stopped and saved at step 2;")
    assert signal.getsignal(signal.SIGHUP) is before


def test_nohup_is_respected(tmp_path, stop_at):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_at(10, 20, number=signal.SIGHUP)
        tiny_run(tmp_path / "run", **SETTINGS)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert newest(tmp_path / "run") == 240


def test_handlers_come_back_and_threads_have_none(tmp_path, stop_at):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop_at(10, number=signal.SIGINT)
    stopped(lambda: tiny_run(tmp_path / "run", **SETTINGS))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    resume(tmp_path / "run")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    thread = threading.Thread(target=tiny_run, args=(tmp_path / "thread",), kwargs={"total_steps": 100})
    thread.start()
    thread.join()
    assert newest(tmp_path / "thread") == 100


# Refusals


def test_two_processes_do_not_write_one_run(uninterrupted, tmp_path, capsys):
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    with lock(run):
        assert main(["--resume", "--out", str(run), "--total-steps", "300"]) == 2
        assert "another process is writing" in capsys.readouterr().err
        new = tmp_path / "new"
        new.mkdir()
        with lock(new), pytest.raises(ConfigError, match="another process is writing"):
            tiny_run(new)
        # A forked child lives on when its parent is killed, and must not hold the lock.
        reads, writes = os.pipe()
        holds, held = os.pipe()
        if (child := os.fork()) == 0:
            os.write(writes, b"forked")
            os.close(held)
            os.read(holds, 1)  # until its parent kills it, or has ended
            os._exit(0)
        os.read(reads, 6)
    try:
        with lock(run):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for end in (reads, writes, holds, held):
            os.close(end)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--seed", "3"], "wanted --seed 0 as the run in .* has it, got 3; leave --seed out"),
        (["--env", "Ant-v5"], "wanted --env Hopper-v5"),
        (["--width", "32"], "wanted --width 16"),
        (["--num-envs", "4"], "wanted --num-envs 2"),
        (["--preset", "paper"], "wanted --preset quick"),
        (["--total-steps", "20"], "warmup_steps"),
    ],
)
def test_what_would_make_it_another_run_is_refused(uninterrupted, capsys, given, words):
    assert main(["--resume", "--out", str(uninterrupted), *given]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error)
    assert error.count("\n") == 1


def test_what_has_the_runs_own_value_is_not_refused(uninterrupted, capsys):
    own = ["--seed", "0", "--env", "Hopper-v5", "--width", "16"]
    assert main(["--resume", "--out", str(uninterrupted), *own]) == 0
    assert "finished" in capsys.readouterr().err


def test_the_default_directory_is_found_again(uninterrupted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(uninterrupted, Path("runs/Hopper-v5-dpmd-quick-s0"))
    assert main(["--resume", "--env", "Hopper-v5", "--preset", "quick"]) == 0
    assert "finished" in capsys.readouterr().err


def test_where_there_is_no_run(tmp_path, capsys):
    assert main(["--resume", "--out", str(tmp_path / "nothing")]) == 2
    assert "wanted a run to resume" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    assert main(["--resume", "--out", str(tmp_path / "other"), *options(SETTINGS)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "training.safetensors").unlink(), "policy but not the state of its training"),
        (lambda path: (path / "training.safetensors").write_bytes(b"x"), r"training\.safetensors is truncated"),
        (lambda path: shutil.rmtree(path.parents[1] / "replay"), "wanted transitions up to 240"),
        (lambda path: (path.parents[1] / "config.json").write_text("{}"), "configuration"),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_is_refused_but_remains_a_policy(
    uninterrupted, tmp_path, damage, words
):
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    for older in list_checkpoints(run)[:-1]:  # which would be taken instead
        shutil.rmtree(older)
    damage(list_checkpoints(run)[-1])
    with pytest.raises(CheckpointError, match=words):
        resume(run, total_steps=300)
    load_torch_policy(list_checkpoints(run)[-1])


@pytest.mark.parametrize("name", ["generator.acting", "envs.episode", "envs.obs", "envs.actions.1"])
def test_training_state_of_another_shape_is_refused(uninterrupted, tmp_path, name):
    from safetensors.torch import save_file

    run = shutil.copytree(uninterrupted, tmp_path / "run")
    path = list_checkpoints(run)[-1] / "training.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)
    for checkpoint in list_checkpoints(run):
        (checkpoint / "sha256.json").unlink()
    for older in list_checkpoints(run)[:-1]:
        shutil.rmtree(older)
    with pytest.raises(CheckpointError, match=f"damaged .*{name}"):
        resume(run, total_steps=300)


# Accidents


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_is_intact(uninterrupted, tmp_path, launcher):
    """A real one: a file system of 400 kB where we may mount it, a limit on file sizes elsewhere."""
    run, error = tmp_path / "mount" / "run", tmp_path / "stderr"
    run.parent.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(run.parent)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a small file system here")
    try:
        launcher.start([*options({**SETTINGS, "keep_checkpoints": 9}), "--out", str(run)], error)
        assert launcher.wait() == 2, error.read_text()
        message = error.read_text().splitlines()[-1]
        assert re.search("cannot write .*: .*No space left on device", message), message
        assert "earlier checkpoints are intact" in message
        assert "Traceback" not in error.read_text()
        load_torch_policy(run)
        assert 0 < newest(run) < 240
        saved = shutil.copytree(run, tmp_path / "run")
    finally:
        subprocess.run(["umount", str(run.parent)], check=True)
    resume(saved, keep_checkpoints=2)
    assert_same_run(saved, uninterrupted)


def test_a_limit_on_file_sizes_is_one_sentence(tmp_path, monkeypatch):
    original = Trainer.save
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def save(self: Trainer, *arguments: Any) -> None:
        limit = 10_000 if self.learner.step >= 60 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            original(self, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    monkeypatch.setattr(Trainer, "save", save)
    try:
        with pytest.raises(TrainingError, match="cannot write the checkpoint of step 60 .*File too large"):
            tiny_run(tmp_path / "run", **SETTINGS)
    finally:
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000000030"]
    load_torch_policy(tmp_path / "run")


@pytest.mark.parametrize("where", ["network", "moment", "metric"])
def test_nan_never_reaches_a_checkpoint(tmp_path, monkeypatch, where):
    original = DPMD.update

    def poisoned(self: DPMD, batch: Any, noise: Any) -> Any:
        metrics = original(self, batch, noise)
        if self.agent.updates == 25:
            if where == "network":
                next(iter(self.agent.policy.values())).data.view(-1)[0] = float("nan")
            elif where == "moment":
                moments = [name for name in self.agent.state() if "critic" in name and "exp_avg_sq" in name]
                self.agent.state()[moments[0]].view(-1)[0] = float("inf")
            else:
                metrics["critic_loss"] = metrics["critic_loss"] * float("nan")
        return metrics

    monkeypatch.setattr(DPMD, "update", poisoned)
    with pytest.raises(TrainingError, match=r"holds NaN or Inf at step 126; .* are intact"):
        tiny_run(tmp_path / "run", **{**SETTINGS, "checkpoint_every": 21, "log_every": 10_000})
    assert newest(tmp_path / "run") == 120
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert newest(tmp_path / "run") == 240


@pytest.mark.parametrize(("how", "vector"), [("raise", "sync"), ("raise", "async"), ("die", "async")])
def test_a_crashing_environment_ends_the_run_with_its_checkpoint_intact(
    tmp_path, monkeypatch, how, vector, capfd
):
    monkeypatch.setenv("RSM_FAIL", how)
    monkeypatch.setattr(FailingEnv, "steps", 0)
    changes = {**SETTINGS, "env": f"{MODULE}:RsmFailing-v0", "checkpoint_every": 10, "vector": vector}
    run = tmp_path / "run"
    assert main([*options(changes), "--out", str(run)]) == 2
    error = capfd.readouterr().err
    words = "ValueError: the motor" if how == "raise" else r"exit status -9"
    assert re.search(words, error)
    assert "Traceback" not in error
    assert f"then go on with: rsm-train --resume --out {run}" in error
    assert newest(run) in (30, 60)
    monkeypatch.delenv("RSM_FAIL")
    assert main(["--resume", "--out", str(run)]) == 0
    assert newest(run) == 240


def test_what_old_checkpoints_lack(tmp_path, uninterrupted):
    """Checkpoints from before there was a training state are policies as they ever were."""
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    for path in list_checkpoints(run):
        (path / "training.safetensors").unlink(missing_ok=True)
        (path / "sha256.json").unlink()
        state = json.loads((path / "state.json").read_text())
        del state["training"]
        (path / "state.json").write_text(json.dumps(state))
    shutil.rmtree(run / "replay")
    load_torch_policy(find_checkpoint(run))
    with pytest.raises(CheckpointError, match="policy but not the state"):
        resume(run, total_steps=300)


def test_a_new_run_takes_all_settings_from_its_options(tmp_path):
    """--resume where there is nothing yet begins: one command for a scheduler to repeat."""
    run, algorithm, run_dir = resume_settings({**SETTINGS, "out": str(tmp_path / "run")})
    assert (run, algorithm) == resolve({**SETTINGS, "out": str(tmp_path / "run")})
    assert run_dir == tmp_path / "run"
