"""A cheap sign that a file has changed: modification time, size and inode."""

from __future__ import annotations

from pathlib import Path

FileStamp = tuple[int, int, int] | None
"""(modification time in ns, size in bytes, inode) of a file; None for a missing one."""


def file_stamp(path: Path) -> FileStamp:
    """Read the stamp of a file; two equal stamps mean that its content is most probably the same."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
