"""A deadline for the blocking reads of a gRPC stream."""

from __future__ import annotations

import threading
import time
from typing import Any


class Watchdog:
    """Cancels a call that is not disarmed in time.

    Blocking reads of a gRPC stream take no timeout. The thread sleeps until the earliest possible deadline, so
    that in a control loop it wakes about once per timeout, not once per step.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._call: Any = None
        self._due_s = 0.0
        self._wakes_at_s: float | None = None
        self._expired = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def arm(self, call: Any, timeout_s: float) -> None:
        """Cancel the call in `timeout_s` seconds."""
        with self._changed:
            self._call, self._expired = call, False
            self._due_s = time.monotonic() + timeout_s
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="rsm-client-deadline", daemon=True)
                self._thread.start()
            elif self._wakes_at_s is None or self._due_s < self._wakes_at_s:
                self._changed.notify()

    def disarm(self) -> bool:
        """Leave the call alone from now on; returns whether it was cancelled."""
        with self._changed:
            self._call = None
            return self._expired

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                if self._call is None:
                    self._wakes_at_s = None
                    self._changed.wait()
                elif self._due_s > now:
                    self._wakes_at_s = self._due_s
                    self._changed.wait(self._due_s - now)
                else:
                    self._expired = True
                    self._call.cancel()
                    self._call = None
