"""Limits how many lanes compute at the same time, and gives each its turn."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class Turns:
    """A limit on how many worker threads compute at the same time; a context manager around one batch.

    Workers get their turns in the order in which they asked for one. A worker asks once per batch, so lanes
    with waiting requests compute one batch each in rotation, whatever the length of their queues.

    Args:
        count: threads that compute at the same time, >= 1.
    """

    def __init__(self, count: int) -> None:
        assert count >= 1, "one thread must be able to compute"
        self._free = count
        self._lock = threading.Lock()
        self._waiting: deque[threading.Semaphore] = deque()

    @property
    def waiting(self) -> int:
        """Number of workers that wait for a turn."""
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
            if self._waiting:  # handed over without being free in between, so that no other worker overtakes
                self._waiting.popleft().release()
            else:
                self._free += 1
