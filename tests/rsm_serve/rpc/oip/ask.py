"""Requests of the Open Inference Protocol, by each client of tritonclient and by bare stubs."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2_grpc

from rsm_serve.engine.lane import Lane
from rsm_serve.server import PolicyServer
from tests.hang import HANG_S
from tests.rsm_serve.test_server import Gated, wait_until

DTYPES = {"float32": "FP32", "uint64": "UINT64", "float64": "FP64", "int64": "INT64"}


OBS = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)


TIMEOUT_S = HANG_S


@contextlib.contextmanager
def raw_stub(address: str) -> Iterator[Any]:
    """tritonclient's own stub and messages: for what its client class cannot say."""
    with grpc.insecure_channel(address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def tensor(module: Any, name: str, array: np.ndarray[Any, Any]) -> Any:
    made = module.InferInput(name, list(array.shape), DTYPES[str(array.dtype)])
    made.set_data_from_numpy(array)
    return made


def asked(module: Any, arrays: dict[str, Any], outputs: list[str] | None) -> dict[str, Any]:
    return {
        "inputs": [tensor(module, name, array) for name, array in arrays.items()],
        "outputs": None if outputs is None else [module.InferRequestedOutput(name) for name in outputs],
    }


def infer_sync(address: str, arrays: dict[str, Any], outputs: list[str] | None = None, **options: Any) -> Any:
    with triton.InferenceServerClient(address) as client:
        return client.infer(
            options.pop("model_name", "tiny"),
            client_timeout=TIMEOUT_S,
            **asked(triton, arrays, outputs),
            **options,
        )


def infer_aio(address: str, arrays: dict[str, Any], outputs: list[str] | None = None, **options: Any) -> Any:
    async def main() -> Any:
        async with triton_aio.InferenceServerClient(address) as client:
            return await client.infer(
                options.pop("model_name", "tiny"),
                client_timeout=TIMEOUT_S,
                **asked(triton_aio, arrays, outputs),
                **options,
            )

    return asyncio.run(main())


def infer_stream(address: str, arrays: dict[str, Any], outputs: list[str] | None = None, **options: Any) -> Any:
    (outcome,) = stream_sync(address, [asked(triton, arrays, outputs) | options])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def infer_aio_stream(
    address: str, arrays: dict[str, Any], outputs: list[str] | None = None, **options: Any
) -> Any:
    (outcome,) = stream_aio(address, [asked(triton_aio, arrays, outputs) | options])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def stream_sync(address: str, requests: list[dict[str, Any]]) -> list[Any]:
    """The results and errors of one stream, in the order in which they came."""
    outcomes: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: outcomes.put(error or result), stream_timeout=TIMEOUT_S)
        for request in requests:
            client.async_stream_infer(**{"model_name": "tiny"} | request)
        answers = [outcomes.get(timeout=TIMEOUT_S) for _ in requests]
        client.stop_stream()
    assert outcomes.empty()
    return answers


def stream_aio(address: str, requests: list[dict[str, Any]]) -> list[Any]:
    async def main() -> list[Any]:
        async def given() -> Any:
            for request in requests:
                yield {"model_name": "tiny"} | request

        async with triton_aio.InferenceServerClient(address) as client:
            answers = client.stream_infer(given(), stream_timeout=TIMEOUT_S)
            return [error or result async for result, error in answers]

    return asyncio.run(main())


def parameters(result: Any) -> dict[str, Any]:
    found = {}
    for name, value in result.get_response().parameters.items():
        found[name] = getattr(value, value.WhichOneof("parameter_choice"))
    return found


Infer = Callable[..., Any]


CLIENTS = [infer_sync, infer_aio, infer_stream, infer_aio_stream]


NOT_OFFERED: dict[str, Callable[[Any], Any]] = {
    "SystemSharedMemoryStatus": lambda client: client.get_system_shared_memory_status(),
    "SystemSharedMemoryRegister": lambda client: client.register_system_shared_memory("a", "b", 8),
    "SystemSharedMemoryUnregister": lambda client: client.unregister_system_shared_memory(),
    "CudaSharedMemoryStatus": lambda client: client.get_cuda_shared_memory_status(),
    "CudaSharedMemoryRegister": lambda client: client.register_cuda_shared_memory("a", b"YQ==", 0, 8),
    "CudaSharedMemoryUnregister": lambda client: client.unregister_cuda_shared_memory(),
    "TraceSetting": lambda client: client.get_trace_settings(),
    "LogSettings": lambda client: client.get_log_settings(),
}


class Rig:
    """A server whose only policy computes when the test says so, at most 4 rows at a time."""

    def __init__(self, server: PolicyServer, session: Gated, lane: Lane) -> None:
        self.server, self.session, self.lane = server, session, lane
        self.address = server.addresses[0]
        self.client = triton.InferenceServerClient(self.address)
        self.outcomes: queue.Queue[Any] = queue.Queue()

    def ask(self, rows: int, **options: Any) -> Any:
        """Send a request; its outcome will be in `outcomes`."""
        return self.client.async_infer(
            "tiny",
            [tensor(triton, "obs", OBS[:rows])],
            lambda result, error: self.outcomes.put(error or result),
            client_timeout=TIMEOUT_S,
            **options,
        )

    def outcome(self) -> Any:
        return self.outcomes.get(timeout=TIMEOUT_S)

    def hold_worker(self) -> None:
        """Let one request of one row occupy the worker."""
        self.session.open.clear()
        self.ask(1)
        assert self.session.entered.acquire(timeout=TIMEOUT_S)

    def wait_queued(self, rows: int) -> None:
        wait_until(lambda: self.lane.batcher.queued_rows == rows, f"{rows} queued rows")
