"""Numbered files of records in one directory; the oldest files are deleted to make room."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from rsm_common.errors import ConfigError
from rsm_common.locking import lock_file
from rsm_serve.recording import format as recording
from rsm_serve.recording.format import MAGIC, SUFFIX

MAX_FILE_BYTES = 2**26
FILES = 8
"""Least number of files that share the space, so that one deletion loses at most this part of it."""
LOCK = ".lock"
"""A file that is locked while a server records in its directory."""


class RotatingFiles:
    """Writes frames to numbered files, which together stay below a size; not for several threads.

    Args:
        directory: created if it is missing, for this user alone.
        max_bytes: of all files together.

    Raises:
        ConfigError: the directory cannot be written to, or is in use.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._file_bytes = min(MAX_FILE_BYTES, max_bytes // FILES)
        self._path: Path | None = None
        self._descriptor = -1
        self._size = 0
        self._number = 0
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _locked(directory)
        except BlockingIOError:
            raise ConfigError(
                f"wanted a directory for the records of this server alone, got {str(directory)!r}, where "
                "another one records; choose another --record"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"wanted a directory to record in, got {str(directory)!r} ({error.strerror}); "
                "choose another --record"
            ) from None

    def append(self, frames: bytes) -> bool:
        """Write one or more frames by one call; return False if they are larger than a file may be.

        Raises:
            OSError: they could not be written; the file has none of them.
        """
        if len(MAGIC) + len(frames) > self._file_bytes:
            return False
        if self._path is not None and self._size + len(frames) > self._file_bytes:
            self._leave()
        if self._path is None:
            self._begin()
        self._write(frames)
        return True

    def look(self) -> None:
        """Leave the file if it was deleted or replaced: frames written to a deleted file are lost silently."""
        if self._path is None:
            return
        try:
            there, ours = self._path.stat(), os.fstat(self._descriptor)
        except OSError:
            self._leave()
            return
        if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            self._leave()

    def close(self) -> None:
        """Close the file and unlock the directory; may be repeated."""
        self._leave()
        self._lock.close()

    def _begin(self) -> None:
        """Make room, then open the next file."""
        # A missing directory is not created again: it may have been on another disk, and this one would fill.
        # A directory that was created again is a new one, in which another server may record.
        if not _same_file(self._lock, self._directory / LOCK):
            try:
                lock = _locked(self._directory)
            except BlockingIOError:
                raise OSError(f"another server records in {self._directory} now") from None
            self._lock.close()
            self._lock = lock
        files = recording.numbered_files(self._directory)
        sizes = [path.stat().st_size for path in files]
        while files and sum(sizes) + self._file_bytes > self._max_bytes:
            files[0].unlink(missing_ok=True)
            del files[0], sizes[0]
        number = recording.number_of(files[-1].name) + 1 if files else max(1, self._number + 1)
        path = self._directory / f"{number:08d}{SUFFIX}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._path, self._descriptor, self._size, self._number = path, descriptor, 0, number
        try:
            self._write(MAGIC)
        except OSError:
            self._leave()
            path.unlink(missing_ok=True)
            raise

    def _write(self, content: bytes) -> None:
        written = os.write(self._descriptor, content)
        if written == len(content):
            self._size += written
            return
        try:  # the disk is full; a file holds whole frames only
            os.ftruncate(self._descriptor, self._size)
        except OSError:
            self._leave()
        raise OSError(f"only {written} of {len(content)} bytes could be written; the disk may be full")

    def _leave(self) -> None:
        if self._path is not None:
            self._path = None
            os.close(self._descriptor)


def _locked(directory: Path) -> BinaryIO:
    """Lock a directory; return the lock, which is held until it is closed.

    Raises:
        BlockingIOError: another recorder has it.
        OSError: the directory is gone, or cannot be written to.
    """
    lock: BinaryIO = open(directory / LOCK, "wb", opener=_private)  # noqa: SIM115 (kept)
    try:
        lock_file(lock, directory / LOCK)
    except OSError:
        lock.close()
        raise
    return lock


def _same_file(opened: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
