"""Files that change while a process runs: certificates that are renewed, tokens that are exchanged."""

from __future__ import annotations

import contextlib
import logging
import shlex
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from rsm_common.errors import RsmError
from rsm_common.file_stamp import FileStamp, file_stamp

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_S = 1.0
"""Time between two looks at the files; they are looked at only when their content is asked for."""


class Watched(Generic[T]):
    """The content of some files, read again when they have changed; any thread may ask.

    Files that cannot be read, or are wrong, change nothing: the last good content stays, and the log has one
    warning.

    Args:
        paths: the files.
        read: reads the files and returns their content.
        clock: seconds, monotonic.

    Raises:
        RsmError: the first `read` failed.
    """

    def __init__(
        self, paths: Sequence[Path], read: Callable[[], T], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._clock = clock
        self._lock = threading.Lock()
        self._told = ""
        self._stamps = self._look()
        self._value = read()
        self._next_look_s = clock() + LOOK_S

    @property
    def value(self) -> T:
        """The content; the same object until the files change."""
        if self._clock() >= self._next_look_s and self._lock.acquire(blocking=False):
            try:
                self._refresh()
            finally:
                self._next_look_s = self._clock() + LOOK_S
                self._lock.release()
        return self._value

    def _look(self) -> tuple[FileStamp, ...]:
        return tuple(map(file_stamp, self._paths))

    def _refresh(self) -> None:
        stamps = self._look()
        if stamps == self._stamps:
            return
        try:
            value = self._read()
        except RsmError as error:
            if self._told != str(error):
                self._told = str(error)
                logger.warning("%s; the content that was read before stays in use", error)
            return
        if stamps == self._look():  # otherwise the files are being written, and are read at the next look
            self._stamps, self._value, self._told = stamps, value, ""
            logger.info("read again: %s", ", ".join(map(str, self._paths)))


def warn_if_public(path: Path) -> None:
    """Log a warning if every user of this machine can read a secret."""
    with contextlib.suppress(OSError):
        mode = path.stat().st_mode
        if stat.S_ISREG(mode) and mode & stat.S_IROTH:
            command = shlex.join(["chmod", "600", str(path)])
            logger.warning("%s can be read by every user of this machine; %s", path, command)
