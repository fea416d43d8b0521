"""Files and directories that are either complete or absent.

Content is written under a temporary name beside its destination, flushed to the disk, and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rsm_common.locking import UNSUPPORTED

logger = logging.getLogger(__name__)


def write_file(path: Path, content: bytes) -> None:
    """Write or replace a file atomically; its directory must exist. A link is followed.

    Raises:
        FileExistsError: the path is something else than a file, such as a device, which renaming would destroy.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "not a regular file", str(path))
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            flush_descriptor(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Fill a new directory: yields a temporary one that becomes `path` if the block succeeds.

    The parent directory is created. Nothing is left behind if the block raises.

    Raises:
        FileExistsError: `path` exists already and is not an empty directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        temporary.chmod(0o755)
        yield temporary
        for entry in temporary.rglob("*"):
            sync_path(entry)
        sync_path(temporary)
        try:
            temporary.rename(path)
        except OSError as error:
            raise FileExistsError(error.errno, "already exists", str(path)) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Flush a file or a directory to the disk.

    Raises:
        OSError: it cannot be opened, or the disk reports an error.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush_descriptor(descriptor)
    finally:
        os.close(descriptor)


def flush_descriptor(descriptor: int) -> None:
    """Flush an open file to the disk; a file system without fsync is warned of once.

    Raises:
        OSError: the disk reports an error.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn_fsync(error.strerror or str(error))


@functools.cache
def _warn_fsync(reason: str) -> None:
    logger.warning(
        "this file system does not support fsync (%s), so files written last may be lost in a power cut", reason
    )
