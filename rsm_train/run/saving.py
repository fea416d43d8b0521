"""The checkpoints of a run as it goes on: written, evaluated, deleted when they are no longer kept."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from torch import Tensor

from rsm_common.errors import DamagedCheckpointError, TrainingError
from rsm_common.manifest import FileRecord
from rsm_train.run.checkpoint import Checkpoint, damaged_training, record_evaluation, save_checkpoint
from rsm_train.run.checkpoint_files import (
    REPLAY_DIR,
    checkpoint_path,
    list_checkpoints,
    prune_checkpoints,
    read_state,
)
from rsm_train.run.replay import ReplayBuffer, load_segments, needed_records, remove_segments, write_segments
from rsm_train.run.run_directory import sync_metrics, write_advice


class RunCheckpoints:
    """The checkpoints in a run directory, and the transitions beside them that resuming needs."""

    def __init__(self, run_dir: Path, keep: int, replay: ReplayBuffer) -> None:
        """Begin with none; `keep`: how many of the newest stay, beside the best."""
        self._run_dir = run_dir
        self._keep = keep
        self._replay = replay
        self._replay_records: dict[str, FileRecord] = {}
        self.saved_step = 0
        """Of the newest checkpoint."""

    def save(self, checkpoint: Checkpoint, counters: Mapping[str, Any], training: Mapping[str, Tensor]) -> None:
        """Write a checkpoint that the run can be resumed from, and delete what is no longer needed.

        Args:
            checkpoint: the policy.
            counters: what resuming needs beside tensors.
            training: the tensors that resuming needs.

        Raises:
            TrainingError: it cannot be written.
        """
        step = checkpoint.state["step"]
        state = {"added": self._replay.added, **counters}
        with disk_errors(self._run_dir, f"the checkpoint of step {step}"):
            sync_metrics(self._run_dir)
            write_segments(self._run_dir / REPLAY_DIR, self._replay, self._replay_records)
            save_checkpoint(
                self._run_dir,
                dataclasses.replace(
                    checkpoint,
                    state={**checkpoint.state, "training": state},
                    training=training,
                    replay_records=needed_records(self._replay_records, self._replay.oldest),
                ),
            )
        self.saved_step = step
        self._prune()

    def record(self, step: int, returns: list[float], seed: int) -> None:
        """Add the returns of an evaluation to the checkpoint of a step; they decide which one is the best.

        Raises:
            TrainingError: they cannot be written.
        """
        evaluation = {
            "mean": float(np.mean(returns)),
            "std": float(np.std(returns)),
            "episodes": len(returns),
            "seed": seed,
        }
        with disk_errors(self._run_dir, f"the evaluation of step {step}"):
            sync_metrics(self._run_dir)
            record_evaluation(checkpoint_path(self._run_dir, step), evaluation)
        self._prune()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint: fill the replay buffer with its transitions.

        Raises:
            CheckpointError: its counters are damaged, or its transitions are missing or damaged.
        """
        self.saved_step = int(checkpoint.state["step"])
        try:
            added = int(checkpoint.state["training"]["added"])
        except (KeyError, ValueError, TypeError) as error:
            raise damaged_training(checkpoint.path, error) from None
        self._replay_records = dict(checkpoint.replay_records)
        load_segments(self._run_dir / REPLAY_DIR, self._replay, added, self._replay_records)

    def _prune(self) -> None:
        """First the checkpoints that are no longer kept, then the transitions that no kept one needs."""
        prune_checkpoints(self._run_dir, self._keep)
        try:
            oldest = read_state(list_checkpoints(self._run_dir)[-self._keep :][0])
        except DamagedCheckpointError:
            return  # its transitions are kept: a later save deletes them
        if "training" in oldest:
            needed = oldest["training"]["added"] - self._replay.capacity
            for name in remove_segments(self._run_dir / REPLAY_DIR, before=needed):
                self._replay_records.pop(name, None)


def evaluation_due(state: Mapping[str, Any]) -> bool:
    """True if the evaluation of a checkpoint, given by its state, was due and did not end."""
    return bool(state["training"].get("evaluation_due")) and state.get("evaluation") is None


@contextlib.contextmanager
def disk_errors(
    run_dir: Path, what: str, numbers: Collection[int] = (), *, begun: bool = True
) -> Iterator[None]:
    """Make one sentence of an error in writing.

    Args:
        run_dir: the run directory.
        what: is written.
        numbers: of the errors that have this cause; empty for all.
        begun: see `write_advice`.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if numbers and getattr(error, "errno", None) not in numbers:
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise TrainingError(
            f"cannot write {what} to {str(run_dir)!r}: {reason}; earlier checkpoints are intact, "
            f"{write_advice(getattr(error, 'errno', None), run_dir, begun=begun)}"
        ) from None
