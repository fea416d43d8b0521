"""Who may compute: at most so many lanes at once, in turn."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class Turns:
    """A bound on how many worker threads compute at the same time; a context manager around one batch.

    Turns are handed over in the order in which they were asked for. A worker asks once per batch, so lanes with
    waiting work go round robin, one batch each, however many requests wait in any of them.

    Args:
        count: how many at once.
    """

    def __init__(self, count: int) -> None:
        assert count >= 1, "someone must have a turn"
        self._free = count
        self._lock = threading.Lock()
        self._waiting: deque[threading.Semaphore] = deque()

    @property
    def waiting(self) -> int:
        """How many workers wait for a turn."""
        return len(self._waiting)

    def __enter__(self) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            gate = threading.Semaphore(0)
            self._waiting.append(gate)
        gate.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._waiting:  # handed over, never free in between: a newcomer cannot overtake
                self._waiting.popleft().release()
            else:
                self._free += 1
