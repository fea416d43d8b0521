"""Run a bundle's graph with OpenVINO on the CPU; the only module that imports openvino."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import UsageError
from rsm_common.spec import PolicySpec
from rsm_serve.sessions.signature import FLOAT32, GraphTensor, check_signature, unloadable

MAX_GRAPH_ROWS = 64
"""Rows of the largest graph that is compiled; more rows are several runs."""

_TELEMETRY = "openvino_telemetry"
_TYPES = {"f32": FLOAT32, "f64": "double", "f16": "float16", "bf16": "bfloat16"}


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Import openvino with the stand-in that it has for where its telemetry is not installed.

    As it comes, `import openvino` forks a process that reports to an analytics service, and leaves an
    identifier in the home directory. A robot calls nobody.
    """
    known = sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # what makes an import fail
    try:
        yield
    finally:
        del sys.modules[_TELEMETRY]
        if known is not None:
            sys.modules[_TELEMETRY] = known


with _without_telemetry():
    import openvino

NAME = f"openvino {openvino.__version__.partition('-')[0]}"


class OpenVINOSession:
    """An unrolled chain in OpenVINO.

    A graph that is compiled for one batch size is 1.3 to 3 times as fast as one for any batch size
    (benchmarks/runtimes.py). So there is one graph per power of two up to MAX_GRAPH_ROWS, compiled when first
    needed, and a batch is cut into pieces that fill them; see `pieces`.

    Args:
        model: the content of model.onnx.
        spec: what the graph must take and give.
        threads: threads of one inference.
        precision: of the arithmetic; "bf16" gives other actions than the exported ones, by some percent of
            their range.

    Raises:
        BundleError: OpenVINO cannot load the graph, or its inputs and outputs are not the policy's.
        UsageError: bf16 on a processor that has none.
    """

    def __init__(
        self, model: bytes, spec: PolicySpec, *, threads: int = 1, precision: Literal["f32", "bf16"] = "f32"
    ) -> None:
        self._spec = spec
        self._precision = precision
        self._core = _core()
        if precision == "bf16" and not has_bf16():
            raise UsageError("wanted a processor with bf16, got one without; take the backend openvino")
        self._settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            # Said even for f32: OpenVINO takes bf16 by itself on processors that have it.
            "INFERENCE_PRECISION_HINT": precision,
            # Every session would pin its threads to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        self._compiled: dict[int, _FixedBatch] = {}
        try:
            self._graph = self._core.read_model(model=model, weights=b"")
            inputs, outputs = _tensors(self._graph.inputs), _tensors(self._graph.outputs)
        except Exception as error:  # OpenVINO raises plain RuntimeErrors
            raise unloadable(NAME, spec, _reason(error)) from error
        check_signature(NAME, spec, inputs, outputs)
        try:
            self._fixed_batch(1)
        except Exception as error:
            raise unloadable(NAME, spec, _reason(error)) from error

    @property
    def runtime(self) -> str:
        """Such as "openvino 2026.4.1, CPU bf16"."""
        return f"{NAME}, CPU" + (" bf16" if self._precision == "bf16" else "")

    def run(
        self, obs_BO: NDArray[np.float32], noise_BTNA: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Actions [B, A] and, if the graph has critics, values [B], both float32 and newly allocated."""
        rows = len(obs_BO)
        action_BA = np.empty((rows, self._spec.action.size), np.float32)
        q_B = np.empty(rows, np.float32) if self._spec.has_q else None
        start = 0
        for count, size in pieces(rows):
            part = slice(start, start + count)
            start += count
            found = self._fixed_batch(size).run(obs_BO[part], noise_BTNA[part])
            action_BA[part] = found["action"][:count]
            if q_B is not None:
                q_B[part] = found["q"][:count]
        return action_BA, q_B

    def close(self) -> None:
        """Release the compiled graphs."""
        self._compiled.clear()
        self._graph = None

    def _fixed_batch(self, size: int) -> _FixedBatch:
        if size not in self._compiled:
            graph = self._graph.clone()
            shapes = {"obs": [self._spec.observation.size], "noise": self._spec.noise_shape}
            graph.reshape({name: [size, *shape] for name, shape in shapes.items()})
            self._compiled[size] = _FixedBatch(self._core.compile_model(graph, "CPU", self._settings))
        return self._compiled[size]


def has_bf16() -> bool:
    """Whether the processor computes in bf16."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@functools.cache
def _core() -> Any:
    """OpenVINO's, one for all sessions and for as long as the process lives.

    Each Core gives the thread another stack for signal handlers, and at its end puts back the one that it
    found. Cores that do not end in reverse order, as with every reload, would leave a freed stack behind, and
    the next signal would end the process.
    """
    return openvino.Core()


class _FixedBatch:
    """A graph that is compiled for one batch size, with its request and the request's own arrays."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self._request = compiled.create_infer_request()
        self._inputs = [self._request.get_tensor(name) for name in ("obs", "noise")]
        self._outputs = [output.get_any_name() for output in compiled.outputs]

    def run(
        self, obs_BO: NDArray[np.float32], noise_BTNA: NDArray[np.float32]
    ) -> dict[str, NDArray[np.float32]]:
        """The outputs by name, of all rows of the graph; the next run overwrites them."""
        for tensor, rows in zip(self._inputs, (obs_BO, noise_BTNA), strict=True):
            data = tensor.data
            data[: len(rows)] = rows
            # Rows that nobody asked for repeat one of this batch: where a graph finds a scale over all its
            # rows (int8), others would move it.
            data[len(rows) :] = rows[-1]
        self._request.infer()
        return {name: self._request.get_tensor(name).data for name in self._outputs}


def pieces(rows: int) -> list[tuple[int, int]]:
    """How a batch is cut: (rows, batch size of the graph that computes them), in order.

    A power of two may run with up to a quarter of its rows idle; a batch that would leave more idle is cut.
    So 5 rows are 4 and 1, and 7 rows are one run of 8.
    """
    found = []
    while rows > 0:
        size = min(1 << (rows - 1).bit_length(), MAX_GRAPH_ROWS)
        if 4 * rows < 3 * size:
            size //= 2
        count = min(rows, size)
        found.append((count, size))
        rows -= count
    return found


def _tensors(nodes: Any) -> list[GraphTensor]:
    found = []
    for node in nodes:
        dtype = node.element_type.to_string()
        shape = tuple(axis.get_length() if axis.is_static else "B" for axis in node.partial_shape)
        found.append(GraphTensor(node.get_any_name(), _TYPES.get(dtype, dtype), shape))
    return found


def _reason(error: Exception) -> str:
    """OpenVINO's messages begin with lines of its source code; the last one says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__
