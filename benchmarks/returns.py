"""Train DPMD, SDAC and SAC for a given time, and compare their episode returns.

    python benchmarks/returns.py --env HalfCheetah-v5 --env Ant-v4 --algo dpmd --algo sdac --algo sac \
        --preset reference --preset paper --seeds 0-2 --minutes 100 \
        --out benchmarks/results/returns.json --table FILE --picture docs/images/returns.png

A run is an environment, an algorithm, a preset, a number of updates per step and a seed; `rsm-train` trains it
in a directory of its own below --runs. The run with the fewest steps is trained next, to the next multiple of
--slice-steps, so that all curves reach similar steps. After --minutes the runs stop and save, and the report of
all runs below --runs is written. The same command continues from there. A run takes at most a minute to stop,
because it first finishes an evaluation that has begun.

Without --updates-per-step each preset has its own, and SAC is trained at 0.2 and at 1: the published comparison
was made at 0.2, while SAC is made for 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

from record import write_record
from returns_report import Variant, draw, read_runs, report, slices_file, steps_of, table

from rsm_common.commandline import parse_seeds
from rsm_common.errors import ConfigError, RsmError
from rsm_eval.learning import CONFIG_FILE

TRAINER: tuple[str, ...] = (sys.executable, "-m", "rsm_train.cli")
SAC_RATES = (0.2, 1.0)
REFERENCE_RATE = 0.2
STOP_S = 300.0
"""How long a run may take to stop before it is killed, which costs what it learnt since its last checkpoint."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """Of its directory."""
        v = self.variant
        return f"{v.env}-{v.algo}-{v.preset}-u{v.updates_per_step:g}-s{self.seed}".replace(":", "_").replace(
            "/", "_"
        )


# --- planning: pure ---------------------------------------------------------------------------------------


def plan(
    envs: Sequence[str],
    algos: Sequence[str],
    presets: Sequence[str],
    rates: Sequence[float] | None,
    seeds: Sequence[int],
) -> tuple[list[Run], list[str]]:
    """All runs in the order in which equals take turns, and a sentence about each combination left out.

    All first seeds come before all second seeds, so that a short budget compares algorithms rather
    than seeds.
    """
    kinds: list[tuple[str, str, float]] = []
    skipped: list[str] = []
    for algo, preset in product(algos, presets):
        for rate in default_rates(algo, preset) if rates is None else rates:
            reason = why_not(algo, preset, rate)
            if reason is None:
                kinds.append((algo, preset, rate))
            else:
                skipped.append(f"skipped {algo.upper()} {preset} at {rate:g} updates per step: {reason}")
    runs = [Run(Variant(env, *kind), seed) for seed, env, kind in product(seeds, envs, kinds)]
    return runs, list(dict.fromkeys(skipped))


def default_rates(algo: str, preset: str) -> tuple[float, ...]:
    """Default updates per step of an algorithm and preset."""
    from rsm_train.algorithms.registry import ALGORITHMS
    from rsm_train.config import RunConfig, preset_settings

    if algo == "sac" and preset == "paper":
        return SAC_RATES
    if preset not in ALGORITHMS[algo].presets:  # left out by `why_not`
        return (RunConfig.updates_per_step,)
    return (float(preset_settings(preset, algo).get("updates_per_step", RunConfig.updates_per_step)),)


def why_not(algo: str, preset: str, rate: float) -> str | None:
    """The reason why a combination is left out; None if it is trained."""
    from rsm_train.algorithms.registry import ALGORITHMS

    if preset not in ALGORITHMS[algo].presets:
        return f"{preset} is no preset of this algorithm"
    if preset == "reference" and rate != REFERENCE_RATE:
        return f"{preset} is the published program, which makes {REFERENCE_RATE}"
    return None


def next_run(steps: Mapping[Run, int], total_steps: int, excluded: Collection[Run] = ()) -> Run | None:
    """The unfinished run with the fewest steps; among equals the first of the plan."""
    waiting = [run for run, step in steps.items() if step < total_steps and run not in excluded]
    return min(waiting, key=steps.__getitem__, default=None)


def slice_end(step: int, slice_steps: int, total_steps: int, warmup_steps: int) -> int:
    """The step to train to: the next multiple of `slice_steps` after the warm-up."""
    first = max(step + 1, warmup_steps)
    return min(total_steps, -(-first // slice_steps) * slice_steps)


def arguments(run: Run, directory: Path, to_step: int, settings: Mapping[str, Any]) -> list[str]:
    """The options of rsm-train that start or resume the run."""
    variant = run.variant
    given = {
        "env": variant.env,
        "algo": variant.algo,
        "preset": variant.preset,
        "updates_per_step": f"{variant.updates_per_step:g}",
        "seed": run.seed,
        "total_steps": to_step,
        "out": directory,
        **settings,
    }
    options = ["--resume"] if (directory / CONFIG_FILE).is_file() else []
    for name, value in given.items():
        flag = name.replace("_", "-")
        options.append(
            f"--{flag}={value}" if not isinstance(value, bool) else f"--{flag}" if value else f"--no-{flag}"
        )
    return options


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Settings of rsm-train from NAME=VALUE.

    Raises:
        ConfigError: something else, or a setting that names the run.
    """
    settings: dict[str, Any] = {"threads": 1}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not (equals and name):
            raise ConfigError(f"wanted --set NAME=VALUE such as width=64, got {text!r}")
        if name in {*Variant.__dataclass_fields__, "seed", "total_steps", "out"}:
            raise ConfigError(f"{name} names the run and cannot be a --set; use the option of this script")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


