"""Run the tests on machines that seem fast, slow and busy: `make test-matrix`.

    python -m tests.matrix [pytest's arguments]

Three runs, each in another order: the tests' own slow work takes no time, takes 20 times as long, and goes on
beside a load that takes every core. Prints a line for each; the exit status is 1 if a run failed.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator

from tests.pacing import SCALE

RUNS = (("work takes no time", "0", False), ("work takes 20 times as long", "20", False), ("busy", "1", True))
SPIN = "while True: pass"


@contextlib.contextmanager
def load(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that spin, which end with the block."""
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield spinning
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def run(name: str, scale: str, busy: bool, arguments: list[str]) -> bool:
    """One run; prints its line, and the whole output if it failed."""
    seed = random.randrange(2**32)
    command = [sys.executable, "-m", "pytest", "-q", f"--randomly-seed={seed}", *arguments]
    started = time.monotonic()
    with load(os.cpu_count() or 1 if busy else 0):
        done = subprocess.run(
            command, env={**os.environ, SCALE: scale}, capture_output=True, text=True, check=False
        )
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped|xfailed|xpassed)", done.stdout[-300:])
    result = ", ".join(counts) or f"status {done.returncode}"
    print(f"{name}: {result} in {time.monotonic() - started:.0f} s, --randomly-seed={seed}", flush=True)
    if done.returncode:
        print(done.stdout + done.stderr, flush=True)
    return done.returncode == 0


def main() -> int:
    arguments = sys.argv[1:] or ["-n", "2", "--dist", "worksteal"]
    passed = [run(*each, arguments) for each in RUNS]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
