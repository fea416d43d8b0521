"""From the folded policy to one self-contained ONNX file, written operator by operator.

Inputs, outputs, the latent, the choice among particles and every first and last layer are float32; `precision`
is that of the layers between, where nearly all of the arithmetic is. Initialisers keep the names of the
checkpoint's parameters and depend on nothing but them and the sampler's settings, so that an engine built from
one version can be refitted with the weights of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from rsm_export.config import Precision
from rsm_export.graph.chain import FoldedPolicy, Layer, Network, Norm

OPSET = 19  # the first whose DequantizeLinear the ONNX reference evaluator knows
IR_VERSION = 10
PRODUCER = "rsm-export"
LAYER_NORM_EPSILON = 1e-5  # torch's default

_HALF: dict[str, tuple[int, Any]] = {
    "fp16": (TensorProto.FLOAT16, np.float16),
    "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}


def build_graph(policy: FoldedPolicy, precision: Precision = "fp32") -> onnx.ModelProto:
    """The graph of DESIGN: (obs [B, O], noise [B, T, N, A]) -> action [B, A] and, with critics, q [B].

    Opset 19, IR version 10, the batch the only dynamic axis, no external data; the same policy gives the same
    bytes.
    """
    return _Writer(precision).write(policy)


class _Writer:
    """Nodes and initialisers of one graph, in the order they are needed."""

    def __init__(self, precision: Precision) -> None:
        self._precision = precision
        self._nodes: list[onnx.NodeProto] = []
        self._initialisers: dict[str, NDArray[Any]] = {}
        self._expanded: dict[str, str] = {}
        self._scope = ""

    def write(self, policy: FoldedPolicy) -> onnx.ModelProto:
        steps, particles, action_size = len(policy.steps), policy.particles, len(policy.scale.low)
        obs_parts = self._observe(policy)
        noise = self._noise(policy, steps, particles, action_size)
        action_RA = self._denoise(policy, obs_parts[0], noise)  # R = B N
        if policy.critics:
            action_RA = self._choose(policy, obs_parts[1:], action_RA, action_size)
        self._to_env(policy, action_RA)
        value = helper.make_tensor_value_info
        obs_size = policy.denoiser.obs_weight.shape[1]
        inputs = [
            value("obs", TensorProto.FLOAT, ["batch", obs_size]),
            value("noise", TensorProto.FLOAT, ["batch", steps, particles, action_size]),
        ]
        outputs = [value("action", TensorProto.FLOAT, ["batch", action_size])]
        if policy.critics:
            outputs.append(value("q", TensorProto.FLOAT, ["batch"]))
        tensors = [numpy_helper.from_array(array, name) for name, array in self._initialisers.items()]
        graph = helper.make_graph(self._nodes, "policy", inputs, outputs, tensors)
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name=PRODUCER)

    # --- the parts, in the order of the data

    def _observe(self, policy: FoldedPolicy) -> list[str]:
        """The observation's part of every network's first layer, once per observation: [R, H] each."""
        self._scope = "observe"
        networks = [policy.denoiser, *policy.critics]
        signs = [_sign(network.norms[0]) for network in networks]
        weight = np.concatenate([s * n.obs_weight for s, n in zip(signs, networks, strict=True)])
        bias = np.concatenate([s * n.obs_bias for s, n in zip(signs, networks, strict=True)])
        names = ["obs", self._constant("observe.weight", weight), self._constant("observe.bias", bias)]
        joint = self._op("Gemm", *names, transB=1)
        widths = [len(network.obs_weight) for network in networks]
        return [
            self._per_particle(part, policy.particles, width)
            for part, width in zip(self._split(joint, widths), widths, strict=True)
        ]

    def _noise(self, policy: FoldedPolicy, steps: int, particles: int, action_size: int) -> list[str]:
        """y_0 and the n of every later step, [R, A] each."""
        self._scope = "noise"
        scaled = self._op("Mul", "noise", self._constant("noise.scale", policy.noise_scale))
        shifted = self._op("Add", scaled, self._constant("noise.shift", policy.noise_shift))
        flat = self._op("Reshape", shifted, self._shape(0, steps * particles * action_size))
        parts = self._split(flat, [particles * action_size] * steps)
        if particles == 1:
            return parts
        return [self._op("Reshape", part, self._shape(-1, action_size)) for part in parts]

    def _denoise(self, policy: FoldedPolicy, obs_part: str, noise: list[str]) -> str:
        """All reverse steps: the particles in [-1, 1], [R, A]."""
        network = policy.denoiser
        weight = self._constant(f"{network.name}.layers.0.action_weight", network.action_weight)
        out = self._constant(f"{network.out.name}.weight", network.out.weight)
        y = noise[0]
        for k, step in enumerate(policy.steps):
            self._scope = f"step.{k}"
            sign = _sign(network.norms[0])
            bias = self._constant(f"{network.name}.steps.{k}.{_bias(sign)}", sign * step.bias)
            action_part = self._op("Gemm", y, weight, bias, transB=1, alpha=sign * step.action_scale)
            hidden = self._hidden(network, self._op("Add", action_part, obs_part))
            gain = step.gain
            clean = self._op("Gemm", hidden, out, y, transB=1, alpha=2 * gain * step.noise_scale, beta=gain)
            clean = self._op("Clip", clean, self._scalar(-gain), self._scalar(gain))
            if k + 1 < len(policy.steps):
                carried = self._op("Mul", y, self._scalar(step.carry))
                y = self._op("Add", self._op("Add", clean, carried), noise[k + 1])
        return clean

    def _choose(self, policy: FoldedPolicy, obs_parts: list[str], action_RA: str, action_size: int) -> str:
        """The particle of the highest value, [B, A]; its value is the output q."""
        values = []
        for network, obs_part in zip(policy.critics, obs_parts, strict=True):
            self._scope = network.name
            weight = self._constant(
                f"{network.name}.layers.0.action_weight", _sign(network.norms[0]) * network.action_weight.T
            )
            hidden = self._hidden(network, self._op("Add", self._op("MatMul", action_RA, weight), obs_part))
            out = self._constant(f"{network.out.name}.weight", network.out.weight)
            bias = self._constant(f"{network.out.name}.bias", network.out.bias)
            values.append(self._op("Gemm", hidden, out, bias, transB=1, alpha=-2.0))
        self._scope = "choose"
        selected = self._select(policy, values)
        q_BN = self._op("Reshape", selected, self._shape(-1, policy.particles))
        best = self._op("ArgMax", q_BN, axis=1, keepdims=1)
        self._op("ReduceMax", q_BN, self._shape(1), keepdims=0, output="q")
        action_BNA = self._op("Reshape", action_RA, self._shape(-1, policy.particles, action_size))
        return self._op("GatherND", action_BNA, best, batch_dims=1)

    def _select(self, policy: FoldedPolicy, values: list[str]) -> str:
        """One value from those of all critics, [R, 1] each; `rsm_train.model.critic.select_value`."""
        if len(values) == 1:
            return values[0]
        if policy.selection == "min":
            return self._op("Min", *values)
        together = self._op("Concat", *values, axis=1)
        mean = self._op("ReduceMean", together, self._shape(1), keepdims=1)
        if policy.selection == "mean":
            return mean
        deviation = self._op("Sub", together, mean)
        variance = self._op("ReduceMean", self._op("Mul", deviation, deviation), self._shape(1), keepdims=1)
        spread = self._op("Mul", self._op("Sqrt", variance), self._scalar(policy.selection_std))
        return self._op("Add", mean, spread)

    def _to_env(self, policy: FoldedPolicy, action_BA: str) -> None:
        """From [-1, 1] to environment units, inside the bounds in spite of rounding: the output action."""
        self._scope = "scale"
        center, half_range, low, high = (
            self._constant(f"action.{name}", getattr(policy.scale, name).numpy())
            for name in ("center", "half_range", "low", "high")
        )
        scaled = self._op("Add", self._op("Mul", action_BA, half_range), center)
        self._op("Min", self._op("Max", scaled, low), high, output="action")

    # --- a network behind its first layer

    def _hidden(self, network: Network, first: str) -> str:
        """From the first layer's signed pre-activation to act(x) of the last hidden layer, [R, H]."""
        active = self._activate(first, network.norms[0])
        for layer, norm in zip(network.hidden, network.norms[1:], strict=True):
            active = self._activate(self._linear(active, layer, _sign(norm)), norm)
        return active

    def _activate(self, x: str, norm: Norm | None) -> str:
        """act(x) of x = -pre, or of +pre behind which a LayerNorm comes; see `rsm_export.graph.chain`."""
        if norm is not None:
            scale = self._constant(f"{norm.name}.negated_weight", -norm.scale)
            bias = self._constant(f"{norm.name}.negated_bias", -norm.bias)
            x = self._op("LayerNormalization", x, scale, bias, axis=-1, epsilon=LAYER_NORM_EPSILON)
        s = self._op("Sigmoid", x)
        share = self._op("Softsign", self._op("Mul", s, s))
        return self._op("Mul", x, self._op("Sub", self._scalar(0.5), share))

    def _linear(self, active: str, layer: Layer, sign: float) -> str:
        """sign (W mish(pre) + b) from act(x) = -1/2 mish(pre), in the precision of the graph."""
        factors: dict[str, Any] = {"transB": 1, "alpha": -2 * sign}
        name = f"{layer.name}.{_bias(sign)}"
        if self._precision not in _HALF:
            bias = self._constant(name, sign * layer.bias)
            return self._op("Gemm", active, self._weight(layer), bias, **factors)
        kind, dtype = _HALF[self._precision]
        weight = self._constant(f"{layer.name}.weight", layer.weight.astype(dtype))
        bias = self._constant(name, (sign * layer.bias).astype(dtype))
        product = self._op("Gemm", self._op("Cast", active, to=kind), weight, bias, **factors)
        return self._op("Cast", product, to=TensorProto.FLOAT)

    def _weight(self, layer: Layer) -> str:
        """A weight to multiply with in float32; int8 ones are expanded once per run, not once per step."""
        if self._precision != "int8":
            return self._constant(f"{layer.name}.weight", layer.weight)
        if layer.name not in self._expanded:
            scale = np.maximum(np.abs(layer.weight).max(axis=1), np.finfo(np.float32).tiny) / 127
            rounded = np.rint(layer.weight / scale[:, None]).astype(np.int8)
            names = (
                self._constant(f"{layer.name}.weight", rounded),
                self._constant(f"{layer.name}.weight_scale", scale),
            )
            self._expanded[layer.name] = self._op("DequantizeLinear", *names, axis=0)
        return self._expanded[layer.name]

    # --- nodes and constants

    def _per_particle(self, part_BH: str, particles: int, width: int) -> str:
        if particles == 1:
            return part_BH
        part_B1H = self._op("Unsqueeze", part_BH, self._shape(1))
        part_BNH = self._op("Expand", part_B1H, self._shape(1, particles, 1))
        return self._op("Reshape", part_BNH, self._shape(-1, width))

    def _split(self, value: str, widths: Sequence[int]) -> list[str]:
        """Parts of the given widths along axis 1."""
        if len(widths) == 1:
            return [value]
        names = [f"{self._scope}/part_{i}" for i in range(len(widths))]
        self._nodes.append(
            helper.make_node("Split", [value, self._shape(*widths)], names, name=f"{self._scope}/Split", axis=1)
        )
        return names

    def _op(self, op_type: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        count = sum(node.op_type == op_type and node.name.startswith(f"{self._scope}/") for node in self._nodes)
        name = f"{self._scope}/{op_type}_{count}"
        output = output or name
        self._nodes.append(helper.make_node(op_type, list(inputs), [output], name=name, **attributes))
        return output

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        known = self._initialisers.setdefault(name, np.asarray(value, order="C"))
        assert np.array_equal(known, value), f"one name, two values: {name}"
        return name

    def _scalar(self, value: float) -> str:
        return self._constant(f"scalar.{np.float32(value)!s}", np.array(value, dtype=np.float32))

    def _shape(self, *sizes: int) -> str:
        return self._constant("shape." + "x".join(map(str, sizes)), np.array(sizes, dtype=np.int64))


def _sign(norm: Norm | None) -> float:
    """Of the pre-activation that a layer gives: what `_Writer._activate` wants."""
    return -1.0 if norm is None else 1.0


def _bias(sign: float) -> str:
    return "bias" if sign > 0 else "negated_bias"
