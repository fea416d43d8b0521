"""From the folded policy to one self-contained ONNX file, written operator by operator.

Inputs, outputs, the choice among particles and every first and last layer are float32. `GraphWriter` has the
precision of the layers between.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rsm_export.config import Precision
from rsm_export.graph.fold import FoldedPolicy
from rsm_export.graph.writer import GraphWriter, sign_of
from rsm_train.model.normalizer import LIMIT, ObservationScale

OPSET = 19  # the first whose DequantizeLinear the ONNX reference evaluator knows
IR_VERSION = 10
PRODUCER = "rsm-export"


def build_graph(policy: FoldedPolicy, precision: Precision = "fp32") -> onnx.ModelProto:
    """The graph of a policy: (obs [B, O], noise [B, T, N, A]) -> action [B, A] and, with critics, q [B].

    Opset 19, IR version 10, the batch the only dynamic axis, no external data; the same policy gives the same
    bytes.
    """
    writer = GraphWriter(precision)
    obs_parts = _observe(writer, policy)
    action_RA = policy.sampler.write(writer, obs_parts[0], policy.particles)  # R = B N
    if policy.critics:
        action_RA = _choose(writer, policy, obs_parts[1:], action_RA)
    _to_env(writer, policy, action_RA)
    return _model(writer, policy)


def _model(writer: GraphWriter, policy: FoldedPolicy) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    obs_size, action_size = policy.sampler.network.obs_weight.shape[1], len(policy.scale.low)
    inputs = [
        value("obs", TensorProto.FLOAT, ["batch", obs_size]),
        value("noise", TensorProto.FLOAT, ["batch", policy.sampler.length, policy.particles, action_size]),
    ]
    outputs = [value("action", TensorProto.FLOAT, ["batch", action_size])]
    if policy.critics:
        outputs.append(value("q", TensorProto.FLOAT, ["batch"]))
    tensors = [numpy_helper.from_array(array, name) for name, array in writer.initialisers.items()]
    graph = helper.make_graph(writer.nodes, "policy", inputs, outputs, tensors)
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name=PRODUCER)


def _observe(writer: GraphWriter, policy: FoldedPolicy) -> list[str]:
    """The observation's part of every network's first layer, computed once per observation.

    [R, H] each; [B, H] for a policy network that runs once per observation.
    """
    writer.scope = "observe"
    networks = [policy.sampler.network, *policy.critics]
    signs = [sign_of(network.norms[0]) for network in networks]
    weight = np.concatenate([s * n.obs_weight for s, n in zip(signs, networks, strict=True)])
    bias = np.concatenate([s * n.obs_bias for s, n in zip(signs, networks, strict=True)])
    names = [
        _normalize(writer, policy.obs_scale),
        writer.constant("observe.weight", weight),
        writer.constant("observe.bias", bias),
    ]
    joint = writer.op("Gemm", *names, transB=1)
    widths = [len(network.obs_weight) for network in networks]
    parts = writer.split(joint, widths)
    expanded = [policy.sampler.per_particle, *[True] * len(policy.critics)]
    return [
        writer.per_particle(part, policy.particles, width) if wanted else part
        for part, width, wanted in zip(parts, widths, expanded, strict=True)
    ]


def _normalize(writer: GraphWriter, scale: ObservationScale | None) -> str:
    """The observation as the networks take it. The clip keeps it from being folded into the first layers."""
    if scale is None:
        return "obs"
    centered = writer.op("Sub", "obs", writer.constant("normalizer.mean", scale.mean.numpy()))
    scaled = writer.op("Mul", centered, writer.constant("normalizer.inv_std", scale.inv_std.numpy()))
    return writer.op("Clip", scaled, writer.scalar(-LIMIT), writer.scalar(LIMIT))


def _choose(writer: GraphWriter, policy: FoldedPolicy, obs_parts: list[str], action_RA: str) -> str:
    """The particle of the highest value, [B, A]; its value is the output q."""
    action_size = len(policy.scale.low)
    values = []
    for network, obs_part in zip(policy.critics, obs_parts, strict=True):
        writer.scope = network.name
        weight = writer.constant(
            f"{network.name}.layers.0.action_weight", sign_of(network.norms[0]) * network.action_weight.T
        )
        hidden = writer.hidden(network, writer.op("Add", writer.op("MatMul", action_RA, weight), obs_part))
        out = writer.constant(f"{network.out.name}.weight", network.out.weight)
        bias = writer.constant(f"{network.out.name}.bias", network.out.bias)
        value = writer.op("Gemm", hidden, out, bias, transB=1, alpha=-2.0)
        if network.atoms is not None:
            atoms = writer.constant(f"{network.name}.atoms", network.atoms[:, None])
            value = writer.op("MatMul", writer.op("Softmax", value, axis=-1), atoms)
        values.append(value)
    writer.scope = "choose"
    selected = _select(writer, policy, values)
    q_BN = writer.op("Reshape", selected, writer.shape(-1, policy.particles))
    best = writer.op("ArgMax", q_BN, axis=1, keepdims=1)
    writer.op("ReduceMax", q_BN, writer.shape(1), keepdims=0, output="q")
    action_BNA = writer.op("Reshape", action_RA, writer.shape(-1, policy.particles, action_size))
    return writer.op("GatherND", action_BNA, best, batch_dims=1)


def _select(writer: GraphWriter, policy: FoldedPolicy, values: list[str]) -> str:
    """One value from those of all critics, [R, 1] each; `rsm_train.model.critic.select_value`."""
    if len(values) == 1:
        return values[0]
    if policy.selection == "min":
        return writer.op("Min", *values)
    together = writer.op("Concat", *values, axis=1)
    mean = writer.op("ReduceMean", together, writer.shape(1), keepdims=1)
    if policy.selection == "mean":
        return mean
    deviation = writer.op("Sub", together, mean)
    variance = writer.op("ReduceMean", writer.op("Mul", deviation, deviation), writer.shape(1), keepdims=1)
    spread = writer.op("Mul", writer.op("Sqrt", variance), writer.scalar(policy.selection_std))
    return writer.op("Add", mean, spread)


def _to_env(writer: GraphWriter, policy: FoldedPolicy, action_BA: str) -> None:
    """From [-1, 1] to environment units, inside the bounds in spite of rounding: the output action."""
    writer.scope = "scale"
    center, half_range, low, high = (
        writer.constant(f"action.{name}", getattr(policy.scale, name).numpy())
        for name in ("center", "half_range", "low", "high")
    )
    scaled = writer.op("Add", writer.op("Mul", action_BA, half_range), center)
    writer.op("Min", writer.op("Max", scaled, low), high, output="action")
