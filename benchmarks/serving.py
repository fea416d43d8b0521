"""Compare `rsm-serve` with an echo on the same stack, with the bare graph, and with other policy servers.

    python benchmarks/serving.py [--only SECTION]... [--peer-python PATH] [--out FILE]

The graph is HalfCheetah's size with T = 20 and one particle (n1) or 32 (n32), random weights, on one thread.
Load comes from a process of its own (`load.py`) that sends prepared messages; the servers of one section run in
the same minutes, and everything shares the machine's cores.

latency   one client: unary and stream, interleaved with the floors: an echo (`echo_server.py`), and an echo
          that runs the graph, which is the least that a server of this graph can take on this machine; with
          prepared messages on both sides, with `PolicyClient`, and with gRPC's older listener
clients   64 clients, closed loop, with the cores' time that each side spent per message
n32       64 clients of the best-of-32 graph, against the session's own rows per second
load      latency against load, open loop; with --peer-python also PyTriton and LitServe (`peers/`)
start     from the command to READY, five times
streams   10,000 idle streams: memory, and the latency of one client that works beside them
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from random_policy import ACTION_SIZE, OBS_SIZE, make_spec, publish
from record import write_record

from rsm_serve.client import PolicyClient
from rsm_serve.local import open_policy
from rsm_serve.pb import oip_pb2
from rsm_serve.pb import policy_pb2 as pb

HERE = Path(__file__).parent
STEPS = 20
CLIENTS = 64
IDLE_STREAMS = 10_000
STREAM = "/rsm.v1.PolicyService/ActStream"
UNARY = "/rsm.v1.PolicyService/Act"
INFER = "/inference.GRPCInferenceService/ModelInfer"
OLDER_LISTENER = {"GRPC_EXPERIMENTS": "-event_engine_listener"}
"""One thread less between the socket and the event loop."""
LOADS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9)
"""Shares of what a server answers in a closed loop."""
PEERS = {"PyTriton": "pytriton_server.py", "LitServe": "litserve_server.py"}


@dataclass(frozen=True)
class Server:
    """A server process."""

    process: subprocess.Popen[str]
    address: str

    @property
    def rss_mb(self) -> float:
        """Resident memory of the main process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    @property
    def cpu_s(self) -> float:
        """User and system time of all threads, of its child processes too."""
        return sum(map(_cpu_s, _family(self.process.pid)))


