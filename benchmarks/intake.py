"""What counting, recording and the action guard cost the event loop per request.

    python benchmarks/intake.py [--requests 2000] [--rounds 9] [--out FILE]

Requests of a single row go through the intake of a server and are settled at once, by futures of a real event
loop, with and without a recorder and a guard; rounds alternate. Per request: CPU time of the event loop's
thread, and of the recorder's thread, which writes.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from record import write_record

from rsm_common.policy import ActResult, ActRows, Timing
from rsm_common.spec import BoxSpec, PolicySpec
from rsm_serve.engine.action_guard import GuardLimits
from rsm_serve.engine.guarded_answers import GuardedAnswers
from rsm_serve.engine.intake import Intake
from rsm_serve.engine.registry import Registry
from rsm_serve.observe.counts import LaneCounts
from rsm_serve.observe.settled import Answered
from rsm_serve.recording.recorder import Recorder
from rsm_serve.server import run_loop
from rsm_serve.wire.caller import Caller

Future = asyncio.Future[Answered[ActResult]]
Ask = Callable[[], Future]

SPEC = PolicySpec(
    name="bench",
    algorithm="dpmd",
    env_id="HalfCheetah-v5",
    observation=BoxSpec(tuple(f"o{i}" for i in range(17)), (None,) * 17, (None,) * 17),
    action=BoxSpec(tuple(f"a{i}" for i in range(6)), (-1.0,) * 6, (1.0,) * 6),
    steps=20,
    particles=32,
    version="1",
)
ROWS = ActRows(np.zeros((1, 17), np.float32), np.ones(1, np.uint64), None, single=False)
CALLER = Caller("arm-7", 0, None, fixed=False)
GATHERED = 50
"""Requests per turn of the event loop."""


def answers(count: int) -> list[Answered[ActResult]]:
    """Random walks with steps below and above 0.1."""
    action = np.random.default_rng(0).uniform(-1, 1, (count, 1, 6)).astype(np.float32)
    q, timing = np.zeros(1, np.float32), Timing(1, 2, 3, 1)
    return [Answered(ActResult(row, q, ROWS.seeds_B, "1", timing), 1.0) for row in action]


class Call:
    """A caller without a deadline."""

    def time_remaining(self) -> None:
        """No deadline."""

    def peer(self) -> str:
        """Return an address."""
        return "ipv4:127.0.0.1:1"

    def invocation_metadata(self) -> tuple[()]:
        """No metadata."""
        return ()


class StandIn:
    """A lane without a batcher: the caller settles the future."""

    spec = SPEC

    def __init__(self) -> None:
        self.counts = LaneCounts("bench", "1", "none", lambda: 0)
        self.sampled: Future | None = None

    def sample(self, rows: ActRows, timeout_s: float | None, **_: object) -> Future:
        """Return a new future."""
        self.sampled = asyncio.get_running_loop().create_future()
        return self.sampled


async def settle(results: list[Answered[ActResult]], lane: StandIn, ask: Ask) -> float:
    """Microseconds per request."""
    started_s = time.thread_time()
    for index, result in enumerate(results):
        ask()
        assert lane.sampled is not None
        lane.sampled.set_result(result)
        if index % GATHERED == 0:
            await asyncio.sleep(0)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return 1e6 * (time.thread_time() - started_s) / len(results)


async def measure(requests: int, rounds: int, directory: Path) -> dict[str, Any]:
    """Medians of the rounds; "count" without the bare futures, the others without "count"."""
    recorder = Recorder(directory, 2**30)
    recorder.start()
    guard = GuardedAnswers(GuardLimits(max_step=1.0, fallback="hold"))
    lane: Any = StandIn()
    registry, call = Registry([lane]), Call()

    def through(intake: Intake) -> Ask:
        def ask() -> Future:
            with intake.receive("rsm.v1.PolicyService", "Act", call, "bench", "") as arrival:
                arrival.find(CALLER)
                return arrival.submit(ROWS)

        return ask

    ways: dict[str, Ask] = {
        "bare": lambda: lane.sample(ROWS, None),
        "count": through(Intake(registry)),
        "record": through(Intake(registry, listeners=[recorder.settled])),
        "guard": through(Intake(registry, guard=guard)),
    }
    results = answers(requests)
    times: dict[str, list[float]] = {name: [] for name in ways}
    writing: list[float] = []
    for _ in range(rounds):
        for name, ask in ways.items():
            before_s = time.process_time() - time.thread_time()
            times[name].append(await settle(results, lane, ask))
            while (
                recorder.counts.written + sum(recorder.counts.dropped.values())
                < len(times["record"]) * requests
            ):
                await asyncio.sleep(0.01)
            if name == "record":
                others_s = time.process_time() - time.thread_time() - before_s
                writing.append(1e6 * others_s / requests)
    recorder.close()
    middle = {name: median(found) for name, found in times.items()}
    size = sum(path.stat().st_size for path in directory.iterdir())
    return {
        "event_loop_us": {
            "count": round(middle["count"] - middle["bare"], 2),
            **{name: round(middle[name] - middle["count"], 2) for name in ("record", "guard")},
        },
        "writer_us": round(median(writing), 2),
        "bytes_per_request": round(size / recorder.counts.written),
        "dropped": recorder.counts.dropped,
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = run_loop(lambda: measure(options.requests, options.rounds, Path(directory)))
    write_record({"requests": options.requests, "rounds": options.rounds, **found}, options.out)


if __name__ == "__main__":
    main()
