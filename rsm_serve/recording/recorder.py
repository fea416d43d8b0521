"""Writes every request and its answer to rotating files, without delaying the answers.

The event loop puts references into a queue. A thread makes the messages and writes them. Records that it is too
slow for, or cannot write, are dropped and counted. `rsm_serve.recording` has the format and a reader.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from pathlib import Path

from rsm_common.policy import Timing
from rsm_serve.observe.counts import NotRecorded, RecordCounts
from rsm_serve.observe.settled import Settled
from rsm_serve.recording import format as recording
from rsm_serve.recording.files import RotatingFiles
from rsm_serve.recording.format import Record

logger = logging.getLogger(__name__)


MAX_PENDING_BYTES = 2**25
"""Most bytes that wait for the writer; further requests are dropped."""
GATHER_S = 0.02
"""How long the writer waits for more records. Waking it for each record would cost the event loop more time
than all the rest of recording."""
GROUP = 8
"""Most records that are written by one call, and without a pause."""
GROUP_BYTES = 2**16
"""Most bytes that are written by one call; a larger record is written alone."""
PAUSE_S = 100e-6
"""Pause after each group, while less than half of the room is taken. Python runs one thread at a time. A writer
without pauses would block the event loop until all records are written (measured: 2 ms)."""
RETRY_S = 1.0
"""Time between two attempts to write to a disk that is full or gone."""
CLOSE_S = 5.0
MAX_ASKED_CHARACTERS = 128
"""Most characters of the policy's name and version that are kept: they may be any text of the caller."""
_NO_TIMING = Timing()
_OVERHEAD_BYTES = 1024
"""Size of a waiting request, without its observation and noise."""


class Recorder:
    """Records the requests of one event loop; `start` comes first, `close` last.

    Args:
        directory: created if it is missing; earlier records are kept.
        max_bytes: of all files together.

    Raises:
        ConfigError: the directory cannot be written to, or another server records there.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.counts = RecordCounts()
        self._files = RotatingFiles(directory, max_bytes)
        self._waiting: queue.SimpleQueue[Settled | None] = queue.SimpleQueue()
        # The difference is the number of bytes that wait. The event loop writes the first, the thread the
        # second.
        self._taken_bytes = 0
        self._done_bytes = 0
        self._closing = threading.Event()
        self._retry_at_s = 0.0
        self._told: dict[NotRecorded, int] = {}
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)

    def start(self) -> None:
        """Start the writer."""
        self._thread.start()

    def settled(self, event: Settled) -> None:
        """Record a request; in the event loop."""
        if self._taken_bytes - self._done_bytes > MAX_PENDING_BYTES:
            self.counts.dropped["behind"] += 1
            return
        self._taken_bytes += _size(event)
        self._waiting.put(event)

    def close(self) -> None:
        """Write the waiting records within `CLOSE_S`; may be repeated."""
        if not self._closing.is_set():
            self._closing.set()
            self._waiting.put(None)
            if self._thread.ident is not None:
                self._thread.join(CLOSE_S)
        if not self._thread.is_alive():  # otherwise the disk hangs, and the end of the process closes the files
            self._files.close()

    def _work(self) -> None:
        ended = False
        while not ended:
            items = [self._waiting.get()]
            self._closing.wait(GATHER_S)
            self._files.look()
            while items and not ended:
                ended = items[-1] is None
                self._write([item for item in items if item is not None])
                if self._taken_bytes - self._done_bytes < MAX_PENDING_BYTES // 2 and not self._closing.is_set():
                    time.sleep(PAUSE_S)
                items = self._group()
            self._tell()

    def _group(self) -> list[Settled | None]:
        """Return the next few waiting requests; the last item is None when the recorder closes."""
        items: list[Settled | None] = []
        with contextlib.suppress(queue.Empty):
            while len(items) < GROUP and (not items or items[-1] is not None):
                items.append(self._waiting.get_nowait())
        return items

    def _write(self, items: list[Settled]) -> None:
        frames: list[bytes] = []
        size = 0
        for item in items:
            self._done_bytes += _size(item)
            try:
                frame = recording.encode(make_record(item))
            except Exception:  # a fault of this program; the thread goes on with the next record
                logger.exception("a record could not be made")
                continue
            if size + len(frame) > GROUP_BYTES:
                self._append(frames)
                frames, size = [], 0
            frames.append(frame)
            size += len(frame)
        self._append(frames)

    def _append(self, frames: list[bytes]) -> None:
        if not frames:
            return
        if time.monotonic() < self._retry_at_s:
            self.counts.dropped["disk"] += len(frames)
            return
        try:
            written = self._files.append(b"".join(frames))
        except OSError as error:
            self._retry_at_s = time.monotonic() + RETRY_S
            self.counts.dropped["disk"] += len(frames)
            logger.warning("requests are not recorded (%s); serving goes on, trying again each second", error)
            return
        if written:
            self.counts.written += len(frames)
        else:
            self.counts.dropped["too_large"] += len(frames)

    def _tell(self) -> None:
        """Log how many records were dropped since the last time; errors of the disk are logged elsewhere."""
        for reason, text in _DROPPED.items():
            new = self.counts.dropped[reason] - self._told.get(reason, 0)
            if new:
                self._told[reason] = self.counts.dropped[reason]
                logger.warning("%d requests were answered and not recorded: %s", new, text)


def _size(event: Settled) -> int:
    """Bytes that a request holds while it waits for the writer."""
    # The names in a refused request are the caller's own text, of any length.
    names = len(event.policy) + len(event.version)
    overhead = max(_OVERHEAD_BYTES, 4 * names)
    rows = event.rows
    if rows is None:
        return overhead
    return overhead + rows.obs_BO.nbytes + (0 if rows.noise_BTNA is None else rows.noise_BTNA.nbytes)


def make_record(event: Settled) -> Record:
    """Make the record of a request that is settled."""
    rows, given, sampled = event.rows, event.given, event.sampled
    result = None if given is None else given.answer
    timing = _NO_TIMING if result is None else result.timing
    queue_us = 0.0 if given is None else given.queue_us
    total_us = 0.0 if rows is None else 1e6 * event.seconds
    return Record(
        policy=event.policy[:MAX_ASKED_CHARACTERS],
        version=event.version[:MAX_ASKED_CHARACTERS],
        method=event.method,
        client_id=event.client_id,
        arrived_unix_ns=event.arrived_unix_ns,
        obs=None if rows is None else rows.obs_BO,
        seeds=None if rows is None else rows.seeds_B,
        noise=None if rows is None else rows.noise_BTNA,
        code=event.code,
        reason=event.reason,
        action=None if result is None else result.action,
        q=None if result is None else result.q,
        adjusted=None if result is None else result.adjusted,
        policy_action=None if result is None or sampled is None else sampled.answer.action,
        timing=Timing(queue_us, timing.batch_us, timing.compute_us, timing.batch_rows, total_us),
    )


_DROPPED: dict[NotRecorded, str] = {
    "behind": "the disk does not keep up",
    "too_large": "a record is larger than a file may be; raise --record-max-mb",
}
