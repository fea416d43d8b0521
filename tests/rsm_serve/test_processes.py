"""`rsm-serve --processes`: real processes that share a port."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from rsm_serve import cli
from rsm_serve.client import PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.errors import ConfigError
from rsm_serve.local import open_policy

READY = re.compile(r"rsm-serve ready: address=(\S+) policies=(\S+) http=(\S+)\n")


class Fleet:
    """A real `rsm-serve --processes`."""

    def __init__(self, process: subprocess.Popen[str], address: str, https: list[str]) -> None:
        self.process, self.address, self.https = process, address, https

    @property
    def pids(self) -> list[int]:
        """Of the server processes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        pids = [int(text) for text in children.read_text().split()]
        return [pid for pid in pids if b"resource_tracker" not in _command(pid)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it is gone
        return b""


def wait_until(holds: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end_s, f"waited for {what}"
        time.sleep(0.05)


@contextlib.contextmanager
def fleet(repo, *options: str) -> Iterator[Fleet]:
    arguments = ["--repo", str(repo), "--address", "127.0.0.1:0", "--http", "127.0.0.1:0", "--processes", "2"]
    command = [sys.executable, "-m", "rsm_serve.cli", *arguments, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            match = READY.fullmatch(process.stdout.readline())
            assert match
            yield Fleet(process, match[1], match[3].split(","))
        finally:
            process.kill()


def ask(address: str, obs: np.ndarray, seed: int) -> np.ndarray:
    """By a connection of its own."""
    with PolicyClient(address, timeout_s=30) as client:
        return client.act(obs, seed=seed).action


def answered(http: str) -> int:
    """Requests that the process with that HTTP port has answered."""
    with urllib.request.urlopen(f"http://{http}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("rsm_rows_total"))


def test_all_processes_answer_the_same(bundle_repo):
    obs = np.array([1, -2, 0.5, 3], np.float32)
    expected = open_policy(bundle_repo / "tiny").act(obs, seed=7).action
    with fleet(bundle_repo) as served:
        pids = served.pids
        for _ in range(40):  # the chance that one process gets none of them is 2 in 2**40
            assert np.allclose(ask(served.address, obs, 7), expected, atol=1e-6)
        counts = [answered(http) for http in served.https]
        assert min(counts) > 0
        assert sum(counts) == 40
        assert len(pids) == 2
        served.process.terminate()
        assert served.process.wait(30) == 0
        assert not any(_command(pid) for pid in pids)


def test_a_process_that_dies_is_replaced(bundle_repo):
    with fleet(bundle_repo) as served:
        before = served.pids
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: len(set(served.pids) - set(before)) == 1, "another process")
        assert before[1] in served.pids
        survivor = next(http for http in served.https if serves(http))

        def the_new_one_answers() -> bool:
            already = answered(survivor)
            for seed in range(10):
                ask(served.address, np.zeros(4, np.float32), seed)
            return answered(survivor) - already < 10

        wait_until(the_new_one_answers, "answers of the new process")
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(30) == 0
        assert served.process.stderr is not None
        assert f"process {before[0]} died" in served.process.stderr.read()


def serves(http: str) -> bool:
    """Whether something answers there."""
    try:
        answered(http)
    except OSError:
        return False
    return True


def test_processes_end_when_the_main_one_is_killed(bundle_repo):
    with fleet(bundle_repo) as served:
        pids = served.pids
        assert len(pids) == 2
        served.process.kill()
        wait_until(lambda: not any(_command(pid) for pid in pids), "the end of the processes")


def test_a_second_server_on_the_port_is_refused(bundle_repo, capsys):
    with fleet(bundle_repo) as served:
        for more in ([], ["--processes", "2"]):
            assert cli.main(["--repo", str(bundle_repo), "--address", served.address, *more]) == 2
            assert "the port is in use" in capsys.readouterr().err


def test_what_is_wrong_is_said_once(own_repo):
    (own_repo / "tiny" / "1" / "model.onnx").write_bytes(b"no graph")
    command = [sys.executable, "-m", "rsm_serve.cli", "--repo", str(own_repo), "--address", "127.0.0.1:0"]
    done = subprocess.run([*command, "--processes", "3"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("rsm-serve: bundle") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "processes >= 1"),
        ({"processes": 2, "addresses": ("unix:/tmp/x",)}, "unix socket"),
        ({"processes": 2, "admin_token_file": "x"}, "--poll"),
    ],
)
def test_what_processes_cannot_share_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ServerConfig(repo=Path("x"), **options)
