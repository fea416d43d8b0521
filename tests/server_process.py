"""A real `rsm-serve` process as its operating system and its own metrics see it; reads Linux's accounts."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.hang import HANG_S

READY = re.compile(r"rsm-serve ready: address=(\S+) policies=(\S+) http=(\S+)\n")


@dataclass(frozen=True)
class ServerProcess:
    """A server that serves."""

    process: subprocess.Popen[str]
    address: str
    http: str
    log_file: Path

    @property
    def rss_bytes(self) -> int:
        """Memory that is resident."""
        return int(self._proc("statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @property
    def threads(self) -> int:
        """Threads of the process."""
        return len(list(self._proc("task").iterdir()))

    @property
    def open_files(self) -> int:
        """Open file descriptors, sockets among them."""
        return len(list(self._proc("fd").iterdir()))

    @property
    def log(self) -> str:
        """What it wrote to stderr."""
        return self.log_file.read_text(errors="backslashreplace")

    def metrics(self) -> dict[str, float]:
        """Values by name and labels, such as 'rsm_rows_total{policy=tiny,version=1}'."""
        return samples(self.get("/metrics")[1])

    def metric(self, name: str, *labels: str) -> float:
        """The sum of a metric over all series that have the labels, such as 'code=OK'."""
        return sum(
            value
            for key, value in self.metrics().items()
            if key.startswith(name + "{")
            and all(label in key[:-1].split("{")[1].split(",") for label in labels)
        )

    def get(self, path: str) -> tuple[int, str]:
        """(status, body) of a GET request to the HTTP port."""
        try:
            with urllib.request.urlopen(f"http://{self.http}{path}", timeout=HANG_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def _proc(self, what: str) -> Path:
        return Path(f"/proc/{self.process.pid}/{what}")


def samples(text: str) -> dict[str, float]:
    """Prometheus samples as {name{label=value,...}: value}, labels in alphabetical order."""
    return {
        sample.name + "{" + ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items())) + "}": sample.value
        for family in parse_text(text)
        for sample in family.samples
    }


@contextlib.contextmanager
def running_server(repository: Path, log_file: Path, *arguments: str) -> Iterator[ServerProcess]:
    """A server on free ports; is told to stop at the end, and must then stop cleanly."""
    command = [
        sys.executable,
        "-m",
        "rsm_serve.commands.serve_cli",
        "--repo",
        str(repository),
        "--backend",
        "onnxruntime",
    ]
    command += ["--address", "127.0.0.1:0", "--http", "127.0.0.1:0", *arguments]
    with (
        log_file.open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = READY.fullmatch(line)
            assert match, (line, log_file.read_text())
            yield ServerProcess(process, match[1], match[3], log_file)
            process.terminate()
            assert process.wait(HANG_S) == 0, log_file.read_text()
        finally:
            process.kill()


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = HANG_S) -> None:
    """Wait for something that happens elsewhere."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.01)
