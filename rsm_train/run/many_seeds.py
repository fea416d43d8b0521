"""Several seeds at once: one process per seed, each the command line of a lone run.

A worker shares nothing with the others but the machine, so a seed's result is that of a lone run with the
same number of threads, bit for bit, and a seed that fails takes no other with it.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rsm_common.commandline import EXIT_INTERRUPTED, EXIT_USER_ERROR, aligned, format_assignments
from rsm_common.errors import ConfigError
from rsm_eval.envs import make_env
from rsm_eval.statistics import mean_interval
from rsm_train.config import resolve, run_directory
from rsm_train.run.checkpoint_files import list_checkpoints, read_state
from rsm_train.run.machine import pick_device
from rsm_train.run.results import EvalPoint, RunResult, read_result
from rsm_train.run.run_directory import resume_settings
from rsm_train.run.stopping import SIGNALS
from rsm_train.setting_types import SettingsFile

SEED_FIELD = "{seed}"
_INTERRUPTED = (EXIT_INTERRUPTED, *(-number for number in SIGNALS))
"""Statuses of a worker that a signal ended before it could save: while it started, or the second one."""
_FAILED = "-"


@dataclass(frozen=True)
class Worker:
    """One seed: the run it is, and the command that does it."""

    seed: int
    run_dir: Path
    command: tuple[str, ...]
    total_steps: int | None = None
    """As given on the command line or in a file; None for what the run has by itself."""

    @property
    def log(self) -> Path:
        """What the worker prints is kept here, beside the run directory."""
        return self.run_dir.with_name(self.run_dir.name + ".log")


@dataclass(frozen=True)
class Plan:
    """All workers, and how many of them run at once."""

    workers: tuple[Worker, ...]
    jobs: int
    settings: Mapping[str, Any]
    """Of the first seed; the others differ in seed and directory."""
    origins: Mapping[str, str]
    """Of the settings that no one gave: by name, where they come from."""


def plan(
    given: Mapping[str, Any],
    seeds: Sequence[int],
    jobs: int | None,
    *,
    resume: bool = False,
    file: SettingsFile | None = None,
) -> Plan:
    """Check the settings and make one command line per seed.

    Args:
        given: the settings of the command line; None means not given.
        seeds: one run each.
        jobs: processes at once; None for as many as there are cores for their threads, or for all on a GPU.
        resume: go on with the runs that there are, and begin the others.
        file: the settings of --config, whose seed does not count.

    Raises:
        ConfigError: --seed beside --seeds, an --out that all would share, or settings that `resolve` refuses.
        UnsupportedEnvError: the environment is unknown or not Box-to-Box.
    """
    if given.get("seed") is not None:
        raise ConfigError("wanted --seed or --seeds, got both; leave one of them out")
    settings = dict(given)
    if file is not None and settings.get("out") is None:
        settings["out"] = file.settings.get("out")
    out = settings.get("out")
    if out is not None and SEED_FIELD not in out:
        raise ConfigError(
            f"wanted {SEED_FIELD} in --out, since every seed needs a directory of its own, got {out!r}; "
            f"write for example {out}-s{SEED_FIELD}"
        )
    if jobs is not None and jobs < 1:
        raise ConfigError(f"wanted --jobs of at least 1, got {jobs}")
    run, _ = resolve(settings | {"seed": seeds[0]}, file=file)
    # What is wrong for every seed is said once, and not by every worker.
    on_cpu = pick_device(run.device).type == "cpu"
    make_env(run.env, run.env_arg).close()
    if jobs is None:
        jobs = max(1, _cores() // (run.threads or 1)) if on_cpu else len(seeds)
    jobs = min(jobs, len(seeds))
    origins = {"seed": "--seeds"}
    if run.threads is None:
        # torch's own default is all cores for each.
        settings["threads"] = 1 if on_cpu else max(1, _cores() // jobs)
        origins["threads"] = "--seeds"
    settings_by_seed = {seed: _own_settings(settings, seed) for seed in seeds}
    workers = tuple(_worker(own, seed, resume, file) for seed, own in settings_by_seed.items())
    return Plan(workers, jobs, settings_by_seed[seeds[0]], origins)


def resume_command(
    given: Mapping[str, Any], seeds: str, jobs: int | None, file: SettingsFile | None = None
) -> str:
    """The command line that goes on with all seeds of a command.

    Args:
        given: the settings of the command line; None means not given.
        seeds: what --seeds was.
        jobs: what --jobs was.
        file: the settings of --config.
    """
    many = [*_config(file), f"--seeds={seeds}", *([] if jobs is None else [f"--jobs={jobs}"])]
    return shlex.join(["rsm-train", *_arguments(given), *many, "--resume"])


def run_seeds(workers: Sequence[Worker], jobs: int, say: Callable[[str], None]) -> dict[int, int | None]:
    """Run all workers, at most `jobs` at once, and return the exit status of each seed; None: not started.

    SIGINT and SIGTERM go to every worker, and no other is started; the call ends when all have ended.

    Args:
        workers: what to run.
        jobs: how many at once.
        say: takes every line that a worker prints, with its seed before it.
    """
    processes = _Processes()
    with _signals_to(processes), ThreadPoolExecutor(jobs) as pool:
        futures = {worker.seed: pool.submit(processes.run, worker, say) for worker in workers}
        wait(futures.values())
    return {seed: future.result() for seed, future in futures.items()}


def format_results(workers: Sequence[Worker], statuses: Mapping[int, int | None]) -> str:
    """The final and the best evaluation of each seed; means and 95 % intervals of those that are done."""
    rows = [["seed", "final", "N = 1", "best", "N = 1", "at step"]]
    results: dict[int, RunResult | None] = {}
    for worker in workers:
        missing = _missing(worker, statuses[worker.seed])
        # Of a seed that failed, the directory may hold another run.
        results[worker.seed] = read_result(worker.run_dir) if missing is None else None
        rows.append(_row(str(worker.seed), results[worker.seed], missing))
    known = [result for result in results.values() if result is not None]
    if len(known) > 1:
        columns: list[list[float | None]] = [
            [result.final.mean for result in known],
            [result.final.one_particle_mean for result in known],
            [result.best.mean for result in known],
            [result.best.one_particle_mean for result in known],
        ]
        summaries = [mean_interval([value for value in column if value is not None]) for column in columns]
        rows.append(["mean", *(f"{s.mean:,.1f}" if s else "-" for s in summaries), ""])
        rows.append(["95 %", *(f"{s.low:,.1f} to {s.high:,.1f}" if s else "-" for s in summaries), ""])
    return aligned(rows)


def unfinished(workers: Sequence[Worker], statuses: Mapping[int, int | None]) -> bool:
    """Whether there are seeds that did not fail and are not done, since somebody stopped them."""
    return any(_missing(worker, statuses[worker.seed]) not in (None, _FAILED) for worker in workers)


def interrupted(statuses: Mapping[int, int | None]) -> bool:
    """Whether some seed ended at once at a signal, without saving."""
    return any(status in _INTERRUPTED for status in statuses.values())


def failures(workers: Sequence[Worker], statuses: Mapping[int, int | None]) -> str | None:
    """One sentence about the seeds that failed, and where to read on; None if none did."""
    failed = [worker for worker in workers if statuses[worker.seed] not in (0, None, *_INTERRUPTED)]
    if not failed:
        return None
    names = ", ".join(f"{worker.seed} (status {statuses[worker.seed]}, log {worker.log})" for worker in failed)
    return f"{len(failed)} of {len(workers)} seeds failed: {names}; read there why and train these again"


class _Processes:
    """The workers that are running; a signal reaches all of them."""

    def __init__(self) -> None:
        self.stopped = False
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()

    def run(self, worker: Worker, say: Callable[[str], None]) -> int | None:
        if self.stopped:
            return None
        try:
            worker.log.parent.mkdir(parents=True, exist_ok=True)
            log = worker.log.open("a", encoding="utf-8")
        except OSError as error:
            say(f"seed {worker.seed}: cannot write {str(worker.log)!r}: {error.strerror}; choose another --out")
            return EXIT_USER_ERROR
        with log:
            process = self._start(worker.command)
            if process is None:
                return None
            assert process.stdout is not None, "stdout is a pipe"
            for line in process.stdout:
                log.write(line)
                log.flush()
                say(f"seed {worker.seed}: {line.rstrip()}")
            status = process.wait()
        with self._lock:
            self._running.discard(process)
        return status

    def signal(self, number: int) -> None:
        self.stopped = True
        with self._lock:
            for process in self._running:
                process.send_signal(number)

    def _start(self, command: Sequence[str]) -> subprocess.Popen[str] | None:
        with self._lock:
            if self.stopped:
                return None
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                # Its own session: the terminal's Ctrl-C comes to us alone, and from us once to each worker.
                start_new_session=True,
            )
            self._running.add(process)
            return process


@contextmanager
def _signals_to(processes: _Processes) -> Iterator[None]:
    def forward(number: int, frame: FrameType | None) -> None:
        processes.signal(number)

    # Where SIGHUP is ignored (nohup), it stays so.
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _own_settings(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    own = dict(settings) | {"seed": seed}
    if own.get("out") is not None:
        own["out"] = own["out"].replace(SEED_FIELD, str(seed))
    return own


def _worker(settings: Mapping[str, Any], seed: int, resume: bool, file: SettingsFile | None) -> Worker:
    run, _ = resolve(settings, file=file)
    arguments = [*_config(file), *_arguments(settings), *(["--resume"] if resume else [])]
    command = (sys.executable, "-m", "rsm_train.cli", *arguments)
    named = {**({} if file is None else file.settings), **_given(settings)}
    return Worker(seed, run_directory(run), command, named.get("total_steps"))


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _config(file: SettingsFile | None) -> list[str]:
    return [] if file is None else [f"--config={file.path}"]


def _arguments(settings: Mapping[str, Any]) -> list[str]:
    """The command line that means these settings."""
    arguments: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, Mapping):
            arguments.extend(f"--{flag}={text}" for text in format_assignments(value))
        elif value is not None:
            arguments.append(f"--{flag}={value}")
    return arguments


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _missing(worker: Worker, status: int | None) -> str | None:
    """Why a seed has no result, in two words; None if its run reached the last step."""
    if status is None:
        return "not started"
    if status in _INTERRUPTED:
        return "interrupted"
    if status != 0:
        return _FAILED
    checkpoints = list_checkpoints(worker.run_dir)
    step = int(read_state(checkpoints[-1])["step"]) if checkpoints else 0
    run, _, _ = resume_settings({"out": str(worker.run_dir), "total_steps": worker.total_steps})
    return None if step >= run.total_steps else f"stopped at step {step:,}"


def _row(seed: str, result: RunResult | None, missing: str | None) -> list[str]:
    if result is None:
        return [seed, missing or _FAILED, *["-"] * 4]
    final, best = result.final, result.best
    return [seed, _mean(final), _one(final), _mean(best), _one(best), f"{best.step:,}"]


def _mean(point: EvalPoint) -> str:
    return f"{point.mean:,.1f} ± {point.std:,.1f}"


def _one(point: EvalPoint) -> str:
    return "-" if point.one_particle_mean is None else f"{point.one_particle_mean:,.1f}"
