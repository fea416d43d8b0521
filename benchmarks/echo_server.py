"""The floor of a gRPC server in Python: an echo on the same stack as `rsm-serve`.

    python benchmarks/echo_server.py [--bundle DIR]

Prints "address=HOST:PORT". With a bundle it runs the bundle's graph once per message, in the event loop and on
fixed inputs, before it answers. It parses, checks and batches no message, so its time is the least that any
server of that graph can take.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

from rsm_common.seeds import draw_noise, expand_seed
from rsm_serve.local import open_policy
from rsm_serve.rpc.endpoint import CHANNEL_OPTIONS
from rsm_serve.server import run_loop


class Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers each message with itself; a method whose name ends in Stream is a stream."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work

    def service(self, details: Any) -> Any:
        """The handler of a method."""
        if details.method.endswith("Stream"):
            return grpc.stream_stream_rpc_method_handler(self._stream)
        return grpc.unary_unary_rpc_method_handler(self._unary)

    async def _unary(self, request: bytes, context: Any) -> bytes:
        self._work()
        return request

    async def _stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            self._work()
            yield request


def graph_of(bundle: Path) -> Callable[[], object]:
    """Runs a bundle's graph on one row."""
    policy = open_policy(bundle)
    obs_BO = np.zeros((1, policy.spec.observation.size), np.float32)
    noise_BTNA = draw_noise(expand_seed(0, 1), policy.spec.noise_shape)
    return lambda: policy._graph._session.run(obs_BO, noise_BTNA)


async def serve(work: Callable[[], object]) -> None:
    server = grpc.aio.server(options=CHANNEL_OPTIONS, compression=grpc.Compression.NoCompression)
    server.add_generic_rpc_handlers((Echo(work),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    print(f"address=127.0.0.1:{port}", flush=True)
    await stop.wait()
    await server.stop(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="a version directory")
    bundle = parser.parse_args().bundle
    work = graph_of(bundle) if bundle else lambda: None
    run_loop(lambda: serve(work))


if __name__ == "__main__":
    main()