def _family(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from _family(int(child))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def started(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run a server until the end of the block; the server prints its address."""
    process = subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, **(environment or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        found = next(found for line in process.stdout if (found := re.search(r"address=(\S+)", line)))
        yield Server(process, found[1])
    finally:
        process.terminate()
        process.wait(60)
        with contextlib.suppress(ProcessLookupError):  # what it has left behind: LitServe's busy workers
            os.killpg(process.pid, signal.SIGKILL)


def rsm_serve(
    repository: Path, policy: str, *options: str, environment: Mapping[str, str] | None = None
) -> contextlib.AbstractContextManager[Server]:
    """`rsm-serve` with one policy, on any free port."""
    arguments = ["--repo", str(repository), "--policy", policy, "--address", "127.0.0.1:0", *options]
    return started([sys.executable, "-m", "rsm_serve.commands.serve_cli", *arguments], environment)


def echo(*options: str | Path) -> contextlib.AbstractContextManager[Server]:
    """Run the echo server, the floor."""
    return started([sys.executable, HERE / "echo_server.py", *options])


def act_message(policy: str) -> bytes:
    """One row, whose seed the server draws."""
    obs = np.zeros(OBS_SIZE, np.float32)
    content: bytes = pb.ActRequest(policy=policy, rows=1, obs=obs.tobytes()).SerializeToString()
    return content


def infer_message(policy: str) -> bytes:
    """The same in the Open Inference Protocol."""
    request = oip_pb2.ModelInferRequest(model_name=policy)
    request.inputs.add(name="obs", datatype="FP32", shape=[1, OBS_SIZE])
    request.raw_input_contents.append(np.zeros(OBS_SIZE, np.float32).tobytes())
    content: bytes = request.SerializeToString()
    return content


def load(server: Server, method: str, message: bytes, seconds: float, *options: str) -> dict[str, Any]:
    """Run `load.py`; returns its result and the CPU microseconds that each side spent per answer."""
    with tempfile.NamedTemporaryFile() as payload:
        payload.write(message)
        payload.flush()
        arguments = ["--address", server.address, "--method", method, "--payload", payload.name]
        before_s = server.cpu_s
        done = subprocess.run(
            [sys.executable, HERE / "load.py", *arguments, "--seconds", str(seconds), *options],
            stdout=subprocess.PIPE,
            check=True,
        )
    report: dict[str, Any] = json.loads(done.stdout)
    per_answer = 1e6 / max(1, report["answers_in_all"])
    report["server_cpu_us"] = round(per_answer * (server.cpu_s - before_s), 1)
    report["generator_cpu_us"] = round(per_answer * report.pop("generator_cpu_s"), 1)
    return report


def measure_latency(repository: Path, rounds: int, steps: int = 300) -> dict[str, Any]:
    """Measure the latency of one client."""
    local = open_policy(repository / "n1")
    obs, message = np.zeros(OBS_SIZE, np.float32), act_message("n1")
    with contextlib.ExitStack() as stack:
        floor = stack.enter_context(echo())
        computing = stack.enter_context(echo("--bundle", repository / "n1" / "1"))
        server = stack.enter_context(rsm_serve(repository, "n1"))
        older = stack.enter_context(rsm_serve(repository, "n1", environment=OLDER_LISTENER))
        client = stack.enter_context(PolicyClient(server.address, timeout_s=10))
        stream = stack.enter_context(client.stream())
        calls: dict[str, Callable[[], object]] = {}
        for name, other in (
            ("echo", floor),
            ("computing_echo", computing),
            ("raw", server),
            ("older_listener", older),
        ):
            channel = stack.enter_context(grpc.insecure_channel(other.address))
            calls[f"{name}_unary"] = _unary(channel, message)
            calls[f"{name}_stream"] = _stream(channel, message)
        calls |= {
            "act": lambda: client.act(obs),
            "act_stream": lambda: stream.act(obs),
            "in_process": lambda: local.act(obs),
        }
        times = interleaved(calls, rounds, steps)
        compute_us = statistics.median(stream.act(obs).timing.compute_us for _ in range(steps))
    report: dict[str, Any] = {name: percentiles(values) for name, values in times.items()}
    report["compute_p50_us"] = round(compute_us, 1)
    for name in times:
        if name == "in_process" or "echo" in name:
            continue
        kind = "stream" if name.endswith("stream") else "unary"
        p50_us = report[name]["p50_us"]
        report[f"{name}_over_echo_and_compute_us"] = round(
            p50_us - report[f"echo_{kind}"]["p50_us"] - compute_us, 1
        )
        report[f"{name}_over_computing_echo_us"] = round(p50_us - report[f"computing_echo_{kind}"]["p50_us"], 1)
        report[f"{name}_p99_of_p50"] = round(report[name]["p99_us"] / p50_us, 2)
    return report


def _unary(channel: grpc.Channel, message: bytes) -> Callable[[], object]:
    call = channel.unary_unary(UNARY)
    return lambda: call(message, timeout=10)


def _stream(channel: grpc.Channel, message: bytes) -> Callable[[], object]:
    import queue

    requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    responses = channel.stream_stream(STREAM)(iter(requests.get, None))

    def step() -> object:
        requests.put(message)
        return next(responses)

    return step


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, steps: int) -> dict[str, list[float]]:
    """Microseconds of each call; the calls take turns of `steps`, and the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 1):
        for name, call in calls.items():
            for _ in range(steps):
                begun_s = time.perf_counter()
                call()
                if round_number:
                    times[name].append(1e6 * (time.perf_counter() - begun_s))
    return times


def percentiles(times_us: Sequence[float]) -> dict[str, float]:
    return {f"p{p}_us": round(float(np.percentile(times_us, p)), 1) for p in (50, 90, 99)}


def rows_per_s(bundle: Path, rows: int, seconds: float = 2.0) -> float:
    """Rows per second of the session alone, in batches of `rows`, with drawing the noise."""
    policy = open_policy(bundle)
    obs_BO = np.zeros((rows, OBS_SIZE), np.float32)
    policy.act(obs_BO)
    times_s = []
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        timing = policy.act(obs_BO).timing
        times_s.append(1e-6 * timing.compute_us)
    return rows / statistics.median(times_s)


def measure_clients(repository: Path, seconds: float) -> dict[str, Any]:
    """Measure many clients: the reached share of the floor's and of the graph's own throughput."""
    report: dict[str, Any] = {}
    message, clients = act_message("n1"), ("--clients", str(CLIENTS))
    with echo() as floor, rsm_serve(repository, "n1") as server:
        for kind, method in (("stream", STREAM), ("unary", UNARY)):
            report[f"echo_{kind}"] = load(floor, method, message, seconds, *clients)
            report[f"rsm_{kind}"] = load(server, method, message, seconds, *clients, "--reads-batches")
        report["rsm_infer"] = load(server, INFER, infer_message("n1"), seconds, *clients)
    with rsm_serve(repository, "n1", "--processes", "2") as server:
        for kind, method in (("stream", STREAM), ("unary", UNARY)):
            options = (*clients, "--reads-batches")
            report[f"rsm_{kind}_two_processes"] = load(server, method, message, seconds, *options)
    for kind in ("stream", "unary"):
        reached, floor_load = report[f"rsm_{kind}"], report[f"echo_{kind}"]
        alone = rows_per_s(repository / "n1" / "1", max(1, round(reached["mean_batch_rows"])))
        reached["compute_rows_per_s"] = round(alone, 1)
        reached["of_the_smaller"] = round(reached["per_s"] / min(floor_load["per_s"], alone), 3)
        # Echo, generator and graph share the cores: this is what they can do together if nothing else runs.
        least_us = floor_load["server_cpu_us"] + floor_load["generator_cpu_us"] + 1e6 / alone
        bound = 1e6 * (os.cpu_count() or 1) / least_us
        reached["shared_cores_bound_per_s"] = round(bound, 1)
        reached["of_shared_cores_bound"] = round(reached["per_s"] / min(bound, floor_load["per_s"], alone), 3)
    return report


def measure_n32(repository: Path, seconds: float) -> dict[str, Any]:
    """Measure best-of-32, where the graph is the limit."""
    with rsm_serve(repository, "n32") as server:
        report = load(
            server, STREAM, act_message("n32"), seconds, "--clients", str(2 * CLIENTS), "--reads-batches"
        )
    alone = rows_per_s(repository / "n32" / "1", CLIENTS)
    return {**report, "session_rows_per_s": round(alone, 1), "of_session": round(report["per_s"] / alone, 3)}


def measure_load(repository: Path, seconds: float, peer_python: Path | None) -> dict[str, Any]:
    """Measure latency against load of every server."""
    with rsm_serve(repository, "n1") as server:
        report = {
            "rsm-serve, stream": curve(server, STREAM, act_message("n1"), seconds),
            "rsm-serve, unary": curve(server, UNARY, act_message("n1"), seconds),
            "rsm-serve, Open Inference Protocol": curve(server, INFER, infer_message("n1"), seconds),
        }
    for name, script in PEERS.items() if peer_python else ():
        model = repository / "n1" / "1" / "model.onnx"
        assert peer_python is not None
        with started(
            [peer_python, HERE / "peers" / script, "--model", model, "--noise", f"{STEPS},1,{ACTION_SIZE}"]
        ) as server:
            if server.address.startswith("http"):
                message = json.dumps({"obs": [0.0] * OBS_SIZE}).encode()
                report[name] = curve(server, server.address, message, seconds)
            else:
                report[name] = curve(server, INFER, infer_message("policy"), seconds)
    return report


def curve(server: Server, method: str, message: bytes, seconds: float) -> dict[str, Any]:
    """Measure one client, many clients, and the loads between them."""
    one = load(server, method, message, seconds, "--clients", "1")
    many = load(server, method, message, seconds, "--clients", str(CLIENTS))
    rates = [round(share * many["per_s"]) for share in LOADS]
    return {
        "one_client": one,
        f"{CLIENTS}_clients": many,
        "open_loop": [
            {"rate": rate, **load(server, method, message, seconds, "--rate", str(rate), "--clients", "256")}
            for rate in rates
        ],
    }


def measure_start(repository: Path, times: int = 5) -> dict[str, Any]:
    """Measure the seconds from the command to READY, and those of loading the policy."""
    ready_s, load_s = [], []
    for _ in range(times):
        begun_s = time.perf_counter()
        command = [sys.executable, "-m", "rsm_serve.commands.serve_cli", "--repo", repository, "--policy", "n1"]
        process = subprocess.Popen(
            [*map(str, command), "--address", "127.0.0.1:0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        ready_s.append(time.perf_counter() - begun_s)
        process.terminate()
        loaded = re.search(r"loaded n1 version 1 in ([\d.]+) s", process.stderr.read())
        process.wait(30)
        assert loaded is not None
        load_s.append(float(loaded[1]))
    over = [ready - loading for ready, loading in zip(ready_s, load_s, strict=True)]
    return {
        "ready_s": round(statistics.median(ready_s), 3),
        "load_s": round(statistics.median(load_s), 3),
        "ready_over_load_s": round(statistics.median(over), 3),
    }


def measure_streams(repository: Path, steps: int = 500) -> dict[str, Any]:
    """Measure idle streams: their memory, and the latency of a client beside them."""
    obs, message = np.zeros(OBS_SIZE, np.float32), act_message("n1")
    with rsm_serve(repository, "n1") as server, tempfile.NamedTemporaryFile() as payload:
        payload.write(message)
        payload.flush()
        with PolicyClient(server.address, timeout_s=10) as client, client.stream() as stream:
            calls: dict[str, Callable[[], object]] = {"before": lambda: stream.act(obs)}
            before, before_mb = interleaved(calls, 1, steps)["before"], server.rss_mb
            command = [sys.executable, str(HERE / "load.py"), "--address", server.address, "--method", STREAM]
            crowd = subprocess.Popen(
                [*command, "--payload", payload.name, "--idle-streams", str(IDLE_STREAMS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert crowd.stdout is not None
            opened = json.loads(crowd.stdout.readline())["open"]
            during, during_mb = interleaved(calls, 1, steps)["before"], server.rss_mb
            crowd.communicate("\n", timeout=60)
    return {
        "open": opened,
        "kb_per_stream": round(1024 * (during_mb - before_mb) / opened, 1),
        "rss_mb": round(during_mb, 1),
        "one_client_before": percentiles(before),
        "one_client_during": percentiles(during),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sections = ("latency", "clients", "n32", "load", "start", "streams")
    parser.add_argument("--only", action="append", choices=sections, help="may be repeated  [all]")
    parser.add_argument("--peer-python", type=Path, help="of an environment with nvidia-pytriton and litserve")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of every measurement under load")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        repository = Path(directory)
        for particles in (1, 32):
            publish(repository, make_spec(f"n{particles}", STEPS, particles))
        measures: dict[str, Callable[[], dict[str, Any]]] = {
            "latency": lambda: measure_latency(repository, options.rounds),
            "clients": lambda: measure_clients(repository, options.seconds),
            "n32": lambda: measure_n32(repository, options.seconds),
            "load": lambda: measure_load(repository, options.seconds, options.peer_python),
            "start": lambda: measure_start(repository),
            "streams": lambda: measure_streams(repository),
        }
        report: dict[str, Any] = {"steps": STEPS, "threads": 1}
        for section in options.only or sections:
            report[section] = measures[section]()
    write_record(report, options.out)


if __name__ == "__main__":
    main()
