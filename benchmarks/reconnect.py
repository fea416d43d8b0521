"""How long a client waits for its first answer after the server was away.

    python benchmarks/reconnect.py --away 60 --away 120 --out benchmarks/results/reconnect.json

Each kind of client (unary calls and streams, synchronous and asyncio) asks all the time. The server is stopped,
stays away, and is started again at the same address. Measured is the time from the server's readiness to the
client's first answer. Each kind is there twice: with the options of rsm_serve ("capped"), and with those
of gRPC ("default").
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import numpy as np

from rsm_common.errors import RequestError
from rsm_serve.client import AsyncPolicyClient, PolicyClient, connection
from tests.bundles import make_spec, write_bundle
from tests.server_process import running_server

PAUSE_S = 0.02
"""Between two calls of a client: its control loop runs at 50 Hz."""
OBS = np.zeros(4, np.float32)


class Asker:
    """A client that asks in a thread of its own, and notes when it was answered."""

    def __init__(self, address: str, kind: str, streams: bool) -> None:
        self.answers: list[float] = []
        self._stop = False
        main = {"sync": self._sync, "asyncio": lambda *given: asyncio.run(self._asyncio(*given))}[kind]
        self._thread = threading.Thread(target=main, args=(address, streams), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop = True
        self._thread.join()

    def _sync(self, address: str, streams: bool) -> None:
        with PolicyClient(address, connect_timeout_s=60) as client:
            act: Callable[..., Any] = client.stream().act if streams else client.act
            while not self._stop:
                try:
                    act(OBS)
                    self.answers.append(time.monotonic())
                except RequestError:
                    pass
                time.sleep(PAUSE_S)

    async def _asyncio(self, address: str, streams: bool) -> None:
        async with AsyncPolicyClient(address, connect_timeout_s=60) as client:
            act = client.stream().act if streams else client.act
            while not self._stop:
                try:
                    await act(OBS)
                    self.answers.append(time.monotonic())
                except RequestError:
                    pass
                await asyncio.sleep(PAUSE_S)


def start(address: str) -> dict[str, Asker]:
    """Every kind of client, with an answer each."""
    askers: dict[str, Asker] = {}
    ours = connection.RECONNECT_OPTIONS
    without = tuple(option for option in connection.CHANNEL_OPTIONS if option not in ours)
    for options, name in ((connection.CHANNEL_OPTIONS, "capped"), (without, "default")):
        with mock.patch.object(connection, "CHANNEL_OPTIONS", options):
            new = {
                f"{name} {kind} {'stream' if streams else 'unary'}": Asker(address, kind, streams)
                for kind in ("sync", "asyncio")
                for streams in (False, True)
            }
            while not all(asker.answers for asker in new.values()):
                time.sleep(PAUSE_S)
        askers |= new
    return askers


def measure(repository: Path, away_s: float) -> dict[str, float]:
    """Seconds from readiness to the first answer, by kind of client."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    log = repository.parent / "log"
    with running_server(repository, log, "--address", address):
        askers = start(address)
    time.sleep(away_s)
    with running_server(repository, log, "--address", address):
        ready_s = time.monotonic()
        while not all(asker.answers[-1] >= ready_s for asker in askers.values()):
            time.sleep(PAUSE_S)
    for asker in askers.values():
        asker.stop()
    return {
        name: round(next(at for at in asker.answers if at >= ready_s) - ready_s, 3)
        for name, asker in askers.items()
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description="Time to the first answer after a server was away.")
    parser.add_argument("--away", type=float, action="append", help="seconds (default: 60 and 120)")
    parser.add_argument("--out", type=Path, help="where to write the result")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "what": "seconds from the server's readiness to the client's first answer",
        "grpc": grpc.__version__,
        "python": platform.python_version(),
        "reconnect_options": dict(connection.RECONNECT_OPTIONS),
        "away_s": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        write_bundle(repository, make_spec("tiny"))
        for away_s in arguments.away or (60, 120):
            result["away_s"][f"{away_s:g}"] = found = measure(repository, away_s)
            print(f"away {away_s:g} s")
            for name, seconds in found.items():
                print(f"  {name:24s} {seconds:8.3f} s", flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
