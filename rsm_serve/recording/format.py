"""Recorded requests: the fields of a record, the format of the files, and a reader.

    for record in rsm_serve.recording.read("records"):
        print(record.policy, record.obs, record.seeds, record.action)

A file is `MAGIC`, then frames: the length of the content and its CRC-32 (both uint32, little-endian), then the
content, a `Record` of protos/rsm/v1/recording.proto. A frame is written by one call. So a file has at most one
incomplete frame, at its end, however the writer ended.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from rsm_common.errors import UsageError
from rsm_common.policy import Timing
from rsm_common.seeds import DETERMINISTIC_SEED
from rsm_serve.pb import recording_pb2 as pb
from rsm_serve.wire.codec import WIRE_FLOAT, decode_timing, encode_timing

MAGIC = b"RSMREC1\n"
SUFFIX = ".rsmrec"
MAX_CONTENT_BYTES = 2**26
"""Of one record: four times the largest message. A longer length is damage."""

_FRAME = struct.Struct("<II")
_NUMBERED = re.compile(rf"\d{{8,18}}{re.escape(SUFFIX)}")


@dataclass(frozen=True, eq=False)
class Record:
    """One request and its answer. B rows; O, A, T and N as in the policy's specification."""

    policy: str
    version: str
    """The version that answered. If the request was refused before a policy was found: the version that it
    named, which may be empty."""
    method: str
    """"Act", "ActStream", "ModelInfer" or "ModelStreamInfer"."""
    client_id: str
    """Empty if the request had none."""
    arrived_unix_ns: int
    """When the request arrived, nanoseconds since 1970, UTC."""
    obs: NDArray[np.float32] | None
    """[B, O]; None if the request was refused before it was queued."""
    seeds: NDArray[np.uint64] | None
    """[B]; None if the request carried noise or was refused."""
    noise: NDArray[np.float32] | None
    """[B, T, N, A], if the request carried it."""
    code: str = "OK"
    """Name of the gRPC status."""
    reason: str = ""
    """As in the metric rsm_requests_total; empty for OK."""
    action: NDArray[np.float32] | None = None
    """[B, A], the action that the client got; None if the request failed."""
    q: NDArray[np.float32] | None = None
    """[B]; None if the policy has no critic, or the request failed."""
    adjusted: NDArray[np.int32] | None = None
    """[B], an `rsm_common.policy.Adjustment` per row; None if every action is the policy's own."""
    policy_action: NDArray[np.float32] | None = None
    """[B, A], the action that the policy chose; None if the policy failed."""
    timing: Timing = field(default_factory=Timing)
    """Of the server; `total_us` is from arrival to the answer, without decoding, encoding and transport."""

    @property
    def ok(self) -> bool:
        """Whether the request was answered."""
        return self.code == "OK"

    @property
    def deterministic(self) -> bool:
        """Whether the documented constant seed was used."""
        return self.seeds is not None and bool((self.seeds == DETERMINISTIC_SEED).all())


def encode(record: Record) -> bytes:
    """Return the frame of a record."""
    message = pb.Record(
        policy=record.policy,
        version=record.version,
        method=record.method,
        client_id=record.client_id,
        arrived_unix_ns=record.arrived_unix_ns,
        code="" if record.ok else record.code,
        reason=record.reason,
        timing=encode_timing(record.timing, record.timing.queue_us),
        total_us=record.timing.total_us,
    )
    if record.obs is not None:
        message.rows, message.obs = len(record.obs), _to_bytes(record.obs)
    if record.seeds is not None:
        message.seeds.extend(record.seeds.tolist())
    if record.noise is not None:
        message.noise = _to_bytes(record.noise)
        message.noise_shape.extend(record.noise.shape[1:])
    if record.action is not None:
        message.action = _to_bytes(record.action)
    if record.q is not None:
        message.q = _to_bytes(record.q)
    if record.adjusted is not None:
        message.adjusted.extend(record.adjusted.tolist())
        if record.policy_action is not None:
            message.policy_action = _to_bytes(record.policy_action)
    content = message.SerializeToString()
    return _FRAME.pack(len(content), zlib.crc32(content)) + content


