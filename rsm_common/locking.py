"""File locks between processes; the system releases a lock when its process dies."""

from __future__ import annotations

import errno
import functools
import logging
from typing import IO

logger = logging.getLogger(__name__)

UNSUPPORTED = (errno.ENOLCK, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Error numbers of a file system without locks or without fsync, such as some network file systems."""


def lock_file(file: int | IO[bytes] | IO[str], path: object, *, wait: bool = False) -> bool:
    """Lock an open file.

    Without support for locks, a warning is logged once for each path, and the caller goes on unlocked.

    Args:
        file: the open file or its descriptor; closing it releases the lock.
        path: of the file, for the warning.
        wait: wait until another process releases the lock.

    Returns:
        False if the file system or the operating system has no locks.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is False.
        OSError: the lock fails for another reason.
    """
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except ImportError:
        _warn(str(path), "this operating system has no flock")
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn(str(path), error.strerror or str(error))
        return False
    return True


@functools.cache
def _warn(path: str, reason: str) -> None:
    logger.warning(
        "cannot lock %s (%s), so a second process that writes there is not noticed; start only one",
        path,
        reason,
    )
