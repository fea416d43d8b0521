"""The log of a server: lines of text or JSON on stderr, limited so that they cannot fill a disk."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Literal, TextIO

LogFormat = Literal["text", "json"]

FIELDS = ("policy", "version", "lane", "request_id")
"""Fields that a record may carry as `extra`; the log repeats nothing else from a request."""

MAX_TEXT = 4000
"""Characters of a message, and of a traceback, of which the end is kept."""

BURST = 10
"""Warnings and errors of one line of code that are logged at once; then one per second."""


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, `FIELDS` where known, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage()[:MAX_TEXT],
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)[-MAX_TEXT:]
        return json.dumps(line, default=str)


class FloodFilter(logging.Filter):
    """Passes at most `BURST` warnings or errors of one line of code at once, then one per second.

    The next record that passes names the count of those dropped. The memory is bounded by the lines of code.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._places: dict[tuple[str, int], tuple[float, float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`; called by a handler, which holds its lock."""
        if record.levelno < logging.WARNING:
            return True
        place, now = (record.pathname, record.lineno), self._clock()
        left, last_s, dropped = self._places.get(place, (BURST, now, 0))
        left = min(BURST, left + now - last_s)
        if left < 1:
            self._places[place] = (left, now, dropped + 1)
            return False
        self._places[place] = (left - 1, now, 0)
        if dropped:
            record.msg, record.args = f"{record.getMessage()} ({dropped} more like it were not logged)", None
        return True


def is_no_departure(record: logging.LogRecord) -> bool:
    """A filter: False for a record about a caller that left while its answer was being sent.

    gRPC logs this as an error of the server, with a traceback of its own code.
    """
    kind = record.exc_info[0] if record.exc_info else None
    return not (
        record.name == "grpc._cython.cygrpc" and kind is not None and kind.__name__ == "ExecuteBatchError"
    )


def set_up_logging(log_format: LogFormat, *, verbose: bool, stream: TextIO | None = None) -> None:
    """Send the log of this process to stderr, or to `stream`."""
    handler = logging.StreamHandler(stream or sys.stderr)
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(is_no_departure)
    handler.addFilter(FloodFilter())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
