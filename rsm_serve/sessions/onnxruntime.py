"""Run a bundle's graph with onnxruntime on the CPU; the only module that imports onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

# onnxruntime reports its use to its vendor unless told not to before it is imported. A robot calls nobody.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime
from numpy.typing import NDArray

from rsm_serve.errors import BundleError
from rsm_serve.policy import PolicySpec

FLOAT32 = "tensor(float)"


class OnnxRuntimeSession:
    """An unrolled chain in onnxruntime.

    Args:
        model: the content of model.onnx.
        spec: what the graph must take and give.
        threads: intra-op threads. One is fastest for small networks, and leaves the other cores to the
            simulator or to other policies.

    Raises:
        BundleError: onnxruntime cannot load the graph, or its inputs and outputs are not the policy's.
    """

    def __init__(self, model: bytes, spec: PolicySpec, *, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # A spinning worker takes a core from the client or simulator that shares the machine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        try:
            # Bound to CPU by name: onnxruntime-gpu would pick CUDA, which has a session of its own.
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common public base
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BundleError(
                f"onnxruntime {onnxruntime.__version__} cannot load the graph of policy {spec.name!r} "
                f"({reason}); export the policy again"
            ) from error
        check_signature(spec, self._session.get_inputs(), self._session.get_outputs())
        self._outputs = ["action", "q"] if spec.has_q else ["action"]

    def run(
        self, obs_BO: NDArray[np.float32], noise_BTNA: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Actions [B, A] and, if the graph has critics, values [B], both float32 and newly allocated."""
        feeds = {"obs": np.ascontiguousarray(obs_BO), "noise": np.ascontiguousarray(noise_BTNA)}
        action_BA, *rest = self._session.run(self._outputs, feeds)
        return action_BA, rest[0] if rest else None


def check_signature(spec: PolicySpec, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Compare a graph's inputs and outputs (name, type, shape) with the specification.

    Raises:
        BundleError: they differ.
    """
    wanted_inputs = {"obs": [spec.observation.size], "noise": list(spec.noise_shape)}
    wanted_outputs: dict[str, list[int]] = {"action": [spec.action.size]}
    if spec.has_q:
        wanted_outputs["q"] = []
    for kind, wanted, nodes in (("inputs", wanted_inputs, inputs), ("outputs", wanted_outputs, outputs)):
        found = {node.name: node for node in nodes}
        if found.keys() != wanted.keys():
            raise BundleError(
                f"wanted a graph with the {kind} {', '.join(wanted)} for policy {spec.name!r}, "
                f"got {', '.join(found) or 'none'}; export the policy again"
            )
        for name, shape in wanted.items():
            node = found[name]
            # A number in front would be a fixed batch size.
            dynamic = len(node.shape) > 0 and not isinstance(node.shape[0], int)
            if node.type != FLOAT32 or not dynamic or list(node.shape[1:]) != shape:
                raise BundleError(
                    f"wanted {name} of the graph as {FLOAT32} {['B', *shape]} for policy {spec.name!r}, "
                    f"got {node.type} {list(node.shape)}; export the policy again"
                )
