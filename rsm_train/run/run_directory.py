"""The run directory: who may write in it, what a killed process left there, and what a resume starts from."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rsm_common import atomic
from rsm_common.errors import CheckpointError, ConfigError
from rsm_common.locking import lock_file
from rsm_eval.env_ids import factory_name
from rsm_eval.learning import METRICS_FILE
from rsm_train.algorithms.common import AlgorithmConfig
from rsm_train.config import RunConfig, find_algorithm, resolve, run_directory
from rsm_train.run.checkpoint_files import (
    CHECKPOINTS_DIR,
    CONFIG_FILE,
    REPLAY_DIR,
    is_checkpoint,
    list_checkpoints,
)
from rsm_train.setting_types import Named, SettingsFile, checked, named_in, option_name

_LOCK_FILE = "lock"
_TEMPORARY_FILES = (f".{CONFIG_FILE}.*", f".{METRICS_FILE}.*", f"{REPLAY_DIR}/.*.safetensors.*")
_FREE_TO_CHANGE = (
    "total_steps",
    "eval_every",
    "eval_episodes",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "device",
    "threads",
    "vector",
    "wandb",
)
"""Settings that do not change what is learnt from a step; a resume may have other ones."""

_locks: set[int] = set()


def _forget_locks() -> None:
    """In a forked worker, which lives on for a moment when its parent is killed: the lock is the parent's."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_forget_locks)


def resume_command(run_dir: Path) -> str:
    """The command line that continues a run; the call in Python where only a program can."""
    made_by = _factory_of(run_dir)
    if made_by is not None:
        return _resume_call(run_dir, made_by)
    return f"rsm-train --resume --out {shlex.quote(str(run_dir))}"


def _resume_call(run_dir: Path, made_by: str) -> str:
    name = made_by.partition(":")[2]
    return f"rsm_train.train(env={name if name.isidentifier() else '...'}, out={str(run_dir)!r}, resume=True)"


