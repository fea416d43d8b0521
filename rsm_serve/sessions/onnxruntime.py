"""Run a bundle's graph with onnxruntime on a CPU or a GPU; the only module that imports onnxruntime."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

# onnxruntime reports its use to its vendor unless told not to before it is imported. A robot calls nobody.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime
from numpy.typing import NDArray

from rsm_common.errors import MissingExtraError
from rsm_common.spec import PolicySpec
from rsm_serve.sessions.signature import FLOAT32, GraphTensor, check_signature, unloadable

Provider = Literal["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"]

NAME = f"onnxruntime {onnxruntime.__version__}"

_SHORT_NAMES: dict[str, str] = {
    "CPUExecutionProvider": "CPU",
    "CUDAExecutionProvider": "CUDA",
    "TensorrtExecutionProvider": "TensorRT",
}


class OnnxRuntimeSession:
    """An unrolled chain in onnxruntime.

    Args:
        model: the content of model.onnx.
        spec: what the graph must take and give.
        provider: where it runs. What a GPU provider cannot do, onnxruntime does on the CPU.
        threads: intra-op threads. One is fastest for small networks, and leaves the other cores to the
            simulator or to other policies.
        device: number of the GPU.
        max_batch_size: most rows of one run, for TensorRT's profile; other providers take any number.
        cache_dir: where TensorRT keeps its engines, which take minutes to build; None builds them anew.

    Raises:
        MissingExtraError: the installed onnxruntime has no such provider, or cannot use it here.
        BundleError: onnxruntime cannot load the graph, or its inputs and outputs are not the policy's.
    """

    def __init__(
        self,
        model: bytes,
        spec: PolicySpec,
        *,
        provider: Provider = "CPUExecutionProvider",
        threads: int = 1,
        device: int = 0,
        max_batch_size: int = 64,
        cache_dir: Path | None = None,
    ) -> None:
        self._provider = provider
        _require_provider(provider)
        providers = provider_options(provider, spec, device, max_batch_size, cache_dir)
        try:
            self._session = onnxruntime.InferenceSession(model, _session_options(threads), providers=providers)
        except Exception as error:  # onnxruntime's exceptions have no common public base
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise unloadable(NAME, spec, reason) from error
        # A provider whose libraries or device are missing is dropped with a line in the log, and the CPU taken.
        used = self._session.get_providers()
        if used[0] != provider:
            raise MissingExtraError(
                f"wanted {provider}, got {used[0]} from {NAME}: it cannot load "
                "CUDA's libraries or finds no GPU; install them, or take the backend onnxruntime"
            )
        # Nor may it happen later, in the midst of serving.
        self._session.disable_fallback()
        check_signature(NAME, spec, _tensors(self._session.get_inputs()), _tensors(self._session.get_outputs()))
        self._outputs = ["action", "q"] if spec.has_q else ["action"]

    @property
    def runtime(self) -> str:
        """Such as "onnxruntime 1.31.1, CUDA"."""
        return f"{NAME}, {_SHORT_NAMES[self._provider]}"

    def run(
        self, obs_BO: NDArray[np.float32], noise_BTNA: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Actions [B, A] and, if the graph has critics, values [B], both float32 and newly allocated."""
        feeds = {"obs": np.ascontiguousarray(obs_BO), "noise": np.ascontiguousarray(noise_BTNA)}
        action_BA, *rest = self._session.run(self._outputs, feeds)
        return action_BA, rest[0] if rest else None

    def close(self) -> None:
        """Release the graph."""
        self._session = None


def provider_options(
    provider: Provider, spec: PolicySpec, device: int, max_batch_size: int, cache_dir: Path | None
) -> list[tuple[str, dict[str, str]]]:
    """The providers to ask for, best first, each with its settings."""
    # Bound to the CPU by name: onnxruntime-gpu would pick CUDA.
    cpu: tuple[str, dict[str, str]] = ("CPUExecutionProvider", {})
    # No CUDA graphs: they do not see new values of inputs that come from the CPU (onnxruntime #29782). No
    # TF32: with its 10 bits of mantissa, actions would not be the exported ones.
    cuda = ("CUDAExecutionProvider", {"device_id": str(device), "enable_cuda_graph": "0", "use_tf32": "0"})
    if provider == "CPUExecutionProvider":
        return [cpu]
    if provider == "CUDAExecutionProvider":
        return [cuda, cpu]
    options = _tensorrt_options(spec, device, max_batch_size, cache_dir)
    return [("TensorrtExecutionProvider", options), cuda, cpu]


def _tensorrt_options(
    spec: PolicySpec, device: int, max_batch_size: int, cache_dir: Path | None
) -> dict[str, str]:
    # The precision is the graph's own, never chosen here.
    options = {"device_id": str(device), "trt_fp16_enable": "0", "trt_cuda_graph_enable": "0"}
    sizes = {"obs": [spec.observation.size], "noise": list(spec.noise_shape)}
    # Without a profile TensorRT builds again, for minutes, whenever a larger batch comes.
    for bound, rows in (("min", 1), ("opt", max_batch_size), ("max", max_batch_size)):
        shapes = (f"{name}:{'x'.join(map(str, [rows, *shape]))}" for name, shape in sizes.items())
        options[f"trt_profile_{bound}_shapes"] = ",".join(shapes)
    if cache_dir is not None:
        cache = str(cache_dir)
        options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": cache}
        options |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": cache}
    return options


def _session_options(threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A spinning worker takes a core from the client or simulator that shares the machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def _require_provider(provider: Provider) -> None:
    if provider == "CPUExecutionProvider":
        return
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise MissingExtraError(
            f"wanted an onnxruntime with {provider}, got {onnxruntime.__version__} with "
            f"{', '.join(available)}; it needs: "
            'pip uninstall onnxruntime, then pip install "rsm-toolkit[serve-gpu]"'
        )
    # CUDA from wheels is on no library path; preload_dlls (1.21 on) finds it. What it prints is no answer
    # of ours, and a server's stdout has one line for programs to read.
    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        with contextlib.redirect_stdout(sys.stderr):
            preload()


def _tensors(nodes: Sequence[Any]) -> list[GraphTensor]:
    found = []
    for node in nodes:
        dtype = node.type.removeprefix("tensor(").removesuffix(")")
        shape = tuple("?" if length is None else length for length in node.shape)
        found.append(GraphTensor(node.name, FLOAT32 if dtype == "float" else dtype, shape))
    return found
