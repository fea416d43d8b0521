"""Run a bundle's graph with TensorRT on an NVIDIA GPU, one captured CUDA graph per batch size.

Batches are padded to a few sizes, the buckets. Each bucket has an execution context and a CUDA graph that
copies the inputs to the GPU, runs the engine and copies the outputs back, so that a run is one launch. The
copies are inside on purpose: a graph replays its addresses, and only what it copies itself is fresh.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import (
    BackendError,
    BundleError,
    InvalidRequestError,
    MissingExtraError,
    UsageError,
)
from rsm_common.spec import PolicySpec
from rsm_serve.sessions.batch_sizes import bucket_sizes
from rsm_serve.sessions.engine_cache import default_cache_dir
from rsm_serve.sessions.signature import FLOAT32, GraphTensor, check_signature
from rsm_serve.sessions.tensorrt_engine import (
    BatchRange,
    Device,
    EngineRecipe,
    input_shapes,
    load_tensorrt,
    open_engine,
    output_shapes,
)

logger = logging.getLogger(__name__)

NAME = "tensorrt"
OPT_BATCH_SIZE = 8
"""Where TensorRT times its tactics: between the single robot and the full batch."""
FLOAT32_BYTES = 4


class CudaError(RuntimeError):
    """A CUDA or TensorRT call failed."""


class TensorRTSession:
    """An unrolled chain in TensorRT.

    Args:
        model: the content of model.onnx.
        spec: what the graph must take and give.
        max_batch_size: rows of the largest bucket, at least 1; longer batches run in several parts.
        cache_dir: where engines are kept; None: ~/.cache/rsm-toolkit/tensorrt.

    Raises:
        MissingExtraError: TensorRT or cuda-bindings is not installed, or lacks its libraries.
        UsageError: no GPU, a TensorRT that is too old, or a batch size below 1.
        BundleError: TensorRT cannot parse, build or load the graph, its inputs and outputs are not the
            policy's, or the GPU refuses.
    """

    def __init__(
        self, model: bytes, spec: PolicySpec, *, max_batch_size: int = 64, cache_dir: Path | None = None
    ) -> None:
        if max_batch_size < 1:
            raise UsageError(f"wanted max_batch_size >= 1, got {max_batch_size}")
        trt = load_tensorrt()
        self._cuda = _load_cuda()
        self._device, device = _find_device(self._cuda)
        self._spec = spec
        self._sizes = bucket_sizes(max_batch_size)
        self._buckets: dict[int, _Bucket] = {}
        batches = BatchRange(1, min(OPT_BATCH_SIZE, max_batch_size), max_batch_size)
        recipe = EngineRecipe(trt, model, spec, device, batches)
        resources = contextlib.ExitStack()
        # Not bound to self: runs on close(), or when the session is dropped.
        self._release = weakref.finalize(self, resources.close)
        failure = None
        try:
            _call(self._cuda.cudaSetDevice, self._device)
            self._open(recipe, cache_dir or default_cache_dir(), resources)
        except CudaError as error:
            failure = str(error)
            self._release()
        except BaseException:
            self._release()
            raise
        # Raised here and not above: the traceback would keep execution contexts, and their memory, alive.
        if failure is not None:
            raise BundleError(
                f"policy {spec.name!r} cannot be loaded on {device.name} ({failure}); "
                "check the driver and the GPU's free memory"
            )
        self._runtime = f"tensorrt {trt.__version__} on {device.name}, {self._how()}"

    @property
    def runtime(self) -> str:
        """What runs the graph: version, GPU, and whether as CUDA graphs."""
        return self._runtime

    def run(
        self, obs_BO: NDArray[np.float32], noise_BTNA: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Actions [B, A] and, if the graph has critics, values [B], both float32 and newly allocated.

        Raises:
            InvalidRequestError: shapes that are not the policy's.
            BackendError: the GPU failed, or the session is closed.
        """
        if not self._release.alive:
            raise BackendError(f"the TensorRT session of policy {self._spec.name!r} is closed; open it again")
        feeds = {"obs": obs_BO, "noise": noise_BTNA}
        self._check_shapes(feeds)
        rows, step = len(obs_BO), self._sizes[-1]
        answers = {
            name: np.empty((rows, *shape), np.float32) for name, shape in output_shapes(self._spec).items()
        }
        try:
            # The current device belongs to the thread, and this may not be the one that opened the session.
            _call(self._cuda.cudaSetDevice, self._device)
            for start in range(0, rows, step):
                self._run_part(feeds, answers, slice(start, min(start + step, rows)))
        except CudaError as error:
            raise BackendError(f"policy {self._spec.name!r} could not be evaluated: {error}") from error
        return answers["action"], answers.get("q")

    def close(self) -> None:
        """Free the GPU's and the pinned memory; a second call does nothing."""
        self._release()

    def _open(self, recipe: EngineRecipe, cache_dir: Path, resources: contextlib.ExitStack) -> None:
        """Acquire everything; `resources` gives it back in the opposite order."""
        cuda = self._cuda
        opened = open_engine(recipe, cache_dir)
        owned: list[Any] = [recipe.logger, opened.runtime, opened.engine]
        resources.callback(owned.clear)
        logger.info("TensorRT engine of policy %r: %s", recipe.spec.name, opened.origin)
        inputs, outputs = (
            _tensors(recipe.trt, opened.engine, mode)
            for mode in (recipe.trt.TensorIOMode.INPUT, recipe.trt.TensorIOMode.OUTPUT)
        )
        check_signature(NAME, recipe.spec, inputs, outputs)
        self._stream = _call(cuda.cudaStreamCreateWithFlags, cuda.cudaStreamNonBlocking)
        resources.callback(_release, cuda.cudaStreamDestroy, self._stream)
        self._inputs = self._allocate(input_shapes(recipe.spec), resources)
        self._outputs = self._allocate(output_shapes(recipe.spec), resources)
        resources.callback(self._buckets.clear)
        # After a failure, copies may still be under way to memory that is about to be freed.
        resources.callback(_release, cuda.cudaStreamSynchronize, self._stream)
        failures: list[str] = []
        for rows in self._sizes:
            context = self._make_context(opened.engine, rows)
            self._buckets[rows] = self._make_bucket(context, rows, resources, failures)
        if failures:
            logger.warning(
                "policy %r runs without CUDA graphs for %d of %d batch sizes, which costs latency: %s",
                recipe.spec.name,
                len(failures),
                len(self._sizes),
                failures[0],
            )

    def _allocate(
        self, shapes: dict[str, tuple[int, ...]], resources: contextlib.ExitStack
    ) -> dict[str, _Tensor]:
        """Memory for the largest bucket, which all buckets share: one run at a time."""
        tensors = {}
        for name, shape in shapes.items():
            count = self._sizes[-1] * int(np.prod(shape, dtype=int))
            address = _call(self._cuda.cudaHostAlloc, count * FLOAT32_BYTES, self._cuda.cudaHostAllocDefault)
            resources.callback(_release, self._cuda.cudaFreeHost, address)
            device = _call(self._cuda.cudaMalloc, count * FLOAT32_BYTES)
            resources.callback(_release, self._cuda.cudaFree, device)
            host = np.ctypeslib.as_array((ctypes.c_float * count).from_address(int(address)))
            host[:] = 0
            tensors[name] = _Tensor(int(address), int(device), host.reshape(self._sizes[-1], *shape))
        return tensors

    def _make_context(self, engine: Any, rows: int) -> Any:
        context = engine.create_execution_context()
        if context is None:
            raise CudaError("TensorRT has no memory for an execution context")
        for name, tensor in self._inputs.items():
            _require(context.set_input_shape(name, (rows, *tensor.host.shape[1:])), f"the shape of {name}")
        for name, tensor in (*self._inputs.items(), *self._outputs.items()):
            _require(context.set_tensor_address(name, tensor.device), f"the address of {name}")
            shape = tuple(context.get_tensor_shape(name))
            _require(shape == (rows, *tensor.host.shape[1:]), f"{rows} rows: {name} would be {list(shape)}")
        return context

    def _make_bucket(
        self, context: Any, rows: int, resources: contextlib.ExitStack, failures: list[str]
    ) -> _Bucket:
        bucket = _Bucket(rows, context, None)
        # TensorRT allocates in the first run of a shape, which must not be captured.
        self._finish(bucket)
        try:
            graph = self._capture(bucket)
            try:
                bucket.graph = _call(self._cuda.cudaGraphInstantiate, graph, 0)
            finally:
                _release(self._cuda.cudaGraphDestroy, graph)
            resources.callback(_release, self._cuda.cudaGraphExecDestroy, bucket.graph)
        except CudaError as error:
            failures.append(str(error))
            self._cuda.cudaGetLastError()  # or the next call would report this one's error
        self._finish(bucket)
        return bucket

    def _capture(self, bucket: _Bucket) -> Any:
        """Record copies and engine as a CUDA graph; leaves capture mode whatever happens."""
        cuda = self._cuda
        # Only this thread is held to what may be captured; another policy's thread may allocate meanwhile.
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _call(cuda.cudaStreamBeginCapture, self._stream, mode)
        failure = None
        try:
            self._enqueue(bucket)
        except CudaError as error:
            failure = error
        graph = _call(cuda.cudaStreamEndCapture, self._stream)
        if failure is not None:
            _release(cuda.cudaGraphDestroy, graph)
            raise failure
        return graph

    def _run_part(
        self, feeds: dict[str, NDArray[np.float32]], answers: dict[str, NDArray[np.float32]], part: slice
    ) -> None:
        rows = part.stop - part.start
        bucket = self._buckets[self._sizes[bisect.bisect_left(self._sizes, rows)]]
        for name, tensor in self._inputs.items():
            tensor.host[:rows] = feeds[name][part]
            tensor.host[rows : bucket.rows] = 0  # not the rows of an earlier caller
        self._finish(bucket)
        for name, tensor in self._outputs.items():
            answers[name][part] = tensor.host[:rows]

    def _finish(self, bucket: _Bucket) -> None:
        """Run a bucket on what lies in the pinned inputs, and wait for the pinned outputs."""
        if bucket.graph is None:
            self._enqueue(bucket)
        else:
            _call(self._cuda.cudaGraphLaunch, bucket.graph, self._stream)
        _call(self._cuda.cudaStreamSynchronize, self._stream)

    def _enqueue(self, bucket: _Bucket) -> None:
        cuda, stream = self._cuda, self._stream
        to_device, to_host = (
            cuda.cudaMemcpyKind.cudaMemcpyHostToDevice,
            cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost,
        )
        for tensor in self._inputs.values():
            _call(
                cuda.cudaMemcpyAsync,
                tensor.device,
                tensor.address,
                tensor.bytes(bucket.rows),
                to_device,
                stream,
            )
        _require(bucket.context.execute_async_v3(int(stream)), "the execution")
        for tensor in self._outputs.values():
            _call(
                cuda.cudaMemcpyAsync, tensor.address, tensor.device, tensor.bytes(bucket.rows), to_host, stream
            )

    def _check_shapes(self, feeds: dict[str, NDArray[np.float32]]) -> None:
        rows = len(feeds["obs"])
        for name, shape in input_shapes(self._spec).items():
            if feeds[name].shape != (rows, *shape):
                raise InvalidRequestError(
                    f"wanted {name} as {['B', *shape]} with B = {rows}, got {list(feeds[name].shape)}"
                )

    def _how(self) -> str:
        captured = sum(bucket.graph is not None for bucket in self._buckets.values())
        if captured == len(self._buckets):
            return "CUDA graphs"
        return (
            f"CUDA graphs for {captured} of {len(self._buckets)} batch sizes" if captured else "no CUDA graphs"
        )


