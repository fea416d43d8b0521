"""The wish to stop, by a signal or by a callback, which the training loop fulfils after its present step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class RunStopped(Exception):  # noqa: N818 - not an error: the run is saved
    """A signal or a callback stopped the run after a checkpoint; the message says how to go on."""

    def __init__(self, message: str, number: signal.Signals | None = None) -> None:
        super().__init__(message)
        self.signal = number
        """None: a callback stopped it."""


class StopRequest:
    """While entered, in the main thread, the first of SIGNALS is noted in `signal`.

    A later SIGINT or SIGTERM acts as if nobody listened; a later SIGHUP does nothing, as a terminal that is
    lost sends two, its own and its shell's. Where SIGHUP is ignored (nohup), it stays so. What was in force
    before comes back at the end.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.by_callback = False
        """Set by the training loop."""
        self._before: dict[signal.Signals, Any] = {}

    @property
    def made(self) -> bool:
        """Whether the run shall stop."""
        return self.by_callback or self.signal is not None

    @property
    def reason(self) -> str:
        """The signal, or who else asked."""
        return "the callback" if self.signal is None else self.signal.name

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore(*self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
        self._restore(signal.SIGINT, signal.SIGTERM)

    def _restore(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            handler = self._before[number]
            # None: installed by something else than Python, which cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
