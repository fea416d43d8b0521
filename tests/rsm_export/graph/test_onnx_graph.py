"""The graph: the policy's actions in every runtime, nothing superfluous, names that stay."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from rsm_export.checks.accuracy import TOLERANCES, allowed, compare
from rsm_export.checks.static_rules import check_model, check_static_rules
from rsm_export.checks.tensorrt_rules import check_tensorrt
from rsm_export.config import Precision
from rsm_export.graph.fold import fold
from rsm_export.graph.onnx_graph import OPSET, build_graph

from rsm_serve.sessions import openvino
from rsm_train.model.samplers.common import ActionScale
from rsm_train.policy import TorchPolicy
from tests.rsm_export.policies import chain_of, inputs, random_policy, weights_of, with_chain

POLICIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one particle": {"particles": 1},
    "one step": {"steps": 1},
    "one step, one particle": {"steps": 1, "particles": 1},
    "one hidden layer": {"hidden": (12,)},
    "three hidden layers": {"hidden": (12, 20, 8)},
    "one action": {"action_size": 1, "obs_size": 1},
    "five normalised critics": {
        "critics": 5, "kind": {"norm": "layer"}, "selection": "mean_std", "selection_std": -0.5,
    },
    "mean of critics": {"critics": 3, "selection": "mean"},
    "one critic": {"critics": 1},
    "ddim": {"chain_steps": 3, "eta": 0.0},
    "in between": {"chain_steps": 4, "eta": 0.5, "prior_std": 1.3},
    "Humanoid": {"obs_size": 348, "action_size": 17, "particles": 2, "steps": 3},
}  # fmt: skip

CRITICS: dict[str, dict[str, Any]] = {
    "plain": {"unit": 40.0},
    "layer": {"norm": "layer", "unit": 0.02},
    "batch": {"norm": "batch", "unit": 7.0},
    "normalised input": {"input_norm": True},
    "categorical": {"atoms": 31, "limit": 3.0},
    "categorical in small units": {"atoms": 101, "unit": 0.01},
    "categorical in large units": {"atoms": 101, "unit": 300.0},
    "all at once": {"norm": "batch", "input_norm": True, "atoms": 51, "unit": 40.0},
    "layer, categorical": {"norm": "layer", "input_norm": True, "atoms": 51, "unit": 4.0},
}
"""Kinds of critics, their values in other units."""


def in_onnxruntime(model, feeds):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


CORE = openvino._core()  # imported without its telemetry, and one for the process


def in_openvino(model, feeds):
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    result = CORE.compile_model(CORE.read_model(model.SerializeToString()), "CPU", settings)(feeds)
    return list(result.values())


def in_reference(model, feeds):
    return ReferenceEvaluator(model).run(None, feeds)


RUNTIMES = {"onnxruntime": in_onnxruntime, "openvino": in_openvino, "onnx reference": in_reference}


def follows(policy: TorchPolicy, precision: Precision, answer, feeds):
    tolerance = allowed(policy, feeds["obs"], feeds["noise"], precision)
    action, q = answer if policy.spec.has_q else (answer[0], None)
    return compare(policy, feeds["obs"], feeds["noise"], action, q, tolerance)


@pytest.mark.parametrize("kind", POLICIES)
def test_the_graph_acts_like_the_policy(kind):
    policy = random_policy(**POLICIES[kind])
    model = build_graph(fold(weights_of(policy)))
    check_model(model)
    check_static_rules(model)
    for rows in (1, 33):
        feeds = inputs(policy.spec, rows)
        accuracy = follows(policy, "fp32", in_onnxruntime(model, feeds), feeds)
        assert accuracy.tolerance.action < 2e-4
        assert accuracy.rows == rows
    wanted = policy.act(feeds["obs"], noise=feeds["noise"]).action
    assert wanted.std() > 0.05, "a constant policy would agree with anything"


@pytest.mark.parametrize("kind", CRITICS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_every_kind_of_critics_in_every_precision(kind, precision: Precision):
    # Critics are the subject here: the chain of this seed multiplies rounding by little (a fifth of what is
    # allowed), that of some others by more than fp16 can bear.
    policy = random_policy(kind=CRITICS[kind], seed=5)
    model = build_graph(fold(weights_of(policy)), precision)
    check_model(model)
    check_static_rules(model)
    check_tensorrt(model)
    feeds = inputs(policy.spec, 40)
    runtimes = (
        RUNTIMES if precision != "bf16" else {name: RUNTIMES[name] for name in ("openvino", "onnx reference")}
    )
    for name, run in runtimes.items():
        accuracy = follows(policy, precision, run(model, feeds), feeds)
        assert accuracy.max_q_error is not None
        assert accuracy.max_q_error <= TOLERANCES[precision] or precision == "fp32", name


@pytest.mark.parametrize("kind", CRITICS)
def test_values_are_in_the_unit_and_the_unit_changes_no_action(kind):
    one, other = ({**CRITICS[kind], "unit": unit} for unit in (1.0, 8.0))
    policies = [random_policy(kind=found) for found in (one, other)]
    feeds = inputs(policies[0].spec, 30)
    answers = [in_onnxruntime(build_graph(fold(weights_of(policy))), feeds) for policy in policies]
    np.testing.assert_array_equal(answers[0][0], answers[1][0])
    np.testing.assert_allclose(8 * answers[0][1], answers[1][1], rtol=1e-5)
    assert answers[0][1].std() > 0.01


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_every_runtime_gives_the_same_actions(runtime, precision: Precision):
    if (runtime, precision) == ("onnxruntime", "bf16"):
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented):
            in_onnxruntime(build_graph(fold(weights_of(random_policy())), "bf16"), {})
        return
    policy = random_policy()
    feeds = inputs(policy.spec, 40)
    model = build_graph(fold(weights_of(policy)), precision)
    accuracy = follows(policy, precision, RUNTIMES[runtime](model, feeds), feeds)
    if precision == "fp32":
        assert accuracy.max_error <= 1e-5
        assert accuracy.other_particle_rate == 0
    else:
        assert accuracy.max_error > 1e-5, "reduced precision that reduces nothing"


@pytest.mark.parametrize(
    ("precision", "kind", "dtype"),
    [("fp16", TensorProto.FLOAT16, np.float16), ("bf16", TensorProto.BFLOAT16, ml_dtypes.bfloat16)],
)
def test_hidden_layers_alone_are_in_half_precision(precision: Precision, kind, dtype):
    model = build_graph(fold(weights_of(random_policy(hidden=(24, 16, 8)))), precision)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    half = {name for name, tensor in tensors.items() if tensor.data_type == kind}
    names = [f"{network}.layers.{i}" for network in ("policy", "critic.0", "critic.1") for i in (1, 2)]
    assert half == {f"{name}.{part}" for name in names for part in ("weight", "negated_bias")}
    assert numpy_helper.to_array(tensors["policy.layers.1.weight"]).dtype == dtype
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    clips = [node.output[0] for node in model.graph.node if node.op_type in ("Clip", "ArgMax", "Min")]
    assert {kinds.get(name, TensorProto.FLOAT) for name in clips} == {TensorProto.FLOAT, TensorProto.INT64}


def test_int8_holds_weights_of_a_quarter_and_expands_each_once():
    policy = random_policy(hidden=(64, 64, 64))
    full, small = (build_graph(fold(weights_of(policy)), precision) for precision in ("fp32", "int8"))
    expanded = [node for node in small.graph.node if node.op_type == "DequantizeLinear"]
    assert len(expanded) == 2 * 3
    assert small.ByteSize() < 0.5 * full.ByteSize()
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in small.graph.initializer}
    restored = held["policy.layers.1.weight"] * held["policy.layers.1.weight_scale"][:, None]
    (wanted,) = (numpy_helper.to_array(t) for t in full.graph.initializer if t.name == "policy.layers.1.weight")
    assert np.abs(restored - wanted).max() <= np.abs(wanted).max() / 254 + 1e-7


def test_every_row_of_int8_weights_has_its_own_scale_and_zeros_stay_zeros():
    policy = random_policy(hidden=(16, 16))
    weight = weights_of(policy).denoiser.tail["layers.1.weight"]
    weight[0] *= 1e-3
    weight[1] = 0
    feeds = inputs(policy.spec, 5)
    model = build_graph(fold(weights_of(policy)), "int8")
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    restored = held["policy.layers.1.weight"] * held["policy.layers.1.weight_scale"][:, None]
    steps = np.abs(weight.numpy()).max(axis=1, keepdims=True) / 127
    assert (np.abs(restored - weight.numpy()) <= 0.5001 * steps).all()
    assert np.isfinite(in_onnxruntime(model, feeds)[0]).all()


@pytest.mark.parametrize("bounds", [(-0.4, 0.2), (-0.4, 0.3)])
def test_actions_stay_inside_the_bounds_in_spite_of_rounding(bounds):
    """In float32, the centre and half the range of the first are above 0.2, of the second below -0.4."""
    low, high = (torch.full((3,), bound) for bound in bounds)
    scale = ActionScale((high + low) / 2, (high - low) / 2, low, high)
    beyond = (scale.center + scale.half_range > high) | (scale.center - scale.half_range < low)
    assert beyond.all(), "these bounds test nothing"
    policy = random_policy()
    weights = dataclasses.replace(weights_of(policy), scale=scale)
    action = in_onnxruntime(build_graph(fold(weights)), inputs(policy.spec, 100))[0]
    assert action.min() == low[0].item()
    assert action.max() == high[0].item()


def structure(model):
    """The graph without the contents of its tensors, but with the scalars that are no weights."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        if not tensor.name.startswith(("scalar.", "shape.")):
            tensor.raw_data = b""
    return bare.SerializeToString(deterministic=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_new_weights_change_initialisers_alone_and_no_name(precision: Precision):
    one, same, other = (
        build_graph(fold(weights_of(random_policy(seed=seed))), precision) for seed in (0, 0, 1)
    )
    assert one.SerializeToString(deterministic=True) == same.SerializeToString(deterministic=True)
    assert one.SerializeToString() != other.SerializeToString()
    assert structure(one) == structure(other)


def test_names_are_those_of_the_checkpoint():
    model = build_graph(fold(weights_of(random_policy(kind={"norm": "layer"}))))
    names = {tensor.name for tensor in model.graph.initializer}
    assert {
        "policy.layers.0.action_weight",
        "policy.layers.1.weight",
        "policy.layers.1.negated_bias",
        "policy.layers.2.weight",
        "policy.steps.5.negated_bias",
        "critic.1.layers.1.weight",
        "critic.1.layers.1.bias",
        "critic.1.norms.0.negated_weight",
        "observe.weight",
        "noise.scale",
        "action.half_range",
    } <= names
    weights = weights_of(random_policy(kind={"norm": "layer"}))
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_array_equal(held["policy.layers.1.weight"], weights.denoiser.tail["layers.1.weight"])
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)


