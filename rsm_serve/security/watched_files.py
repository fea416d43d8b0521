"""Files that change while a process runs: certificates that are renewed, tokens that are exchanged."""

from __future__ import annotations

import contextlib
import logging
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
"""Between two looks at the files, which happen on use alone."""


class Watched(Generic[T]):
    """What some files say, read again when they have changed; any thread may ask.

    What cannot be read, or is wrong, changes nothing: the last good content stays, and the log says so once.

    Args:
        paths: the files.
        read: makes the content of them.
        clock: seconds, monotonic.

    Raises:
        RsmError: what `read` raises at the beginning.
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
                logger.warning("%s; what was read before goes on", error)
            return
        if stamps == self._look():  # otherwise somebody is writing: it is read at the next look
            self._stamps, self._value, self._told = stamps, value, ""
            logger.info("read again: %s", ", ".join(map(str, self._paths)))


def warn_if_public(path: Path) -> None:
    """Say in the log that a secret can be read by every user of this machine."""
    with contextlib.suppress(OSError):
        if path.stat().st_mode & stat.S_IROTH:
            logger.warning("%s can be read by every user of this machine; chmod 600 %s", path, path)
