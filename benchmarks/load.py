"""Put load on one method of a server, from a process of its own, and print the result as JSON.

    python benchmarks/load.py --address HOST:PORT --method /rsm.v1.PolicyService/ActStream --payload FILE
                              [--clients 64] [--seconds 5] [--rate 1000] [--idle-streams 10000]

Closed loop: every client sends its next message when the answer to the last is there. Open loop (--rate):
messages are due at random moments (Poisson) that do not depend on the server, and latency counts from the due
moment. So a stalled server cannot slow its own measurement. Every message is the prepared bytes of FILE,
so that the generator costs the same for any server. A method that ends in Stream or StreamInfer is a
stream per client; one that begins with http:// is an HTTP POST.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import resource
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import grpc.aio
import numpy as np

from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.server import run_loop

CONNECTIONS = 8
TIMEOUT_S = 30.0
WARM_UP_S = 1.0
SAMPLED = 8
"""One answer in so many is read for the size of its batch."""

Send = Callable[[bytes], Awaitable[bytes]]


class Tally:
    """Counts of all messages, and times of those after the warm-up."""

    def __init__(self, reads_batches: bool) -> None:
        self.latencies_s: list[float] = []
        self.answers_in_all = 0
        self.errors: collections.Counter[str] = collections.Counter()
        self.batch_rows: list[int] = []
        self._reads_batches = reads_batches

    def answered(self, due_s: float, answer: bytes, *, warming_up: bool) -> None:
        self.answers_in_all += 1
        if warming_up:
            return
        self.latencies_s.append(time.perf_counter() - due_s)
        if self._reads_batches and len(self.latencies_s) % SAMPLED == 0:
            response = pb.ActResponse.FromString(answer)
            if response.HasField("error"):
                self.errors[response.error.code] += SAMPLED
            self.batch_rows.append(response.timing.batch_rows)

    def report(self, seconds: float) -> dict[str, Any]:
        times_us = 1e6 * np.array(self.latencies_s or [np.nan])
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "answers_in_all": self.answers_in_all,
            "answers": len(self.latencies_s),
            "per_s": round(len(self.latencies_s) / seconds, 1),
            **{f"p{p:g}_us": round(float(np.percentile(times_us, p)), 1) for p in (50, 90, 99, 99.9)},
            "errors": dict(self.errors),
            "mean_batch_rows": round(float(np.mean(self.batch_rows)), 2) if self.batch_rows else None,
            "generator_cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        }


def grpc_senders(address: str, method: str, clients: int) -> list[Send]:
    """One per client."""
    channels = grpc_channels(address, clients)
    if method.endswith(("Stream", "StreamInfer")):
        return [_stream(channels[number % len(channels)].stream_stream(method)()) for number in range(clients)]
    calls = [channel.unary_unary(method) for channel in channels]
    return [_unary(calls[number % len(calls)]) for number in range(clients)]


def grpc_channels(address: str, clients: int) -> list[Any]:
    """A few connections for all clients, as for a fleet behind a proxy."""
    own = ("grpc.use_local_subchannel_pool", 1)
    return [
        grpc.aio.insecure_channel(address, options=[own, ("connection", number)])
        for number in range(min(CONNECTIONS, clients))
    ]


def _unary(call: Any) -> Send:
    async def send(payload: bytes) -> bytes:
        answer: bytes = await call(payload, timeout=TIMEOUT_S)
        return answer

    return send


def _stream(stream: Any) -> Send:
    async def send(payload: bytes) -> bytes:
        await stream.write(payload)
        answer: bytes = await stream.read()
        return answer

    return send


async def http_sender(url: str) -> Send:
    """One connection that is kept open."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)

    async def send(payload: bytes) -> bytes:
        head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
        answer = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in answer.split(b"\r\n", 1)[0]:
            raise ConnectionError(answer.split(b"\r\n", 1)[0].decode())
        length = next(
            int(line.split(b":")[1])
            for line in answer.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        )
        return await reader.readexactly(length)

    return send


async def closed_loop(senders: list[Send], payload: bytes, seconds: float, tally: Tally) -> None:
    """Send each client's next message when its last one is answered."""
    start_s = time.perf_counter() + WARM_UP_S

    async def client(send: Send) -> None:
        while (now := time.perf_counter()) < start_s + seconds:
            try:
                answer = await send(payload)
            except (grpc.aio.AioRpcError, ConnectionError) as error:
                tally.errors[_name(error)] += 1
                await asyncio.sleep(0.01)
                continue
            tally.answered(now, answer, warming_up=now < start_s)

    await asyncio.gather(*map(client, senders))


async def open_loop(senders: list[Send], payload: bytes, seconds: float, rate: float, tally: Tally) -> None:
    """Send messages when they are due. If all clients are busy, a message waits, and its wait counts."""
    free: asyncio.Queue[Send] = asyncio.Queue()
    for sender in senders:
        free.put_nowait(sender)
    start_s = time.perf_counter()
    due_s, tasks = start_s, set()
    draw = random.Random(0)

    async def one(send: Send, due_s: float) -> None:
        try:
            answer = await send(payload)
        except (grpc.aio.AioRpcError, ConnectionError) as error:
            tally.errors[_name(error)] += 1
        else:
            tally.answered(due_s, answer, warming_up=due_s < start_s + WARM_UP_S)
        free.put_nowait(send)

    while due_s < start_s + WARM_UP_S + seconds:
        due_s += draw.expovariate(rate)
        if (wait_s := due_s - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        task = asyncio.ensure_future(one(await free.get(), due_s))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


async def idle_streams(address: str, method: str, count: int, payload: bytes) -> None:
    """Open streams, read one answer on each, report it, and hold them until stdin ends."""
    channels = grpc_channels(address, count)
    senders = []
    for number in range(count):  # one after the other: it is their number that is measured, not a rush
        senders.append(_stream(channels[number % len(channels)].stream_stream(method)()))
        await senders[-1](payload)
    print(json.dumps({"open": count}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, input)


def _name(error: Exception) -> str:
    return error.code().name if isinstance(error, grpc.aio.AioRpcError) else str(error)


async def run(options: argparse.Namespace) -> None:
    payload = options.payload.read_bytes()
    if options.idle_streams:
        await idle_streams(options.address, options.method, options.idle_streams, payload)
        return
    tally = Tally(reads_batches="rsm.v1" in options.method and options.reads_batches)
    if options.method.startswith("http://"):
        senders = [await http_sender(options.method) for _ in range(options.clients)]
    else:
        senders = grpc_senders(options.address, options.method, options.clients)
    if options.rate:
        await open_loop(senders, payload, options.seconds, options.rate, tally)
    else:
        await closed_loop(senders, payload, options.seconds, tally)
    print(json.dumps(tally.report(options.seconds)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--address", default="")
    parser.add_argument("--method", required=True)
    parser.add_argument("--payload", type=Path, required=True, help="the bytes of every message")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rate", type=float, help="messages per second, for an open loop")
    parser.add_argument("--idle-streams", type=int, help="open so many streams instead, and hold them")
    parser.add_argument(
        "--reads-batches", action="store_true", help="the answers are rsm.v1's, and say their batch"
    )
    options = parser.parse_args()
    run_loop(lambda: run(options))


if __name__ == "__main__":
    main()
