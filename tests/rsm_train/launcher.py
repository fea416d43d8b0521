"""Starts rsm-train many times for the price of one start of torch: a process that imports it all and forks.

    python -m tests.rsm_train.launcher

Each line of standard input is a JSON object: "argv" of rsm-train, "stderr" the file for what it prints, and
"kill_at": after how many operations on files it shall kill itself (null: never), and "hold": a step at which
it waits and the file that lets it go on (null: it waits for nothing). The answer is its process
id, and when it has ended a line with its status, negative for a signal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from tests.hang import HANG_S

ROOT = Path(__file__).parents[2]
FILE_EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open", "tempfile.mkstemp")


class Launcher:
    """The other end of the pipe; a context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.rsm_train.launcher"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )

    def start(
        self,
        argv: Sequence[str],
        stderr: Path,
        kill_at: int | None = None,
        *,
        hold: tuple[int, Path] | None = None,
    ) -> int:
        """Start rsm-train in a process group of its own; its process id."""
        held = hold and (hold[0], str(hold[1]))
        request = {"argv": list(argv), "stderr": str(stderr), "kill_at": kill_at, "hold": held}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def wait(self) -> int:
        """The status of what was started last."""
        return self._answer()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def __enter__(self) -> Launcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> None:
    import mujoco  # noqa: F401
    import torch
    import torch._dynamo  # imported by the first optimiser, and slow; imports it all with it

    import rsm_train.cli
    import rsm_train.run.start  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run(request)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(request: dict[str, Any]) -> NoReturn:
    from rsm_train.cli import main as rsm_train

    os.setpgid(0, 0)
    os.dup2(os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(2, 1)
    os.close(0)
    left = request["kill_at"]

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if left is not None and event in FILE_EVENTS and not _other(event, arguments):
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    if request["hold"] is not None:
        _hold(*request["hold"])
    status = 1
    try:
        status = rsm_train(request["argv"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _hold(step: int, file: str) -> None:
    """Have a training wait after a step until the file is there."""
    from rsm_train.run.learner import Learner

    collect = Learner.collect

    def held(self: Learner) -> None:
        collect(self)
        for _ in range(100 * HANG_S if self.step >= step else 0):
            if Path(file).exists():
                break
            time.sleep(0.01)

    Learner.collect = held  # type: ignore[method-assign]


def _other(event: str, arguments: tuple[Any, ...]) -> bool:
    """TensorBoard's, which opens its file for every record; reading; a file object around an open file."""
    opened = event == "open" and (isinstance(arguments[0], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR))
    return opened or "tensorboard" in str(arguments[0])


if __name__ == "__main__":
    main()