@dataclass(frozen=True)
class _Tensor:
    """One input or output for the largest bucket, pinned on the host and on the GPU."""

    address: int
    device: int
    host: NDArray[np.float32]
    """View of the pinned memory, rows first; invalid after close()."""

    def bytes(self, rows: int) -> int:
        return rows * int(np.prod(self.host.shape[1:], dtype=int)) * FLOAT32_BYTES


@dataclass
class _Bucket:
    rows: int
    context: Any
    graph: Any
    """Executable CUDA graph; None where capturing failed."""


def _load_cuda() -> Any:
    try:
        from cuda.bindings import runtime
    except (ImportError, OSError) as error:
        raise MissingExtraError(
            f'the TensorRT backend needs: pip install "rsm-toolkit[serve-gpu]" (cuda.bindings: {error})'
        ) from None
    return runtime


def _find_device(cuda: Any) -> tuple[int, Device]:
    """(index, description) of the current GPU."""
    try:
        if _call(cuda.cudaGetDeviceCount) < 1:
            raise CudaError("cudaGetDeviceCount found none")
        index = _call(cuda.cudaGetDevice)
        properties = _call(cuda.cudaGetDeviceProperties, index)
    except RuntimeError as error:  # cuda.bindings raises one where the driver's library is missing
        raise UsageError(
            f"wanted an NVIDIA GPU for the TensorRT backend, got none ({error}); "
            "check the driver or use --backend onnxruntime"
        ) from None
    name = properties.name.split(b"\0")[0].decode(errors="replace")
    return int(index), Device(name, f"{properties.major}.{properties.minor}")


