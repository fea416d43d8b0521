"""The commands as a user runs them: real processes, exit statuses, one sentence per mistake."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest

from rsm_common.errors import BundleError, ConfigError, NotReadyError
from rsm_serve.client import PolicyClient
from rsm_serve.commands import client_cli
from rsm_serve.commands import serve_cli as cli
from rsm_serve.config import ServerConfig
from rsm_serve.engine.lane import Selection
from rsm_serve.local import open_policy
from rsm_serve.server import background_server
from tests.bundles import make_spec, write_bundle
from tests.hang import HANG_S

READY = re.compile(r"rsm-serve ready: address=(\S+) policies=(\S+)\n")


@contextlib.contextmanager
def serving(arguments: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """(process, address, policies) of a real rsm-serve."""
    with started([sys.executable, "-m", "rsm_serve.commands.serve_cli", *arguments]) as found:
        yield found


@contextlib.contextmanager
def started(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """(process, address, policies) of a command that starts rsm-serve."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = READY.fullmatch(line)
            assert match, (line, process.poll() is not None and process.stderr and process.stderr.read())
            yield process, match[1], match[2]
        finally:
            process.kill()


def npy(header: str) -> bytes:
    """A .npy file with the header, and no data."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(4))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def address(bundle_repo):
    with background_server(ServerConfig(repo=bundle_repo, addresses=("127.0.0.1:0",))) as server:
        yield server.addresses[0]


def test_serving_a_repository_until_sigterm(own_repo):
    write_bundle(own_repo, make_spec("tiny", "2"))
    write_bundle(own_repo, make_spec("other", "1"))
    local = open_policy(own_repo / "tiny")
    with serving(["--repo", str(own_repo), "--address", "127.0.0.1:0"]) as (process, address, policies):
        assert policies == "other:1,tiny:2"
        refused: list[Exception] = []
        stepped = threading.Event()
        client = PolicyClient(address, policy="tiny", timeout_s=HANG_S)

        def control_loop() -> None:
            seed = 0
            try:
                while True:
                    answer = client.act(np.ones(4), seed=seed)
                    assert np.allclose(answer.action, local.act(np.ones(4), seed=seed).action, atol=1e-6)
                    seed += 1
                    stepped.set()
            except Exception as error:
                refused.append(error)

        thread = threading.Thread(target=control_loop)
        thread.start()
        assert stepped.wait(HANG_S)
        process.send_signal(signal.SIGTERM)
        output, log = process.communicate(timeout=HANG_S)
        thread.join(HANG_S)
        client.close()
    assert process.returncode == 0, log
    assert output == ""  # the ready line was the only one
    assert "drained" in log
    assert "Traceback" not in log
    # Every step was answered rightly until the server refused, in its own words or by being gone.
    assert [type(error) for error in refused] == [NotReadyError]


def test_a_server_that_waits_for_its_first_policy_says_that_it_listens(tmp_path):
    command = [sys.executable, "-m", "rsm_serve.commands.serve_cli", "--repo", str(tmp_path), "--poll", "1"]
    command += ["--address", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.fullmatch(r"rsm-serve ready: address=(\S+) policies=\n", line)
            assert match, line
            assert client_cli.main(["health", "--address", match[1], "--timeout", str(HANG_S)]) == 1
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=HANG_S)
        finally:
            process.kill()
    assert process.returncode == 0, log


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_backend_is_chosen_and_named_in_the_log(bundle_repo, backend):
    pytest.importorskip(backend)
    arguments = ["--repo", str(bundle_repo), "--address", "127.0.0.1:0", "--backend", backend]
    with serving(arguments) as (process, address, _), PolicyClient(address) as client:
        assert client.act(np.zeros(4)).action.shape == (2,)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=HANG_S)
    assert re.search(rf"loaded tiny version 1 in .* s: {backend} [\d.]+, CPU\n", log)
    assert process.returncode == 0, log


def test_the_http_port_ends_the_ready_line_and_the_log_is_json(own_repo):
    command = [
        sys.executable,
        "-m",
        "rsm_serve.commands.serve_cli",
        "--repo",
        str(own_repo),
        "--log-format",
        "json",
    ]
    command += ["--address", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            ready = r"rsm-serve ready: address=(\S+) policies=tiny:1 http=(127\.0\.0\.1:\d+)\n"
            match = re.fullmatch(ready, line)
            assert match, line
            with PolicyClient(match[1], timeout_s=HANG_S) as client:
                client.act(np.full(4, 123.456))
            with urllib.request.urlopen(f"http://{match[2]}/healthz", timeout=HANG_S) as answer:
                assert answer.read() == b"serving\n"
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=HANG_S)
        finally:
            process.kill()
    assert process.returncode == 0, log
    lines = [json.loads(text) for text in log.splitlines()]
    (loaded,) = (entry for entry in lines if entry["message"].startswith("loaded tiny"))
    assert (loaded["level"], loaded["policy"], loaded["version"]) == ("INFO", "tiny", "1")
    assert lines[-1]["message"] == "drained"
    assert "123.4" not in log


def test_a_flood_of_malformed_messages_does_not_fill_the_log(bundle_repo):
    arguments = ["--repo", str(bundle_repo), "--address", "127.0.0.1:0"]
    with serving(arguments) as (process, address, _), grpc.insecure_channel(address) as channel:
        act = channel.unary_unary("/rsm.v1.PolicyService/Act")
        for _ in range(200):
            with pytest.raises(grpc.RpcError):
                act(b"\xff\xff", timeout=HANG_S)
        with PolicyClient(address, timeout_s=HANG_S) as client:
            assert client.act(np.zeros(4)).action.shape == (2,)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=HANG_S)
    assert "Traceback" not in log
    assert len(log) < 1000


def test_an_interrupt_while_loading_ends_an_observed_server_at_once(bundle_repo):
    code = (
        "import sys, time; from rsm_serve import server; from rsm_serve.commands import serve_cli as cli\n"
        "def load(*_): print('loading', flush=True); time.sleep(1e6)\n"
        "server.load_repository = load\n"
        f"sys.exit(cli.main(['--repo', {str(bundle_repo)!r}, '--http', '127.0.0.1:0']))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "loading\n"
            process.send_signal(signal.SIGINT)
            output, log = process.communicate(timeout=HANG_S)
        finally:
            process.kill()
    assert (process.returncode, output, log) == (130, "", "rsm-serve: interrupted\n")


@pytest.mark.parametrize("first", [False, True], ids=["a process", "the first process"])
@pytest.mark.parametrize("http", [(), ("--http", "127.0.0.1:0")], ids=["alone", "observed"])
def test_sigterm_while_loading_ends_the_server(bundle_repo, first, http):
    """The first process of a container has no default action for SIGTERM; it was loaded, and served."""
    own_pids = ["unshare", "--fork", "--pid", "--kill-child"] if first else []
    if first and (
        shutil.which("unshare") is None or subprocess.run([*own_pids, "true"], check=False).returncode
    ):
        pytest.skip("processes with numbers of their own need Linux, util-linux and the right to unshare")
    code = (
        "import sys, time; from rsm_serve import server; from rsm_serve.commands import serve_cli as cli\n"
        "def load(*_): print('loading', flush=True); time.sleep(1e6)\n"
        "server.load_repository = load\n"
        f"sys.exit(cli.main(['--repo', {str(bundle_repo)!r}, *{http!r}]))"
    )
    command = [*own_pids, sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "loading\n"
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            os.kill(int(children.read_text()) if first else process.pid, signal.SIGTERM)
            output, log = process.communicate(timeout=HANG_S)
        finally:
            process.kill()
    assert (process.returncode, output, log) == (143 if first else -signal.SIGTERM, "", "")


def test_a_policy_that_does_not_load_ends_an_observed_server_with_a_sentence(own_repo):
    (own_repo / "tiny" / "1" / "model.onnx").write_bytes(b"damaged")
    command = [
        sys.executable,
        "-m",
        "rsm_serve.commands.serve_cli",
        "--repo",
        str(own_repo),
        "--http",
        "127.0.0.1:0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "truncated" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_backend_names_its_extra(monkeypatch, capsys, bundle_repo):
    find_spec = importlib.util.find_spec
    gone = ("openvino", "onnxruntime", "tensorrt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in gone else find_spec(name))
    for backend, extra in (("auto", "serve"), ("openvino-bf16", "serve-openvino"), ("tensorrt", "serve-gpu")):
        assert cli.main(["--repo", str(bundle_repo), "--backend", backend]) == 2
        assert capsys.readouterr().err.startswith(f'rsm-serve needs: pip install "rsm-toolkit[{extra}]"')


def test_a_second_server_on_the_port_fails_and_the_first_goes_on(bundle_repo):
    arguments = ["--repo", str(bundle_repo), "--address"]
    with serving([*arguments, "127.0.0.1:0"]) as (_, address, _policies), PolicyClient(address) as client:
        second = subprocess.run(
            [sys.executable, "-m", "rsm_serve.commands.serve_cli", *arguments, address],
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )
        assert second.returncode == 2
        assert second.stdout == ""
        sentence = second.stderr.splitlines()[-1]
        assert sentence.startswith(f"rsm-serve: wanted to listen on {address}, but the port is in use")
        assert "Traceback" not in second.stderr
        assert client.act(np.zeros(4), seed=1).seed == 1


def test_without_the_server_extra_one_sentence(monkeypatch, capsys, bundle_repo):
    monkeypatch.setitem(sys.modules, "grpc_health", None)
    monkeypatch.delitem(sys.modules, "grpc_health.v1", raising=False)
    assert cli.main(["--repo", str(bundle_repo)]) == 2
    assert capsys.readouterr().err.startswith('rsm-serve needs: pip install "rsm-toolkit[serve]"')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repo", "{tmp}/nothing"], "not a directory"),
        (["--repo", "{tmp}"], "at least one policy"),
        (["--repo", "{repo}", "--policy", "nope"], "wanted policy 'nope'.*got tiny"),
        (["--repo", "{repo}", "--policy", "tiny:7"], "version 7.*got 1"),
        (["--repo", "{repo}", "--policy", "tiny:x"], "NAME:VERSION"),
        (["--repo", "{repo}", "--policy", "../x"], "policy name"),
        (["--repo", "{repo}", "--address", "nonsense"], "wanted an address"),
        (["--repo", "{repo}", "--max-batch-size", "0"], "max_batch_size >= 1"),
        (["--repo", "{repo}", "--backend", "abacus"], "abacus"),
        (["--repo", "{repo}", "--surprise"], "surprise"),
        ([], "--repo"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(arguments, message, bundle_repo, tmp_path, capsys):
    filled = [text.format(tmp=tmp_path, repo=bundle_repo) for text in arguments]
    assert cli.main(filled) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(message, captured.err)
    assert "Traceback" not in captured.err


def test_a_bundle_at_the_wrong_place_is_refused(own_repo, capsys):
    (own_repo / "tiny").rename(own_repo / "renamed")
    assert cli.main(["--repo", str(own_repo), "--address", "127.0.0.1:0"]) == 2
    assert "policy.json of 'tiny'" in capsys.readouterr().err


def test_help_has_sections_and_two_examples_of_real_options(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for section in ("Connection", "Policies and versions", "Security", "Inference", "Batching", "Limits"):
        assert f"\n{section}:\n" in text
    examples = text[text.index("Examples:") :]
    assert examples.count("  rsm-serve ") == 2
    options = set(re.findall(r"--[a-z-]+", examples))
    assert options <= set(re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE))


def test_a_field_keeps_its_place_whatever_group_it_is_in():
    config = ServerConfig.from_options(
        Path("x"), max_batch_size=8, record=Path("r"), processes=2, tls_cert=None
    )
    assert (config.batching.max_batch_size, config.recording.directory, config.process.count) == (
        8,
        Path("r"),
        2,
    )
    with pytest.raises(TypeError, match="max_batch"):
        ServerConfig.from_options(Path("x"), max_batch=8)


def test_selections_and_configurations():
    assert Selection.parse("a-b.c") == Selection("a-b.c", None)
    assert Selection.parse("a:12") == Selection("a", 12)
    for text in ("a:", "a:0", "a:-1", "a:1.5", "a:²"):
        with pytest.raises(BundleError):
            Selection.parse(text)
    for change in ({"threads": 0}, {"drain_seconds": -1.0}, {"addresses": ()}, {"max_queue_delay_us": -1}):
        with pytest.raises(ConfigError):
            ServerConfig.from_options(repo="x", **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        *({"drain_seconds": value} for value in (math.nan, math.inf, 1e10)),
        *({"poll": value} for value in (math.nan, math.inf, 1e300)),
        *({"max_rate": value} for value in (math.nan, math.inf)),
        *({"max_action_step": value} for value in (math.nan, math.inf)),
        *({"max_queue_delay_us": value} for value in (10**11, 10**400)),
        *({"max_connections": value} for value in (2**31, 10**400)),
        {"max_calls_per_connection": 2**31},
        {"max_streams": 2**31},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_number_that_nothing_can_count_or_wait_for_is_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        ServerConfig.from_options(repo=Path("x"), **change)
    ServerConfig.from_options(repo=Path("x"), drain_seconds=86_400.0, poll=86_400.0, max_connections=2**31 - 1)


class TestClient:
    def run(self, capsys, *arguments):
        status = client_cli.main(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    def test_info(self, capsys, address):
        status, out, _ = self.run(capsys, "info", "--address", f"grpc://{address}/tiny")
        assert status == 0
        assert json.loads(out)["server"]["max_batch_size"] == 64
        assert json.loads(out)["noise_shape"] == [3, 2, 2]

    def test_act_and_replay(self, capsys, address, bundle_repo, tmp_path):
        status, out, _ = self.run(capsys, "act", "--address", address, "--obs", "1,2,-3,0.5")
        first = json.loads(out)
        assert status == 0
        status, out, _ = self.run(
            capsys, "act", "--address", address, "--obs", "1,2,-3,0.5", "--seed", first["seed"]
        )
        assert json.loads(out)["action"] == first["action"]
        expected = open_policy(bundle_repo / "tiny").act([1, 2, -3, 0.5], seed=int(first["seed"]))
        assert np.allclose(first["action"], expected.action, atol=1e-6)
        np.save(tmp_path / "obs.npy", np.zeros((3, 4)))
        status, out, _ = self.run(
            capsys, "act", "--address", address, "--obs-file", str(tmp_path / "obs.npy"), "--deterministic"
        )
        assert np.shape(json.loads(out)["action"]) == (3, 2)

    def test_health(self, capsys, address):
        assert self.run(capsys, "health", "--address", address, "--timeout", str(HANG_S))[:2] == (
            0,
            "SERVING\n",
        )
        status, out, _ = self.run(
            capsys, "health", "--address", address, "--policy", "x", "--timeout", str(HANG_S)
        )
        assert (status, out) == (1, "SERVICE_UNKNOWN\n")

    def test_bench(self, capsys, address):
        arguments = ("bench", "--address", address, "--steps", "20", "--warm-up", "2")
        status, out, _ = self.run(capsys, *arguments, "--json")
        report = json.loads(out)
        assert status == 0
        for mode in ("act", "stream"):
            assert report[mode]["total"]["p99_us"] >= report[mode]["total"]["p50_us"] > 0
            assert report[mode]["compute"]["p50_us"] > 0
        status, out, _ = self.run(capsys, *arguments)
        assert "network" in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["act", "--obs", "1,2"], r"got \[2\]"),
            (["act", "--obs", "1,x"], "wanted numbers"),
            (["act", "--obs", "1,2,3,nan"], "finite"),
            (["act", "--obs-file", "nothing.npy"], "wanted a .npy file"),
            (["act", "--obs-file", os.devnull], "wanted a .npy file"),
            (["act", "--obs", "1,2,3,4", "--obs-file", "x"], "got both"),
            (["act", "--seed", "-1"], "seed"),
            (["act", "--policy", "nope"], "'nope'"),
            (["act", "--policy", "x\udc80"], r"UTF-8, got 'x\\udc80'"),
            (["info", "--version", "\udc80"], r"UTF-8, got '\\udc80'"),
            (["health", "--policy", "\udc80"], r"UTF-8, got '\\udc80'"),
            (["act", "--client-id", "\udc80"], r"UTF-8, got '\\udc80'"),
            (["health", "--timeout", "nan"], "timeout_s"),
            (["act", "--seed", "1", "--deterministic"], "got both"),
        ],
    )
    def test_a_mistake_is_one_sentence_and_status_2(self, capsys, address, arguments, message):
        status, out, err = self.run(capsys, *arguments, "--address", address)
        assert (status, out) == (2, "")
        assert re.search(message, err)
        assert "Traceback" not in err

    def test_an_address_that_is_not_utf_8(self, capsys):
        status, out, err = self.run(capsys, "act", "--address", "x\udc80:1")
        assert (status, out) == (2, "")
        assert r"got 'x\udc80:1'" in err

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"PK\x03\x04junk", "not a zip file"),
            (
                npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,)}"),
                "nable to allocate",
            ),
            (npy("(" * 9000), "."),
            (npy("-" * 9500 + "1"), "."),
            (npz(), "an archive of arrays"),
        ],
        ids=["zip", "shape", "parentheses", "nesting", "npz"],
    )
    def test_a_damaged_file_of_observations(self, capsys, address, content, reason, tmp_path):
        (tmp_path / "obs.npy").write_bytes(content)
        status, out, err = self.run(
            capsys, "act", "--address", address, "--obs-file", str(tmp_path / "obs.npy")
        )
        assert (status, out) == (2, "")
        assert re.fullmatch(rf"rsm-client: wanted a .npy file of numbers, got '.*' \(.*{reason}.*\); .*\n", err)

    @pytest.mark.parametrize("name", ["info", "act", "health", "bench"])
    def test_the_timeout_is_that_of_connecting_too(self, capsys, name):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            status, _, err = self.run(capsys, name, "--address", address, "--timeout", "0.2")
        assert status == 2
        assert f"no answer from {address} within 0.2 s" in err

    def test_no_server(self, capsys, one_attempt):
        for name in ("info", "act", "health", "bench"):
            status, out, err = self.run(capsys, name, "--address", "127.0.0.1:1", "--timeout", str(HANG_S))
            assert (status, out) == (2, "")
            assert "127.0.0.1:1" in err
            assert "rsm-serve" in err