def test_what_does_not_depend_on_the_step_or_the_particle_is_computed_once():
    model = build_graph(fold(weights_of(random_policy(steps=6, particles=4, hidden=(24, 16)))))
    nodes = model.graph.node
    assert [node.op_type for node in nodes if "obs" in node.input] == ["Gemm"]
    assert [node.op_type for node in nodes if "noise" in node.input] == ["Mul"]
    count = {
        op: sum(node.op_type == op for node in nodes) for op in ("Gemm", "Mish", "Softplus", "Sin", "Gather")
    }
    # The observation's part, three layers in six steps, and two layers of each critic.
    assert count == {"Gemm": 1 + 3 * 6 + 2 * 2, "Mish": 0, "Softplus": 0, "Sin": 0, "Gather": 0}
    assert [opset.version for opset in model.opset_import] == [OPSET]
    assert model.ir_version == 10
    alone = build_graph(fold(weights_of(random_policy(steps=6, particles=1))))
    assert [node.op_type for node in alone.graph.node].count("Reshape") == 1
    assert "Expand" not in [node.op_type for node in alone.graph.node]


def test_a_wrong_weight_is_told_from_the_policy():
    policy = random_policy()
    folded = fold(weights_of(policy))
    chain = chain_of(folded)
    feeds = inputs(policy.spec, 20)
    for changed in (
        with_chain(folded, noise_shift=chain.noise_shift + 0.01),
        with_chain(folded, steps=chain.steps[:1] + chain.steps[:1] + chain.steps[2:]),
        dataclasses.replace(folded, critics=folded.critics[:1]),
    ):
        with pytest.raises(Exception, match="does not (act|value) like the policy"):
            follows(policy, "fp32", in_onnxruntime(build_graph(changed), feeds), feeds)
