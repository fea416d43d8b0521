"""The files that a command writes for its user: checked first, then written whole or not at all."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

from rsm_common import atomic
from rsm_common.errors import UsageError


def check_writable(path: Path) -> None:
    """Make sure before long work that a file can be written; nothing is left behind.

    Raises:
        UsageError: it cannot.
    """
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise _unwritable(path, error) from None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file or none, in a directory that is made if need be.

    Raises:
        UsageError: the directory cannot be created or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_file(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> UsageError:
    remedy = {
        errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
        errno.ENOSPC: "make room, or choose a place on another disk",
    }.get(error.errno or 0, "choose a place that you may write to")
    return UsageError(f"wanted to write {str(path)!r}, got {error.strerror}; {remedy}")
