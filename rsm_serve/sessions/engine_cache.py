"""A directory of built engines: each file complete or absent, one build at a time, bounded in size.

A file is one line of JSON (format, the engine's sha256, the model's) and the engine. The directory is this
user's alone, because an engine is a program.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rsm_common.atomic import write_file
from rsm_common.errors import UsageError

logger = logging.getLogger(__name__)

CACHE_FORMAT = 1
MAX_CACHE_BYTES = 2 * 2**30
"""The engines that were used longest ago are removed beyond this."""


def default_cache_dir() -> Path:
    """~/.cache/rsm-toolkit/tensorrt.

    Raises:
        UsageError: this user has no home directory.
    """
    try:
        return Path.home() / ".cache" / "rsm-toolkit" / "tensorrt"
    except RuntimeError:
        raise UsageError(
            "wanted a home directory for the cache of TensorRT engines, got none; set HOME"
        ) from None


@dataclass(frozen=True)
class CacheEntry:
    """A serialised engine and the sha256 of the ONNX file whose weights are in it."""

    plan: bytes
    model_sha256: str


class EngineCache:
    """Engines and timings in a directory; what cannot be read or written costs a build and a warning."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, key: str) -> Path:
        """Where the engine of a key lies or would lie."""
        return self._directory / f"{key}.engine"

    def read(self, key: str) -> CacheEntry | None:
        """The entry of a key; None if there is none or it is damaged, and then it is removed."""
        path = self.path(key)
        try:
            line, _, plan = path.read_bytes().partition(b"\n")
        except OSError:
            return None
        try:
            header = json.loads(line)
            sound = header["format"] == CACHE_FORMAT and header["sha256"] == hashlib.sha256(plan).hexdigest()
            model_sha256 = str(header["model"])
        except (ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            logger.warning("the cached TensorRT engine %s is damaged; it is built again", path)
            self.discard(key)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # recently used
        return CacheEntry(plan, model_sha256)

    def discard(self, key: str) -> None:
        """Remove the entry of a key, if that can be done."""
        with contextlib.suppress(OSError):
            self.path(key).unlink()

    def store(self, key: str, plan: bytes, model_sha256: str) -> None:
        """Write an entry; a failure costs a warning. Call it with the lock held."""
        header = {"format": CACHE_FORMAT, "sha256": hashlib.sha256(plan).hexdigest(), "model": model_sha256}
        self._write(self.path(key), json.dumps(header).encode() + b"\n" + plan)
        self._trim(keep=self.path(key))

    def read_timings(self, key: str) -> bytes:
        """The timing cache of a key; empty if there is none."""
        try:
            return (self._directory / f"{key}.timings").read_bytes()
        except OSError:
            return b""

    def write_timings(self, key: str, content: bytes) -> None:
        """Replace the timing cache of a key. Call it with the lock held."""
        self._write(self._directory / f"{key}.timings", content)

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Hold the cache's lock, waiting for it; yields False, with a warning, if the cache cannot be used.

        One build at a time: besides writing the same file, two of them would spoil each other's timings.
        """
        with contextlib.ExitStack() as stack:
            try:
                import fcntl  # not on Windows

                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                file = stack.enter_context((self._directory / "lock").open("w"))
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, or its process dies
                writable = True
            except (OSError, ImportError) as error:
                logger.warning("no cache of TensorRT engines in %s (%s)", self._directory, error)
                writable = False
            yield writable

    def _write(self, path: Path, content: bytes) -> None:
        try:
            write_file(path, content)
        except OSError as error:
            logger.warning("cannot write %s (%s); TensorRT will build again", path, error.strerror)

    def _trim(self, *, keep: Path) -> None:
        found = []
        for path in self._directory.glob("*.engine"):
            with contextlib.suppress(OSError):
                found.append((path != keep, path.stat(), path))
        total = 0
        for _, status, path in sorted(found, key=lambda item: (item[0], -item[1].st_mtime_ns)):
            total += status.st_size
            if total > MAX_CACHE_BYTES and path != keep:
                with contextlib.suppress(OSError):
                    path.unlink()
