"""The replay buffer: a ring of transitions in preallocated tensors, and its files.

Transitions are numbered in the order they are added. On disk they are immutable segments
`<first>-<end>.safetensors`, each written once, right before the first checkpoint that needs it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rsm_common import atomic
from rsm_common.errors import ConfigError, DamagedCheckpointError
from rsm_common.manifest import FileRecord, check_record, file_record
from rsm_train.algorithms.common import Batch

SEGMENT_ROWS = 50_000
"""Most transitions in one file: a file is built in memory."""
_NAME = re.compile(r"(\d{12})-(\d{12})\.safetensors")


class ReplayBuffer:
    """The last `capacity` transitions, float32, on one device; memory is touched as it fills."""

    def __init__(
        self, capacity: int, obs_size: int, action_size: int, device: torch.device | str = "cpu"
    ) -> None:
        """Raises ConfigError: it does not fit into the device's memory."""

        def empty(*shape: int) -> Tensor:
            return torch.empty(capacity, *shape, device=device)

        try:
            self._data = Batch(
                obs=empty(obs_size),
                action=empty(action_size),
                reward=empty(),
                next_obs=empty(obs_size),
                terminated=empty(),
            )
        except RuntimeError as error:
            if not re.search(r"allocate memory|out of memory|overflow", str(error), re.IGNORECASE):
                raise
            gib = capacity * (2 * obs_size + action_size + 2) * 4 / 2**30
            raise ConfigError(
                f"wanted {gib:,.1f} GiB of memory on {device} for a replay_size of {capacity:,}, got less; use "
                "a smaller --replay-size"
            ) from None
        self.capacity = capacity
        self.added = 0

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    @property
    def oldest(self) -> int:
        """Number of the oldest transition that is still there."""
        return max(0, self.added - self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes when full."""
        return sum(stored.nbytes for stored in vars(self._data).values())

    def add(self, rows: Batch) -> None:
        """Append transitions, overwriting the oldest when full."""
        index = self._places(self.added, self.added + len(rows.reward))
        for name, stored in vars(self._data).items():
            stored[index] = getattr(rows, name).to(stored.device, stored.dtype)
        self.added += len(rows.reward)

    def rows(self, first: int, end: int) -> Batch:
        """Copies of the transitions numbered from `first` to before `end`."""
        assert self.oldest <= first <= end <= self.added
        index = self._places(first, end)
        return Batch(**{name: stored[index] for name, stored in vars(self._data).items()})

    def shapes(self, count: int) -> dict[str, torch.Size]:
        """Shapes of the tensors of so many transitions."""
        return {name: torch.Size((count, *stored.shape[1:])) for name, stored in vars(self._data).items()}

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Transitions drawn uniformly with replacement."""
        index = torch.randint(len(self), (batch_size,), generator=generator, device=generator.device)
        return Batch(**{name: stored[index] for name, stored in vars(self._data).items()})

    def sample_obs(self, count: int, generator: torch.Generator) -> Tensor:
        """Observations [count, O] drawn uniformly with replacement."""
        index = torch.randint(len(self), (count,), generator=generator, device=generator.device)
        return self._data.obs[index]

    def _places(self, first: int, end: int) -> Tensor:
        return torch.arange(first, end, device=self._data.reward.device) % self.capacity


@dataclass(frozen=True, order=True)
class Segment:
    """A file with the transitions numbered from `first` to before `end`."""

    first: int
    end: int
    path: Path


def list_segments(directory: Path) -> list[Segment]:
    """The segments in a directory, oldest first."""
    if not directory.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted(Segment(int(name[1]), int(name[2]), path) for name, path in found if name)


def write_segments(directory: Path, replay: ReplayBuffer, records: dict[str, FileRecord]) -> None:
    """Write the transitions that no file has yet, and add the records of their files to `records`.

    Raises:
        OSError: they cannot be written; the files that exist are unchanged.
    """
    directory.mkdir(exist_ok=True)
    written = list_segments(directory)
    start = max(written[-1].end if written else 0, replay.oldest)
    for first in range(start, replay.added, SEGMENT_ROWS):
        end = min(first + SEGMENT_ROWS, replay.added)
        tensors = {name: value.cpu() for name, value in vars(replay.rows(first, end)).items()}
        name, content = f"{first:012d}-{end:012d}.safetensors", save(tensors)
        atomic.write_file(directory / name, content)
        records[name] = file_record(content)


def load_segments(directory: Path, replay: ReplayBuffer, added: int, records: dict[str, FileRecord]) -> None:
    """Fill an empty buffer as it was after `added` transitions, each in its old place.

    Args:
        directory: with the files.
        replay: to be filled.
        added: transitions up to now.
        records: size and sha256 by file name. If it is empty, no file is verified, and the records are added.

    Raises:
        DamagedCheckpointError: a file is missing, damaged or of another environment.
    """
    assert replay.added == 0
    verify = bool(records)
    replay.added = max(0, added - replay.capacity)
    for segment in list_segments(directory):
        if segment.first > replay.added or segment.end > added:
            break
        if segment.end > replay.added:
            content, rows = _read(segment, replay, records if verify else None)
            records[segment.path.name] = file_record(content)
            replay.add(rows)
    if replay.added != added:
        raise DamagedCheckpointError(
            f"wanted transitions up to {added} in {directory}, got only those before {replay.added}"
        )


def remove_segments(directory: Path, *, before: int = 0, beyond: int | None = None) -> list[str]:
    """Delete the files that hold nothing from transition `before` on, and those that reach past `beyond`.

    Returns:
        the names of the deleted files.
    """
    deleted = []
    for segment in list_segments(directory):
        if segment.end <= before or (beyond is not None and segment.end > beyond):
            segment.path.unlink()
            deleted.append(segment.path.name)
    return deleted


def needed_records(records: Mapping[str, FileRecord], oldest: int) -> dict[str, FileRecord]:
    """Return the records of the files that hold transitions from number `oldest` on."""
    return {name: record for name, record in records.items() if int(name.partition(".")[0][-12:]) > oldest}


def _read(
    segment: Segment, replay: ReplayBuffer, records: Mapping[str, FileRecord] | None
) -> tuple[bytes, Batch]:
    """Read a segment; return the file's content and the transitions that the buffer lacks."""
    skip, name = replay.added - segment.first, segment.path.name
    try:
        content = segment.path.read_bytes()
        if records is not None:
            if name not in records:
                raise ValueError("the checkpoint does not list it")
            check_record(name, content, records[name])
        rows = Batch(**load(content))
        for field, shape in replay.shapes(segment.end - segment.first).items():
            if getattr(rows, field).shape != shape:
                raise ValueError(f"{field}: wanted {list(shape)}, got {list(getattr(rows, field).shape)}")
    except (OSError, SafetensorError, TypeError, ValueError, KeyError) as error:
        raise DamagedCheckpointError(f"replay file {segment.path} is damaged: {error}") from None
    return content, Batch(**{field: value[skip:] for field, value in vars(rows).items()})
