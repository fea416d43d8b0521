"""The beginning of a run: in a new directory, or from the newest sound checkpoint of an old one."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from rsm_common import atomic
from rsm_common.commandline import require_extra
from rsm_common.errors import CheckpointError
from rsm_eval.envs import Factory
from rsm_train.algorithms.common import AlgorithmConfig
from rsm_train.config import RunConfig
from rsm_train.progress import Callback
from rsm_train.run.checkpoint import Checkpoint, is_sound, load_training
from rsm_train.run.checkpoint_files import CONFIG_FILE, REPLAY_DIR, list_checkpoints, set_aside
from rsm_train.run.loop import Trainer
from rsm_train.run.machine import own_torch_settings
from rsm_train.run.metrics import RunLog, Tolerant, extra_sinks
from rsm_train.run.replay import remove_segments
from rsm_train.run.run_directory import (
    lock,
    make,
    remove_leftovers,
    require_new,
    require_no_lost_checkpoint,
    trim_metrics,
)
from rsm_train.run.saving import disk_errors, evaluation_due
from rsm_train.run.stopping import StopRequest

logger = logging.getLogger(__name__)

_WARNING = "warning: "
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Caller:
    """What the program that starts a run gives it beside its settings."""

    factory: Factory | None = None
    """Makes the environments, where the id of the run only stands for it."""
    callback: Callback | None = None
    """Is told of every event, and may stop the run."""
    quiet: bool = False
    """Print nothing: what would be printed goes to the log, warnings as such."""

    def say(self, sentence: str) -> None:
        """Print a sentence on stderr, or log it."""
        if not self.quiet:
            print(sentence, file=Tolerant(sys.stderr))
        elif sentence.startswith(_WARNING):
            logger.warning(sentence.removeprefix(_WARNING))
        else:
            logger.info(sentence)


COMMAND_LINE = Caller()
"""rsm-train: environments have ids, and everything is printed."""


def train(
    run: RunConfig,
    algorithm_config: AlgorithmConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    caller: Caller = COMMAND_LINE,
) -> Path:
    """Train and return the run directory.

    SIGINT, SIGTERM and SIGHUP, in the main thread, end the run after its present step and a checkpoint. What
    the run sets in torch for itself is as before at its end.

    Args:
        run: settings of the loop.
        algorithm_config: settings of the algorithm.
        run_dir: where everything is written.
        resume: go on from the newest sound checkpoint in the directory, or from the start where there is none;
            the settings are those of `rsm_train.run.run_directory.resume_settings`.
        caller: what makes the environments, and what is told of events.

    Raises:
        ConfigError: the run directory holds another run already or another process writes there, the device
            or a compiler is not available, or the replay buffer does not fit into memory.
        UnsupportedEnvError: the environment is unknown or not Box-to-Box.
        CheckpointError: no checkpoint can be resumed from, or the checkpoints were deleted.
        TrainingError: the run cannot go on; its last checkpoint is intact.
        RunStopped: a signal or the callback ended it; its message has the command to resume.
        MissingExtraError: wandb is asked for and not installed.
    """
    if run.wandb is not None:
        require_extra("rsm-train --wandb", "wandb", ["wandb"])
    with own_torch_settings(run.threads), StopRequest() as stop, contextlib.ExitStack() as stack:
        continuing = resume and (run_dir / CONFIG_FILE).is_file()
        if continuing:
            stack.enter_context(lock(run_dir))
        else:
            require_new(run_dir)
        start = _start(run, algorithm_config, run_dir, caller)
        if start is None:
            return run_dir
        trainer, checkpoint = start.trainer, start.checkpoint
        stack.callback(trainer.close)
        if not continuing:
            make(run_dir)
            stack.enter_context(lock(run_dir))
            require_new(run_dir)
        before = {"wall_s": 0.0, "cpu_s": 0.0} if checkpoint is None else checkpoint.state["training"]
        # First, as wandb may refuse: the directory is then still empty, and can be used again.
        sinks = extra_sinks(run.wandb, run_dir, trainer.config())
        with disk_errors(run_dir, "the run", _DISK, begun=False):
            _set_aside(start, caller)
            prepare(trainer, caller)
        with (
            disk_errors(run_dir, "the run", _DISK),
            RunLog(
                run_dir,
                run.total_steps,
                sinks,
                console=Console(quiet=True, file=io.StringIO()) if caller.quiet else None,
                first_step=trainer.learner.step,
                wall_s=float(before["wall_s"]),
                cpu_s=before.get("cpu_s"),
                warmup_steps=run.warmup_steps,
            ) as log,
        ):
            trainer.train(log, stop, caller.callback)
    return run_dir


@dataclass(frozen=True)
class _Start:
    """Where a run starts from."""

    trainer: Trainer
    checkpoint: Checkpoint | None
    """None at step 0."""
    damaged: Sequence[tuple[Path, str]] = ()
    """Newer checkpoints that cannot be resumed, newest first, and why."""


def _start(run: RunConfig, algorithm_config: AlgorithmConfig, run_dir: Path, caller: Caller) -> _Start | None:
    """Make the trainer, at the newest checkpoint that is sound if there is one; None if the run is finished.

    Raises:
        CheckpointError: there are checkpoints and none can be resumed; or they were deleted.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(list_checkpoints(run_dir)):
        try:
            checkpoint = load_training(path)
            if checkpoint.state["step"] >= run.total_steps and not evaluation_due(checkpoint.state):
                caller.say(
                    f"the run is finished at step {checkpoint.state['step']:,}; raise --total-steps to go on"
                )
                return None
            trainer = _restored(run, algorithm_config, run_dir, checkpoint, caller.factory)
            return _Start(trainer, checkpoint, damaged)
        except CheckpointError as error:
            damaged.append((path, str(error)))
    if damaged:
        raise _none_sound(damaged)
    if (run_dir / CONFIG_FILE).is_file():
        require_no_lost_checkpoint(run_dir, run)
        caller.say(f"{_WARNING}the run in {str(run_dir)!r} has no checkpoint, so it begins again at step 0")
    return _Start(Trainer(run, algorithm_config, run_dir, factory=caller.factory), None)