def _tensors(trt: Any, engine: Any, mode: Any) -> list[GraphTensor]:
    """An engine's inputs or outputs, as `mode` says."""
    tensors = []
    for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
        if engine.get_tensor_mode(name) == mode:
            kind = engine.get_tensor_dtype(name)
            dtype = FLOAT32 if kind == trt.DataType.FLOAT else str(kind)
            shape = ("?" if length == -1 else length for length in engine.get_tensor_shape(name))
            tensors.append(GraphTensor(name, dtype, tuple(shape)))
    return tensors


def _call(function: Callable[..., Sequence[Any]], *arguments: Any) -> Any:
    """Call a function of cuda.bindings.runtime: its value, if it has one.

    Raises:
        CudaError: it did not succeed.
    """
    error, *values = function(*arguments)
    if int(error) != 0:
        raise CudaError(f"{function.__name__} failed with {error.name}")
    return values[0] if values else None


def _release(function: Callable[..., Sequence[Any]], handle: Any) -> None:
    """Give something back; on the way out a failure is worth a line in the log, no more."""
    try:
        _call(function, handle)
    except CudaError as error:
        # As text: a log record may be kept for long, and with the error its traceback and what that holds.
        logger.warning("while releasing GPU resources: %s", str(error))


def _require(accepted: bool, what: str) -> None:
    if not accepted:
        raise CudaError(f"TensorRT refuses {what}")
