"""Latency of one client against a gRPC echo and against the bare policy, in one run.

    python benchmarks/serving.py --bundle DIR [--rounds 5] [--steps 400] [--out FILE]

The floor is a grpc.aio echo server of the same message sizes in a process of its own, asked by the same
kind of client. Rounds alternate between floor and server, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from record import write_record

from rsm_serve.client import PolicyClient
from rsm_serve.local import open_policy
from rsm_serve.pb import policy_pb2 as pb

ECHO = """
import asyncio, sys
import grpc
from rsm_serve.server import CHANNEL_OPTIONS, run_loop

async def unary(request, context):
    return request

async def stream(requests, context):
    async for request in requests:
        yield request

class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        if details.method.endswith("Unary"):
            return grpc.unary_unary_rpc_method_handler(unary)
        return grpc.stream_stream_rpc_method_handler(stream)

async def main():
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"address=127.0.0.1:{port} ", flush=True)
    await server.wait_for_termination()

import grpc.aio
run_loop(main)
"""


def start(command: list[str]) -> tuple[subprocess.Popen[str], str]:
    """A server process and its address."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    return process, line.split("address=")[1].split()[0]


def times_us(call: Callable[[], object], steps: int) -> list[float]:
    result = []
    for _ in range(steps):
        started = time.perf_counter()
        call()
        result.append(1e6 * (time.perf_counter() - started))
    return result


def echo_stream(channel: grpc.Channel, payload: bytes) -> Callable[[], object]:
    import queue

    requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    responses = channel.stream_stream("/echo/Stream")(iter(requests.get, None))

    def step() -> object:
        requests.put(payload)
        return next(responses)

    return step


def measure(bundle: Path, rounds: int, steps: int) -> dict[str, Any]:
    repository, name, version = bundle.parent.parent, bundle.parent.name, bundle.name
    local = open_policy(bundle)
    obs = np.zeros(local.spec.observation.size, np.float32)
    payload = pb.ActRequest(policy=name, rows=1, obs=obs.tobytes()).SerializeToString()
    echo, echo_address = start([sys.executable, "-c", ECHO])
    arguments = ["--repo", str(repository), "--policy", f"{name}:{version}", "--address", "127.0.0.1:0"]
    server, address = start([sys.executable, "-m", "rsm_serve.cli", *arguments])
    try:
        with grpc.insecure_channel(echo_address) as channel, PolicyClient(address, timeout_s=10) as client:
            stream = client.stream()
            echo_unary = channel.unary_unary("/echo/Unary")
            calls: dict[str, Callable[[], object]] = {
                "echo": lambda: echo_unary(payload, timeout=10),
                "act": lambda: client.act(obs),
                "echo_stream": echo_stream(channel, payload),
                "act_stream": lambda: stream.act(obs),
                "in_process": lambda: local.act(obs),
            }
            found: dict[str, list[float]] = {key: [] for key in calls}
            for round_number in range(rounds + 1):
                for key, call in calls.items():
                    measured = times_us(call, steps)
                    if round_number:  # the first warms up
                        found[key] += measured
            compute = [client.act(obs).timing.compute_us for _ in range(steps)]
            stream.close()
    finally:
        for process in (echo, server):
            process.terminate()
            process.wait(30)
    report: dict[str, Any] = {
        key: {f"p{p}_us": round(float(np.percentile(value, p)), 1) for p in (50, 90, 99)}
        for key, value in found.items()
    }
    report["compute_p50_us"] = round(float(np.median(compute)), 1)
    for key, floor in (("act", "echo"), ("act_stream", "echo_stream")):
        over = report[key]["p50_us"] - report[floor]["p50_us"] - report["compute_p50_us"]
        report[f"{key}_over_floor_and_compute_us"] = round(over, 1)
        report[f"{key}_ratio_to_floor"] = round(report[key]["p50_us"] / report[floor]["p50_us"], 2)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True, help="a version directory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    write_record(measure(options.bundle, options.rounds, options.steps), options.out)


if __name__ == "__main__":
    main()