def _restored(
    run: RunConfig,
    algorithm_config: AlgorithmConfig,
    run_dir: Path,
    checkpoint: Checkpoint,
    factory: Factory | None,
) -> Trainer:
    trainer = Trainer(run, algorithm_config, run_dir, checkpoint, factory=factory)
    try:
        trainer.restore(checkpoint)
    except BaseException:
        trainer.close()
        raise
    return trainer


def _none_sound(damaged: Sequence[tuple[Path, str]]) -> CheckpointError:
    policy = next((path for path, _ in damaged if is_sound(path)), None)
    remedy = "restore the run directory from a copy" if policy is None else f"use the policy in {policy}"
    return CheckpointError(
        f"{damaged[0][1]}; no checkpoint of the run can be resumed, {remedy}, or begin a run in another "
        "directory with --out"
    )


def _set_aside(start: _Start, caller: Caller) -> None:
    """Rename the damaged checkpoints that are newer than the one resumed from, with a warning for each."""
    for path, reason in start.damaged:
        assert start.checkpoint is not None
        kept = set_aside(path)
        caller.say(
            f"{_WARNING}{reason}; the run goes on from the older checkpoint {start.checkpoint.path}, and the "
            f"damaged one is kept as {kept}"
        )


def prepare(trainer: Trainer, caller: Caller = COMMAND_LINE) -> None:
    """Leave in the run directory what belongs to the present step, and nothing else."""
    run_dir = trainer.run_dir
    remove_leftovers(run_dir)
    remove_segments(run_dir / REPLAY_DIR, beyond=trainer.learner.replay.added)
    trim_metrics(run_dir, trainer.learner.step, without_evaluation=trainer.evaluation_due)
    content = json.dumps(trainer.config(), indent=2) + "\n"
    atomic.write_file(run_dir / CONFIG_FILE, content.encode())
    if trainer.learner.step:
        caller.say(f"resuming at step {trainer.learner.step:,}")
    if trainer.env_warning is not None:
        caller.say(trainer.env_warning)
    if trainer.learner.envs.restarted:
        names = ", ".join(map(str, trainer.learner.envs.restarted))
        caller.say(
            f"{_WARNING}the open episodes of environments {names} could not be restored and begin anew, so the "
            "run is not bit for bit the one without an interruption"
        )
    if trainer.changed:
        caller.say(
            f"{_WARNING}the run goes on with {trainer.changed}, so it is not bit for bit the one without an "
            "interruption"
        )