def _factory_of(run_dir: Path) -> str | None:
    """The Python function that makes the environments of a run; None without one, or if that is not known."""
    try:
        return factory_name(json.loads((run_dir / CONFIG_FILE).read_bytes())["run"]["env"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_advice(number: int | None, run_dir: Path, *, begun: bool = True) -> str:
    """The remedy for a run directory that cannot be written to.

    Args:
        number: of the system's error.
        run_dir: the run directory.
        begun: whether config.json holds the settings of the present command, so that a resume needs no others.
    """
    if number in (errno.ENOSPC, errno.EDQUOT):
        remedy = "make room"
    elif number == errno.EFBIG:
        remedy = "raise the limit on file sizes (ulimit -f)"
    elif number in (errno.EACCES, errno.EPERM):
        remedy = f"make {str(run_dir)!r} and all that is in it writable for this user"
    elif number == errno.EROFS:
        remedy = f"make {str(run_dir)!r} writable, or copy it to a file system that is, for --out,"
    else:
        remedy = "check the disk"
    return f"{remedy} and " + (
        f"go on with: {resume_command(run_dir)}" if begun else "give the same command again"
    )


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run directory, so that only one process writes there.

    The kernel releases the lock when the process dies.

    Raises:
        ConfigError: another process writes there, or the lock file cannot be opened.
    """
    path = run_dir / _LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"cannot open {str(path)!r} for writing: {error.strerror}; "
            f"{write_advice(error.errno, run_dir, begun=False)}"
        ) from None
    _locks.add(descriptor)
    try:
        try:
            lock_file(descriptor, path)
        except BlockingIOError:
            raise ConfigError(
                f"another process is writing in the run directory {str(run_dir)!r}; wait for it, or choose "
                "another with --out"
            ) from None
        yield
    finally:
        _locks.discard(descriptor)
        os.close(descriptor)


def require_new(run_dir: Path) -> None:
    """Check that a new run may have the directory.

    Raises:
        ConfigError: it is something else, holds a run, or cannot be read.
    """
    try:
        taken = run_dir.exists() and not (run_dir.is_dir() and all(map(_is_ours, run_dir.iterdir())))
    except OSError as error:
        raise ConfigError(
            f"cannot read {str(run_dir)!r}: {error.strerror}; choose another with --out"
        ) from None
    if taken:
        if (run_dir / CONFIG_FILE).is_file():
            found = f"is not empty; go on with {resume_command(run_dir)}, or choose another with --out"
        else:
            found = f"is {'not empty' if run_dir.is_dir() else 'a file'}; choose another with --out"
        raise ConfigError(f"wanted a new run directory, got {str(run_dir)!r}, which {found}")


def make(run_dir: Path) -> None:
    """Create the directory.

    Raises:
        ConfigError: it cannot be created.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot create the run directory {str(run_dir)!r}: {error.strerror}; choose another with --out"
        ) from None


def remove_leftovers(run_dir: Path) -> None:
    """Delete what a killed process had not yet given its final name, or was about to delete."""
    for pattern in _TEMPORARY_FILES:
        for path in run_dir.glob(pattern):
            path.unlink()
    for path in run_dir.glob(f"{CHECKPOINTS_DIR}/.step_*"):
        shutil.rmtree(path)


def _is_ours(path: Path) -> bool:
    """Whether an entry of a run directory may be there before the run has begun."""
    return path.name == _LOCK_FILE or path.match(_TEMPORARY_FILES[0])


def run_settings(
    given: Mapping[str, Any],
    *,
    resume: bool,
    file: SettingsFile | None = None,
    named: Named = option_name,
) -> tuple[RunConfig, AlgorithmConfig, Path]:
    """The settings and the directory of a run, new or to be resumed.

    Raises what `resolve` and `resume_settings` do, which say what the arguments are.
    """
    if resume:
        return resume_settings(given, file=file, named=named)
    run, algorithm = resolve(given, file=file, named=named)
    return run, algorithm, run_directory(run)


def resume_settings(
    given: Mapping[str, Any], *, file: SettingsFile | None = None, named: Named = option_name
) -> tuple[RunConfig, AlgorithmConfig, Path]:
    """The settings and the directory of a run to resume, or to begin where there is none yet.

    Args:
        given: field names to values; None means not given.
        file: the settings of a file.
        named: how errors name a given setting.

    Raises:
        ConfigError: there is no run, it cannot be read, or a setting is given that would make it another run.
        CheckpointError: the run's configuration cannot be read.
    """
    own = {name: value for name, value in given.items() if value is not None}
    said = named_in(file, own, named)
    chosen = checked({**({} if file is None else file.settings), **own}, RunConfig, said)
    if chosen.get("out") is not None:
        run_dir = Path(chosen["out"])
    else:
        run_dir = run_directory(resolve(own, file=file, named=named)[0])
    try:
        begun, checkpoint = (run_dir / CONFIG_FILE).is_file(), is_checkpoint(run_dir)
    except OSError as error:
        raise ConfigError(
            f"cannot read {str(run_dir)!r}: {error.strerror}; make it readable for this user, or correct --out"
        ) from None
    if checkpoint:  # its config.json would pass for that of a run
        of_run = run_dir.absolute().parent
        inside = of_run.name == CHECKPOINTS_DIR
        remedy = f"give its run: {resume_command(of_run.parent)}" if inside else "correct --out"
        raise ConfigError(f"wanted a run to resume in {str(run_dir)!r}, got a checkpoint; {remedy}")
    if not begun:
        if "env" not in chosen:
            raise ConfigError(
                f"wanted a run to resume in {str(run_dir)!r}, got no {CONFIG_FILE} there; correct --out, or "
                "give --env to begin a run"
            )
        return *resolve(own, file=file, named=named), run_dir
    run, algorithm = _read_config(run_dir / CONFIG_FILE)
    _require_factory(run.env, chosen.get("env"), run_dir)
    chosen = checked(chosen, type(algorithm), said)
    stored = dataclasses.asdict(algorithm) | dataclasses.asdict(run)
    for name, value in chosen.items():
        if name not in (*_FREE_TO_CHANGE, "out") and (name not in stored or stored[name] != value):
            option, wanted = named(name), stored.get(name, "(no such setting)")
            place = f" in {file.path!r}" if file is not None and name not in own else ""
            raise ConfigError(
                f"wanted {option} {wanted} as the run in {str(run_dir)!r} has it, got {value}{place}; leave "
                f"{option} out to resume, or begin a run in another directory"
            )
    changes = {name: chosen[name] for name in _FREE_TO_CHANGE if name in chosen}
    return dataclasses.replace(run, out=str(run_dir), **changes), algorithm, run_dir


def _require_factory(env: str, given: str | None, run_dir: Path) -> None:
    """Check that a run whose environments a Python function makes is resumed with this function.

    Raises:
        ConfigError: it is not.
    """
    made_by = factory_name(env)
    if made_by is not None and given != env:
        got = "none" if given is None else factory_name(given) or given
        raise ConfigError(
            f"wanted the Python function {made_by}, which makes the environments of the run in "
            f"{str(run_dir)!r}, got {got}; go on in a program with {_resume_call(run_dir, made_by)}"
        )


def stored_settings(run_dir: Path) -> dict[str, Any]:
    """Every setting of a run by its name, as its configuration has it.

    Raises:
        CheckpointError: the configuration cannot be read.
    """
    path = run_dir / CONFIG_FILE
    with _config_errors(path):
        config = json.loads(path.read_bytes())
        return {**config["run"], **config["algorithm"]}


def _read_config(path: Path) -> tuple[RunConfig, AlgorithmConfig]:
    with _config_errors(path):
        return _parse_config(path)


@contextlib.contextmanager
def _config_errors(path: Path) -> Iterator[None]:
    """Make one sentence of an error in reading the configuration of a run."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot read the configuration of a run from {path}: {error.strerror}; make it readable for this "
            "user"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot read the configuration of a run from {path} ({error}); it is damaged or of another "
            f"version, {_config_advice(path)}"
        ) from None


def _config_advice(path: Path) -> str:
    """The remedy for the configuration of a run that cannot be used: that of a checkpoint, if it can be."""
    for checkpoint in reversed(list_checkpoints(path.parent)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            _parse_config(checkpoint / CONFIG_FILE)
            return (
                f"restore it with: {shlex.join(['cp', str(checkpoint / CONFIG_FILE), str(path)])}, and give "
                "--total-steps again if the run has other ones"
            )
    return (
        "restore it from a copy, use the version that wrote it, or begin a run in another directory with --out"
    )


def _parse_config(path: Path) -> tuple[RunConfig, AlgorithmConfig]:
    config = json.loads(path.read_bytes())
    run, algorithm = RunConfig(**config["run"]), dict(config["algorithm"])
    if "critic_layer_norm" in algorithm:  # of a version before critic_norm
        algorithm["critic_norm"] = "layer" if algorithm.pop("critic_layer_norm") else "none"
    return run, find_algorithm(run.algo).Config(**algorithm)


def require_no_lost_checkpoint(run_dir: Path, run: RunConfig) -> None:
    """Check that a run without checkpoints was ended before its first one.

    Raises:
        CheckpointError: its metrics go beyond the first checkpoint, so that the checkpoints were deleted.
    """
    path = run_dir / METRICS_FILE
    steps = map(_step, path.read_bytes().splitlines(keepends=True)) if path.is_file() else iter(())
    reached = max((step for step in steps if step != float("inf")), default=0)
    if reached > min(run.checkpoint_every, run.eval_every, run.total_steps) + run.num_envs:
        raise CheckpointError(
            f"wanted a checkpoint in {str(run_dir / CHECKPOINTS_DIR)!r}, got none although the run reached "
            f"step {reached:,}; restore that directory from a copy, or begin a run in another one with --out"
        )


def trim_metrics(run_dir: Path, step: int, *, without_evaluation: bool = False) -> None:
    """Drop the lines that were written after a step, and the half of a line that a killed process wrote.

    Args:
        run_dir: the run directory.
        step: of the checkpoint.
        without_evaluation: drop the evaluation of the step itself too, which is to be repeated.
    """
    path = run_dir / METRICS_FILE
    if path.is_file():
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _step(line) <= step]
        if without_evaluation:
            kept = [line for line in kept if _step(line) < step or json.loads(line).get("kind") != "eval"]
        atomic.write_file(path, b"".join(kept))


def sync_metrics(run_dir: Path) -> None:
    """Have the metrics on the disk before the checkpoint that follows them."""
    atomic.sync_path(run_dir / METRICS_FILE)


def _step(line: bytes) -> float:
    """The step of a complete line of metrics, infinity for anything else."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
