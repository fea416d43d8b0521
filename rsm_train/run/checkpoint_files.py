"""The files of checkpoints: where they are, which one a path means, and whether they are intact.

sha256.json lists the size and the sha256 of the files of a checkpoint, and of the replay files that it needs.
Each file is read once, and the bytes that were compared with it are the bytes that are used. Checkpoints from
before there was a sha256.json are read with a warning.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from rsm_common import atomic
from rsm_common.errors import CheckpointError, DamagedCheckpointError
from rsm_common.manifest import FileRecord, check_record, file_record, read_records, records_json

CONFIG_FILE = "config.json"
CHECKPOINTS_DIR = "checkpoints"
REPLAY_DIR = "replay"
NETWORKS_FILE = "networks.safetensors"
SPEC_FILE = "policy.json"
STATE_FILE = "state.json"
EVALUATION_FILE = "evaluation.json"
PROBE_FILE = "probe.safetensors"
TRAINING_FILE = "training.safetensors"
HASHES_FILE = "sha256.json"

_NAME = re.compile(r"step_(\d{9,})")
_DAMAGED = "damaged_"

logger = logging.getLogger(__name__)


class CheckpointFiles:
    """Reads the files of one checkpoint and compares them with its sha256.json."""

    def __init__(self, path: Path) -> None:
        """Read sha256.json.

        Raises:
            DamagedCheckpointError: it is damaged.
        """
        self.path = path
        try:
            self._records = read_records(path / HASHES_FILE)
        except (OSError, ValueError) as error:
            raise self._damaged(_reason(error)) from None

    @property
    def replay_records(self) -> dict[str, FileRecord]:
        """The records of the replay files that the checkpoint needs, by file name."""
        prefix = f"{REPLAY_DIR}/"
        records = self._records or {}
        return {key.removeprefix(prefix): value for key, value in records.items() if key.startswith(prefix)}

    def warn_if_unverified(self) -> None:
        """Log a warning, once for each checkpoint, if there is no sha256.json."""
        if self._records is None:
            _warn_unverified(self.path)

    def read(self, name: str) -> bytes:
        """Read a file.

        Raises:
            DamagedCheckpointError: it cannot be read, or it is not the file that was written.
        """
        try:
            content = (self.path / name).read_bytes()
            if self._records is not None:
                # A process that was killed while it added an evaluation has not listed it.
                if name not in self._records and name != EVALUATION_FILE:
                    raise ValueError(f"{name} is not listed in {HASHES_FILE}")
                check_record(name, content, self._records.get(name, file_record(content)))
        except (OSError, ValueError) as error:
            raise self._damaged(f"cannot read {name} ({_reason(error)})") from None
        return content

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object.

        Raises:
            DamagedCheckpointError: see `read`; or it is not a JSON object.
        """
        content = self.read(name)
        try:
            data = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"cannot read {name} ({error})") from None
        if not isinstance(data, dict):
            raise self._damaged(f"{name} is not a JSON object")
        return data

    def read_state(self) -> dict[str, Any]:
        """Read the counters and, if there is one, the evaluation.

        Raises:
            DamagedCheckpointError: see `read_json`.
        """
        state = self.read_json(STATE_FILE)
        if (self.path / EVALUATION_FILE).is_file() or EVALUATION_FILE in (self._records or {}):
            state["evaluation"] = self.read_json(EVALUATION_FILE)
        return state

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """Read a safetensors file; nothing is unpickled.

        Raises:
            DamagedCheckpointError: see `read`; or it is not a safetensors file.
        """
        content = self.read(name)
        try:
            return load(content)
        except (SafetensorError, ValueError, KeyError) as error:
            raise self._damaged(f"{name} is not a safetensors file ({error})") from None

    def _damaged(self, what: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(f"checkpoint {self.path} is damaged: {what}")


def write_files(
    directory: Path, content: Mapping[str, bytes], replay_records: Mapping[str, FileRecord]
) -> None:
    """Write the files of a checkpoint and their sha256.json.

    Args:
        directory: empty.
        content: name -> content.
        replay_records: the records of the replay files that the checkpoint needs.
    """
    for name, data in content.items():
        (directory / name).write_bytes(data)
    records = {name: file_record(data) for name, data in content.items()}
    records |= {f"{REPLAY_DIR}/{name}": record for name, record in replay_records.items()}
    (directory / HASHES_FILE).write_bytes(records_json(records))


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return run_dir / CHECKPOINTS_DIR / f"step_{step:09d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first."""
    directory = run_dir / CHECKPOINTS_DIR
    if not directory.is_dir():
        return []
    return sorted((entry for entry in directory.iterdir() if _NAME.fullmatch(entry.name)), key=_step)


def is_checkpoint(path: Path) -> bool:
    """Return whether a directory is a checkpoint, which may be damaged."""
    return (path / NETWORKS_FILE).is_file() or (path / HASHES_FILE).is_file()


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint of a path: itself, or the best evaluated one of a run (if equal the newest).

    Raises:
        CheckpointError: neither a checkpoint nor a run with one.
    """
    if is_checkpoint(path):
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise CheckpointError(
            f"wanted a run or a checkpoint of rsm-train at {str(path)!r}, got {_found(path)}; "
            "name another path, or train with rsm-train --out"
        )
    return max(checkpoints, key=lambda entry: (_score(entry), _step(entry)))


def prune_checkpoints(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one, which becomes a policy only when older."""
    checkpoints = list_checkpoints(run_dir)
    best = find_checkpoint(run_dir) if checkpoints else None
    for path in checkpoints[:-keep]:
        if path == best:
            # Its transitions are deleted, and `load_training` refuses it without this file.
            (path / TRAINING_FILE).unlink(missing_ok=True)
        else:
            # Renamed first: half a checkpoint must not look like one.
            hidden = path.rename(path.with_name(f".{path.name}.pruned"))
            shutil.rmtree(hidden)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that the run can write one of the same step; returns its new path."""
    target = checkpoint.with_name(_DAMAGED + checkpoint.name)
    if target.exists():
        shutil.rmtree(target)
    return checkpoint.rename(target)


def read_state(path: Path) -> dict[str, Any]:
    """Read the counters and the evaluation of a checkpoint.

    Raises:
        DamagedCheckpointError: missing or damaged.
    """
    return CheckpointFiles(path).read_state()


def add_file(path: Path, name: str, content: bytes) -> None:
    """Add a file to a complete checkpoint, then its record.

    Raises:
        OSError: it cannot be written.
        ValueError: sha256.json is damaged.
    """
    atomic.write_file(path / name, content)
    records = read_records(path / HASHES_FILE)
    if records is not None:
        atomic.write_file(path / HASHES_FILE, records_json(records | {name: file_record(content)}))


def _step(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def _score(checkpoint: Path) -> float:
    """Return the mean return of a checkpoint's evaluation; -inf if it has none."""
    try:
        return float(read_state(checkpoint)["evaluation"]["mean"])
    except DamagedCheckpointError as error:
        _warn_passed_over(str(error))
    except (KeyError, TypeError, ValueError):
        pass
    return float("-inf")


def _found(path: Path) -> str:
    if path.is_dir():
        return "a directory without checkpoints"
    return "a file" if path.exists() else "no such directory"


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@functools.cache
def _warn_unverified(path: Path) -> None:
    logger.warning(
        "checkpoint %s has no %s, which older versions did not write: damage to its files may not be noticed",
        path,
        HASHES_FILE,
    )


@functools.cache
def _warn_passed_over(reason: str) -> None:
    logger.warning("%s; its evaluation is not compared with the others", reason)
