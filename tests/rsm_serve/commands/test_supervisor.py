"""`rsm-serve --processes`: real processes that share a port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rsm_common.errors import AddressError, ConfigError
from rsm_serve.addresses import check_free
from rsm_serve.client import PolicyClient
from rsm_serve.commands import serve_cli as cli
from rsm_serve.commands.supervisor import reserved
from rsm_serve.config import ServerConfig
from rsm_serve.local import open_policy
from rsm_serve.recording.format import read
from tests.hang import HANG_S
from tests.server_process import ServerProcess, running_server, samples, wait_until

COMMAND = [sys.executable, "-m", "rsm_serve.commands.serve_cli", "--address", "127.0.0.1:0"]


@pytest.fixture
def served(bundle_repo, tmp_path) -> Iterator[ServerProcess]:
    """Two processes behind one port."""
    with running_server(bundle_repo, tmp_path / "log", "--processes", "2") as served:
        yield served


def server_pids(main: subprocess.Popen[str]) -> list[int]:
    """Of the server processes, which the main one has started."""
    pids = map(int, Path(f"/proc/{main.pid}/task/{main.pid}/children").read_text().split())
    return [pid for pid in pids if b"resource_tracker" not in command_of(pid)]


def command_of(pid: int) -> bytes:
    """Empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def https(served: ServerProcess) -> list[str]:
    """The HTTP port of each process."""
    return served.http.split(",")


def answered(http: str) -> float:
    """Rows that the process with that HTTP port has answered."""
    with urllib.request.urlopen(f"http://{http}/metrics", timeout=HANG_S) as page:
        values = samples(page.read().decode())
    return sum(value for key, value in values.items() if key.startswith("rsm_rows_total"))


def ask(address: str, obs: np.ndarray, seed: int) -> np.ndarray:
    """By a connection of its own."""
    with PolicyClient(address, timeout_s=HANG_S) as client:
        return client.act(obs, seed=seed).action


def test_all_processes_answer_the_same(served, bundle_repo):
    obs = np.array([1, -2, 0.5, 3], np.float32)
    expected = open_policy(bundle_repo / "tiny").act(obs, seed=7).action
    pids = server_pids(served.process)
    assert len(pids) == 2
    for _ in range(40):  # the chance that one process gets none of them is 2 in 2**40
        assert np.allclose(ask(served.address, obs, 7), expected, atol=1e-6)
    counts = [answered(http) for http in https(served)]
    assert min(counts) > 0
    assert sum(counts) == 40
    served.process.terminate()
    assert served.process.wait(HANG_S) == 0
    assert not any(map(command_of, pids))


def test_a_process_that_dies_is_replaced(served):
    before = server_pids(served.process)
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: len(set(server_pids(served.process)) - set(before)) == 1, "another process")
    assert before[1] in server_pids(served.process)
    survivor = next(http for http in https(served) if serves(http))

    def the_new_one_answers() -> bool:
        already = answered(survivor)
        for seed in range(10):
            ask(served.address, np.zeros(4, np.float32), seed)
        return answered(survivor) - already < 10

    wait_until(the_new_one_answers, "answers of the new process")
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(HANG_S) == 0
    assert f"process {before[0]} died" in served.log


def serves(http: str) -> bool:
    """Whether something answers there."""
    try:
        answered(http)
    except OSError:
        return False
    return True


def test_processes_end_when_the_main_one_is_killed(bundle_repo):
    command = [*COMMAND, "--repo", str(bundle_repo), "--processes", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("rsm-serve ready")
        pids = server_pids(process)
        assert len(pids) == 2
        process.kill()
        wait_until(lambda: not any(map(command_of, pids)), "the end of the processes")


def test_a_second_server_on_the_port_is_refused(served, bundle_repo, capsys):
    for more in ([], ["--processes", "2"]):
        assert cli.main(["--repo", str(bundle_repo), "--address", served.address, *more]) == 2
        assert "the port is in use" in capsys.readouterr().err


def test_a_port_is_taken_from_the_start_and_between_the_servers():
    """While none of them listens: another server that shares ports would be let in."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with reserved(address) as same:
        assert same == address
        with pytest.raises(AddressError, match="the port is in use"), reserved(address):
            pass
    check_free(address)


def test_what_all_processes_recorded_is_read(bundle_repo, tmp_path):
    # 3: the share of each is below their number, which nobody may mistake for the limit of all.
    options = ("--processes", "2", "--record", str(tmp_path / "records"), "--record-max-mb", "3")
    with running_server(bundle_repo, tmp_path / "log", *options) as served:
        for seed in range(20):
            ask(served.address, np.zeros(4, np.float32), seed)
    reader = read(tmp_path / "records")
    assert sorted(record.seeds[0] for record in reader if record.seeds is not None) == list(range(20))
    assert reader.unreadable == 0


def test_what_is_wrong_is_said_once(own_repo):
    (own_repo / "tiny" / "1" / "model.onnx").write_bytes(b"no graph")
    command = [*COMMAND, "--repo", str(own_repo), "--processes", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)
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
        (
            {"processes": 3, "record": Path("x"), "record_max_mb": 2},
            "at least 1 for each of 3 processes, got 2",
        ),
    ],
)
def test_what_processes_cannot_share_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ServerConfig.from_options(repo=Path("x"), **options)