# --- processes --------------------------------------------------------------------------------------------


class Trainer:
    """Trains the runs slice by slice, several at once if wanted; every slice is one command line."""

    def __init__(
        self, runs: Sequence[Run], root: Path, warmup_steps: Mapping[Run, int], settings: Mapping[str, Any]
    ) -> None:
        self.failed: set[Run] = set()
        self._root, self._warmup_steps, self._settings = root, warmup_steps, settings
        self._steps = {run: steps_of(root / run.name) for run in runs}
        self._lock = threading.Lock()
        self._busy: dict[Run, subprocess.Popen[bytes] | None] = {}
        self._stopped = False

    def train(self, total_steps: int, slice_steps: int, jobs: int, budget_s: float | None) -> None:
        """Train until everything is finished, the budget is used up, or a signal comes."""
        with self._stop_on_signals(), ThreadPoolExecutor(jobs) as pool:
            workers = [pool.submit(self._work, total_steps, slice_steps) for _ in range(jobs)]
            wait(workers, timeout=budget_s)
            self.stop()
            if wait(workers, timeout=STOP_S).not_done:
                self._signal(signal.SIGKILL)
        for worker in workers:
            worker.result()

    def stop(self) -> None:
        """Start no further slice; ask running ones once to save and end (twice would kill them)."""
        with self._lock:
            first, self._stopped = not self._stopped, True
        if first:
            self._signal(signal.SIGTERM)

    def _work(self, total_steps: int, slice_steps: int) -> None:
        while True:
            with self._lock:
                run = next_run(self._steps, total_steps, {*self._busy, *self.failed})
                if run is None or self._stopped:
                    return
                self._busy[run] = None
            end = slice_end(self._steps[run], slice_steps, total_steps, self._warmup_steps[run])
            try:
                self._train_slice(run, end)
            finally:
                with self._lock:
                    del self._busy[run]

    def _train_slice(self, run: Run, end: int) -> None:
        directory = self._root / run.name
        command = [*TRAINER, *arguments(run, directory, end, self._settings)]
        before, started, load = self._steps[run], time.monotonic(), os.getloadavg()[0]
        _say(f"{run.name}: {before:,} to {end:,}")
        log = self._root / f"{run.name}.log"
        with log.open("ab") as output:
            status = self._call(run, command, output)
        if status is None:
            return
        seconds = time.monotonic() - started
        step = self._steps[run] = steps_of(directory)
        note = {
            "command": _portable(command),
            "from_step": before,
            "to_step": step,
            "seconds": round(seconds, 1),
        }
        note |= {"exit_status": status, "load_average_before": round(load, 2), "machine": _machine()}
        _append(slices_file(directory), note)
        if step >= end or self._stopped:
            _say(f"{run.name}: at {step:,} after {seconds:,.0f} s")
        else:
            self.failed.add(run)
            last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
            _say(
                f"{run.name}: ended at {step:,} with status {status}, left out from here on; {log} ends: {last}"
            )

    def _call(self, run: Run, command: Sequence[str], output: Any) -> int | None:
        with self._lock:
            if self._stopped:
                return None
            # A session of its own: Ctrl-C comes to us alone, and from us once to each run.
            process = self._busy[run] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        return process.wait()

    def _signal(self, number: int) -> None:
        with self._lock:
            for process in self._busy.values():
                if process is not None:
                    process.send_signal(number)

    @contextlib.contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            # In a thread: the main one may hold the lock at this moment.
            threading.Thread(target=self.stop).start()

        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _machine() -> dict[str, Any]:
    import torch

    from rsm_common.provenance import machine_facts

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**machine_facts(), **({"gpu": gpu} if gpu else {})}


