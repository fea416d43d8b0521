"""Writes the nodes and initialisers of one ONNX graph, in the order in which they are needed.

`precision` is that of the layers between the first and the last one of a network, which do nearly all of the
arithmetic. The other layers are float32. Initialisers keep the names of the checkpoint's parameters and depend
only on them and on the sampler's settings, so that an engine of one version can be refitted with
the weights of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from rsm_export.config import Precision
from rsm_export.graph.network import Layer, Network, Norm

LAYER_NORM_EPSILON = 1e-5  # torch's default

_HALF: dict[str, tuple[int, Any]] = {
    "fp16": (TensorProto.FLOAT16, np.float16),
    "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}


class GraphWriter:
    """Nodes and initialisers of one graph. `scope` is the prefix of the names of new nodes."""

    def __init__(self, precision: Precision) -> None:
        self._precision = precision
        self.nodes: list[onnx.NodeProto] = []
        self.initialisers: dict[str, NDArray[Any]] = {}
        self._expanded: dict[str, str] = {}
        self.scope = ""

    # --- a network behind its first layer

    def hidden(self, network: Network, first: str) -> str:
        """From the first layer's signed pre-activation to act(x) of the last hidden layer, [R, H]."""
        active = self.activate(first, network.norms[0])
        for layer, norm in zip(network.hidden, network.norms[1:], strict=True):
            active = self.activate(self.linear(active, layer, sign_of(norm)), norm)
        return active

    def activate(self, x: str, norm: Norm | None) -> str:
        """act(x) of x = -pre, or of +pre behind which a LayerNorm comes; see `rsm_export.graph.chain`."""
        if norm is not None:
            scale = self.constant(f"{norm.name}.negated_weight", -norm.scale)
            bias = self.constant(f"{norm.name}.negated_bias", -norm.bias)
            x = self.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=LAYER_NORM_EPSILON)
        s = self.op("Sigmoid", x)
        share = self.op("Softsign", self.op("Mul", s, s))
        return self.op("Mul", x, self.op("Sub", self.scalar(0.5), share))

    def linear(self, active: str, layer: Layer, sign: float) -> str:
        """sign (W mish(pre) + b) from act(x) = -1/2 mish(pre), in the precision of the graph."""
        factors: dict[str, Any] = {"transB": 1, "alpha": -2 * sign}
        name = f"{layer.name}.{bias_name(sign)}"
        if self._precision not in _HALF:
            bias = self.constant(name, sign * layer.bias)
            return self.op("Gemm", active, self._weight(layer), bias, **factors)
        kind, dtype = _HALF[self._precision]
        weight = self.constant(f"{layer.name}.weight", layer.weight.astype(dtype))
        bias = self.constant(name, (sign * layer.bias).astype(dtype))
        product = self.op("Gemm", self.op("Cast", active, to=kind), weight, bias, **factors)
        return self.op("Cast", product, to=TensorProto.FLOAT)

    def _weight(self, layer: Layer) -> str:
        """A weight to multiply with in float32; int8 ones are expanded once per run, not once per step."""
        if self._precision != "int8":
            return self.constant(f"{layer.name}.weight", layer.weight)
        if layer.name not in self._expanded:
            scale = np.maximum(np.abs(layer.weight).max(axis=1), np.finfo(np.float32).tiny) / 127
            rounded = np.rint(layer.weight / scale[:, None]).astype(np.int8)
            names = (
                self.constant(f"{layer.name}.weight", rounded),
                self.constant(f"{layer.name}.weight_scale", scale),
            )
            self._expanded[layer.name] = self.op("DequantizeLinear", *names, axis=0)
        return self._expanded[layer.name]

    # --- nodes and constants

    def per_particle(self, part_BH: str, particles: int, width: int) -> str:
        """Repeat rows: [B, H] -> [B N, H]."""
        if particles == 1:
            return part_BH
        part_B1H = self.op("Unsqueeze", part_BH, self.shape(1))
        part_BNH = self.op("Expand", part_B1H, self.shape(1, particles, 1))
        return self.op("Reshape", part_BNH, self.shape(-1, width))

    def split(self, value: str, widths: Sequence[int]) -> list[str]:
        """Parts of the given widths along axis 1."""
        if len(widths) == 1:
            return [value]
        names = [f"{self.scope}/part_{i}" for i in range(len(widths))]
        self.nodes.append(
            helper.make_node("Split", [value, self.shape(*widths)], names, name=f"{self.scope}/Split", axis=1)
        )
        return names

    def op(self, op_type: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        count = sum(node.op_type == op_type and node.name.startswith(f"{self.scope}/") for node in self.nodes)
        name = f"{self.scope}/{op_type}_{count}"
        output = output or name
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=name, **attributes))
        return output

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Add an initialiser, once, and return its name."""
        known = self.initialisers.setdefault(name, np.asarray(value, order="C"))
        assert np.array_equal(known, value), f"one name, two values: {name}"
        return name

    def scalar(self, value: float) -> str:
        """A float32 number."""
        return self.constant(f"scalar.{np.float32(value)!s}", np.array(value, dtype=np.float32))

    def shape(self, *sizes: int) -> str:
        """A list of int64 sizes or axes."""
        return self.constant("shape." + "x".join(map(str, sizes)), np.array(sizes, dtype=np.int64))


def sign_of(norm: Norm | None) -> float:
    """The sign of a pre-activation as `GraphWriter.activate` takes it: -1, or 1 before a LayerNorm."""
    return -1.0 if norm is None else 1.0


def bias_name(sign: float) -> str:
    """The name of a bias that was multiplied with the sign."""
    return "bias" if sign > 0 else "negated_bias"
