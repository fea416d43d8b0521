"""SIGINT and SIGTERM as a wish to stop, which the training loop fulfils after its present step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunStopped(Exception):  # noqa: N818 - not an error: the run is saved
    """A signal stopped the run after a checkpoint; the message says how to go on."""


class StopRequest:
    """While entered, in the main thread, the first SIGINT or SIGTERM is noted in `signal_name`.

    The second one acts as if nobody listened. What was in force before comes back at the end.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            # None: installed by something else than Python, which cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