def _portable(command: Sequence[str]) -> str:
    return shlex.join(["rsm-train", *command[len(TRAINER) :]])


def _append(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


# --- command line -----------------------------------------------------------------------------------------


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    from rsm_train.algorithms.registry import ALGORITHMS
    from rsm_train.config import PRESETS

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    several: dict[str, Any] = {"action": "append"}
    parser.add_argument("--env", **several, help="environment id; several times for several")
    parser.add_argument("--algo", **several, choices=list(ALGORITHMS), help="several times for several")
    parser.add_argument("--preset", **several, choices=list(PRESETS), help="several times for several")
    parser.add_argument("--updates-per-step", **several, type=float, help="for all; default see above")
    parser.add_argument("--seeds", default="0", help="such as 0-2")
    parser.add_argument("--total-steps", type=int, default=1_000_000)
    parser.add_argument("--slice-steps", type=int, default=25_000, help="steps between changes of the run")
    parser.add_argument("--minutes", type=float, help="budget of this call; default none")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument(
        "--set", **several, default=[], metavar="NAME=VALUE", help="setting for every rsm-train"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/returns"), help="where the run directories are")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--table", type=Path, help="Markdown file")
    parser.add_argument("--picture", type=Path, help="PNG file")
    return parser.parse_args(argv)


def train(options: argparse.Namespace) -> bool:
    """Train the runs that the options name; returns True if none failed.

    Raises:
        ConfigError: settings that rsm-train would refuse.
        UnsupportedEnvError: no environment can be made.
    """
    for name in ("total_steps", "slice_steps", "jobs"):
        if getattr(options, name) < 1:
            raise ConfigError(f"wanted --{name.replace('_', '-')} of at least 1, got {getattr(options, name)}")
    settings = parse_settings(options.set)
    envs, problems = usable_envs(options.env or ["HalfCheetah-v5", "Ant-v4"])
    runs, skipped = plan(
        envs,
        options.algo or ["dpmd", "sdac", "sac"],
        options.preset or ["reference", "paper"],
        options.updates_per_step,
        parse_seeds(options.seeds),
    )
    for sentence in (*problems, *skipped):
        _say(sentence)
    warmup_steps = {run: _checked_warmup(run, options, settings) for run in runs}
    options.runs.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(runs, options.runs, warmup_steps, settings)
    budget_s = None if options.minutes is None else 60 * options.minutes
    trainer.train(options.total_steps, options.slice_steps, options.jobs, budget_s)
    return not trainer.failed and not problems


def usable_envs(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The environments that can be made here, and a sentence about each one that cannot."""
    from rsm_eval.envs import make_env

    usable, problems = [], []
    for name in names:
        try:
            make_env(name).close()
        # What fails here is a simulator of any kind, and the other environments may do.
        except Exception as error:
            problems.append(
                f"left out {name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            )
        else:
            usable.append(name)
    return usable, problems


def _checked_warmup(run: Run, options: argparse.Namespace, settings: Mapping[str, Any]) -> int:
    from rsm_train.config import resolve

    own = {**asdict(run.variant), "seed": run.seed, "total_steps": options.total_steps}
    try:
        config, _ = resolve({**own, **settings})
    except TypeError as error:
        raise ConfigError(f"a --set has a value of a wrong type: {error}") from None
    if options.slice_steps % config.eval_every:
        raise ConfigError(
            f"wanted --slice-steps that are a multiple of eval_every, {config.eval_every}, got "
            f"{options.slice_steps}; a slice ends with an evaluation, which would be one more"
        )
    return config.warmup_steps


def write_report(options: argparse.Namespace) -> None:
    """Read every run below --runs, print the table and write the requested files."""
    content = report(read_runs(options.runs), options.total_steps)
    text = table(content)
    print(text, end="")
    for path in (options.out, options.table, options.picture):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if options.table is not None:
        options.table.write_text(text, encoding="utf-8")
    if options.picture is not None:
        draw(content, options.picture)
    if options.out is not None:
        write_record(content, options.out, show=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Train until the budget is used, then write the report; the exit status is 0 if no run failed."""
    options = _options(argv)
    try:
        fine = options.report_only or train(options)
        write_report(options)
    except RsmError as error:
        _say(f"returns.py: {error}")
        return 2
    return 0 if fine else 1


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