def decode(content: bytes) -> Record:
    """Return the record of a frame's content.

    Raises:
        ValueError: not the content of a record.
    """
    try:
        message = pb.Record.FromString(content)
    except DecodeError as error:
        raise ValueError(str(error)) from None
    rows = message.rows
    action = _array(message.action, rows)
    adjusted = np.array(message.adjusted[:], np.int32) if message.adjusted else None
    return Record(
        policy=message.policy,
        version=message.version,
        method=message.method,
        client_id=message.client_id,
        arrived_unix_ns=message.arrived_unix_ns,
        obs=_array(message.obs, rows),
        seeds=np.array(message.seeds[:], np.uint64) if message.seeds else None,
        noise=_array(message.noise, rows, *message.noise_shape),
        code=message.code or "OK",
        reason=message.reason,
        action=action,
        q=None if not message.q else _array(message.q, rows, width=False),
        adjusted=adjusted,
        policy_action=action if adjusted is None else _array(message.policy_action, rows),
        timing=decode_timing(message.timing, message.total_us),
    )


@dataclass
class Reader:
    """Yields the records of files, oldest first; records that cannot be read are counted and left out.

    It yields the records that were there when it was made. If a server records into the directory meanwhile,
    the new records are left out, for example those of a replay that reads this directory.
    """

    files: Sequence[Path]
    unreadable: int = 0
    """Damaged or incomplete records so far; after a damaged length the rest of the file counts as one."""
    vanished: int = 0
    """Files so far that a server had deleted meanwhile, to make room for newer ones."""

    def __post_init__(self) -> None:
        self._sizes = {path: _size(path) for path in self.files}

    def __iter__(self) -> Iterator[Record]:
        for path in self.files:
            yield from self._records(path)

    def _records(self, path: Path) -> Iterator[Record]:
        if _NUMBERED.fullmatch(path.name) and not path.exists():
            self.vanished += 1
            return
        end = self._sizes[path]
        with _open(path) as file:
            if file.read(len(MAGIC)) != MAGIC:
                self.unreadable += 1
                return
            while file.tell() < end and (head := file.read(_FRAME.size)):
                content = self._content(head, file)
                if content is None:
                    self.unreadable += 1
                    return
                if zlib.crc32(content) == _FRAME.unpack(head)[1]:
                    try:
                        record = decode(content)
                    except ValueError:
                        pass
                    else:
                        yield record
                        continue
                self.unreadable += 1

    @staticmethod
    def _content(head: bytes, file: BinaryIO) -> bytes | None:
        """Return the content of a frame; None if it is incomplete, or its length is too large."""
        if len(head) < _FRAME.size or (length := _FRAME.unpack(head)[0]) > MAX_CONTENT_BYTES:
            return None
        content = file.read(length)
        return content if len(content) == length else None


def read(*paths: str | Path) -> Reader:
    """Return a reader of the records of files and directories, in the order in which they were written.

    A directory of `rsm-serve --processes` has one for each process; they are read one after the other.

    Raises:
        UsageError: a path is missing, cannot be read, or is a directory without records.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        try:
            found += _files(path)
        except OSError as error:
            raise UsageError(f"wanted to read {str(path)!r:.300}, got: {error.strerror}; check it") from None
    return Reader(found)


def _files(path: Path) -> list[Path]:
    """Return the files of a path: the file itself, or all files of records in a directory."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"wanted files or directories of records, got {str(path)!r:.300}; check the path")
    numbered = (entry for entry in path.iterdir() if entry.name.isdecimal() and entry.is_dir())
    processes = sorted(numbered, key=lambda entry: int(entry.name))
    files = [file for directory in (path, *processes) for file in numbered_files(directory)]
    if not files:
        raise UsageError(
            f"wanted a directory of records, got {str(path)!r} without any *{SUFFIX}; "
            "name the directory of rsm-serve --record"
        )
    return files


def _size(path: Path) -> int:
    """Return the size of a file in bytes; 0 if it is missing."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def numbered_files(directory: Path) -> list[Path]:
    """Return the files of records in a directory, oldest first.

    Raises:
        OSError: the directory cannot be read.
    """
    files = [path for path in directory.iterdir() if _NUMBERED.fullmatch(path.name)]
    return sorted(files, key=lambda path: number_of(path.name))


def number_of(name: str) -> int:
    """Return the number in the name of a file."""
    return int(name.removesuffix(SUFFIX))


def _open(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(f"wanted a file of records, got {str(path)!r} ({error.strerror}); check it") from None


def _to_bytes(array: NDArray[np.float32]) -> bytes:
    return array.astype(WIRE_FLOAT, copy=False).tobytes()


def _array(content: bytes, rows: int, *shape: int, width: bool = True) -> NDArray[np.float32] | None:
    """Return an array [rows, rest] or, with a shape, [rows, *shape]; None for no content.

    Raises:
        ValueError: the number of values does not fit.
    """
    if not content:
        return None
    wanted = (rows, *(shape or ((-1,) if width else ())))
    return np.frombuffer(content, WIRE_FLOAT).reshape(wanted).astype(np.float32)
