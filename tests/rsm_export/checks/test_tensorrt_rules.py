"""The static pass for TensorRT: what its parser would refuse, found in the file."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rsm_export.checks.tensorrt_rules import OPSETS, SUPPORTED_TYPES, check_tensorrt
from rsm_export.config import Precision
from rsm_export.graph.fold import fold
from rsm_export.graph.onnx_graph import build_graph

from rsm_common.errors import BundleError
from rsm_common.seeds import draw_noise, expand_seed
from rsm_common.spec import PolicySpec
from rsm_serve.sessions.onnx_structure import read_structure
from rsm_serve.sessions.onnxruntime import OnnxRuntimeSession
from rsm_serve.sessions.tensorrt import TensorRTSession
from tests.bundles import make_model, make_spec
from tests.rsm_export.policies import random_policy, weights_of
from tests.tensorrt_fake import FakeGpu

FLOAT, HALF, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
INT8, INT32, INT64, BOOL, UINT8 = (
    TensorProto.INT8,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.BOOL,
    TensorProto.UINT8,
)


def graph(
    op_type: str,
    inputs: dict[str, int] | None = None,
    output: int = FLOAT,
    *,
    constants: dict[str, Any] | None = None,
    opset: int = 22,
    outputs: int = 1,
    **attributes: Any,
) -> onnx.ModelProto:
    """One node over inputs of the given types, matrices, and constants behind them."""
    given, held = inputs if inputs is not None else {"x": FLOAT}, constants or {}
    names = ["y", *(f"y{index}" for index in range(1, outputs))]
    node = helper.make_node(op_type, [*given, *held], names, name="the_node", **attributes)
    return helper.make_model(
        helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info(name, kind, ["n", "m"]) for name, kind in given.items()],
            [helper.make_tensor_value_info("y", output, None)],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
    )


AXES = {"axes": np.array([1])}


@pytest.mark.parametrize(
    "model",
    [
        graph("Sigmoid"),
        graph("Sigmoid", {"x": BF16}, BF16),
        graph("Mish", {"x": HALF}, HALF),
        graph("Add", {"a": INT64, "b": INT64}, INT64),
        graph("Clip", constants={"low": np.float32(-1), "high": np.float32(1)}),
        graph("Cast", {"x": FLOAT}, BF16, to=BF16),
        graph("Cast", {"x": UINT8}, FLOAT, to=FLOAT),
        graph("Gather", {"x": FLOAT}, constants={"at": np.array([0])}),
        graph("Gather", {"x": BOOL}, BOOL, constants={"at": np.array([0])}),
        graph("ArgMax", {"x": FLOAT}, INT64, axis=1),
        graph("ReduceMax", constants=AXES),
        graph("ReduceMax", opset=13, axes=[1]),
        graph("TopK", constants={"k": np.array([2])}, outputs=2),
        graph("LayerNormalization", constants={"scale": np.ones(3, np.float32)}),
        graph("QuantizeLinear", {"x": FLOAT}, INT8, constants={"s": np.float32(1), "z": np.int8(0)}),
        graph("DequantizeLinear", {"x": INT8}, FLOAT, constants={"s": np.float32(1), "z": np.int8(0)}),
        graph("Where", {"c": BOOL, "a": FLOAT, "b": FLOAT}),
        graph("Max", {"a": FLOAT, "b": FLOAT, "c": FLOAT}),
    ],
    ids=lambda model: model.graph.node[0].op_type,
)
def test_what_the_parser_takes(model):
    check_tensorrt(model)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (graph("Mish", {"x": BF16}, BF16), "operator Mish takes float, float16, got bfloat16 (x)"),
        (graph("Sigmoid", {"x": TensorProto.DOUBLE}, TensorProto.DOUBLE), "got double"),
        (graph("Clip", {"x": INT64}, INT64), "got int64"),
        (graph("MatMul", {"a": INT32, "b": INT32}, INT32), "got int32"),
        (graph("Add", {"a": UINT8, "b": UINT8}, UINT8), "got uint8"),
        (graph("Concat", {"a": INT8, "b": INT8}, INT8, axis=0), "got int8"),
        (graph("Cast", {"x": FLOAT}, INT8, to=INT8), "got int8 (y)"),
        (graph("Cast", {"x": TensorProto.UINT16}, FLOAT, to=FLOAT), "got uint16 (x)"),
        (
            graph("Where", {"c": BOOL, "a": TensorProto.DOUBLE, "b": TensorProto.DOUBLE}, TensorProto.DOUBLE),
            "double",
        ),
        (
            graph("DynamicQuantizeLinear", {"x": FLOAT}, UINT8, outputs=3),
            "operator DynamicQuantizeLinear is not in",
        ),
        (graph("MatMulInteger", {"a": INT8, "b": INT8}, INT32), "operator MatMulInteger is not in"),
        (graph("NonZero", {"x": FLOAT}, INT64), "operator NonZero is not in"),
        (graph("RandomNormal", {}, FLOAT, shape=[2]), "operator RandomNormal is not in"),
        (
            graph("FusedMatMul", {"a": FLOAT, "b": FLOAT}, domain="com.microsoft"),
            "FusedMatMul of com.microsoft",
        ),
        (graph("ReduceSum", {"x": FLOAT, "axes": INT64}), "of operator ReduceSum the axes must be a constant"),
        (graph("Unsqueeze", {"x": FLOAT, "axes": INT64}), "of operator Unsqueeze the axes must be a constant"),
        (graph("TopK", constants={"k": np.array([2])}, outputs=2, sorted=0), "sorted must be 1"),
        (graph("TopK", constants={"k": np.array([3840])}, outputs=2), "K must be at most 3839"),
        (
            graph("LayerNormalization", constants={"s": np.ones(3, np.float32)}, outputs=2),
            "only the first output",
        ),
        (
            graph("QuantizeLinear", {"x": FLOAT}, UINT8, constants={"s": np.float32(1)}),
            "uint8 cannot be the quantised type",
        ),
        (
            graph("QuantizeLinear", {"x": FLOAT}, INT8, constants={"s": np.float32(1), "z": np.int8(3)}),
            "the zero point must be a constant 0",
        ),
        (
            graph("DequantizeLinear", {"x": UINT8}, FLOAT, constants={"s": np.float32(1)}),
            "operator DequantizeLinear takes",
        ),
        (graph("Constant", {}, TensorProto.STRING, value_strings=["a"]), "got string"),
    ],
)
def test_what_the_parser_refuses(model, text):
    with pytest.raises(BundleError, match="export the policy") as caught:
        check_tensorrt(model)
    assert str(caught.value).startswith("TensorRT's parser does not take node 'the_node': ")
    assert text in str(caught.value)


@pytest.mark.parametrize("op_type", ["If", "Loop", "Scan"])
def test_control_flow_is_refused(op_type):
    model = onnx.load_from_string(make_model(make_spec()))
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node(op_type, ["obs"], ["other"], body=body))
    with pytest.raises(BundleError, match=f"node 'other': operator {op_type} is not in the table"):
        check_tensorrt(model)


@pytest.mark.parametrize("opset", [8, 26])
def test_opsets_outside_the_range_are_refused(opset):
    with pytest.raises(BundleError, match=rf"opset from 9 to 25 for TensorRT, got \[{opset}\]"):
        check_tensorrt(graph("Sigmoid", opset=opset))
    assert (OPSETS[0], OPSETS[-1]) == (9, 25)


def test_types_that_do_not_fit_are_one_sentence():
    with pytest.raises(BundleError, match="types of the graph do not fit together"):
        check_tensorrt(graph("Add", {"a": FLOAT, "b": INT64}))


def test_every_operator_of_the_table_is_onnxs_and_takes_float_or_quantised_data():
    for op_type, kinds in SUPPORTED_TYPES.items():
        onnx.defs.get_schema(op_type, 22, "")
        assert FLOAT in kinds or op_type == "DequantizeLinear"
    assert BF16 not in SUPPORTED_TYPES["Mish"]


def test_graphs_of_the_contract_pass():
    check_tensorrt(onnx.load_from_string(make_model(make_spec())))
    check_tensorrt(onnx.load_from_string(make_model(make_spec(has_q=False))))


def exported(seed: int, precision: Precision = "fp32", **kind: Any) -> tuple[bytes, PolicySpec]:
    """The exporter's graph of a policy whose parameters are all random, as after training."""
    # One action: its bias is a single number.
    policy = random_policy(action_size=1, steps=2, particles=3, hidden=(16, 12), seed=seed, kind=kind)
    return build_graph(fold(weights_of(policy)), precision).SerializeToString(deterministic=True), policy.spec


def contents(model: bytes) -> dict[str, bytes]:
    return {tensor.name: tensor.raw_data for tensor in onnx.load_from_string(model).graph.initializer}


@pytest.mark.parametrize("precision", get_args(Precision))
def test_every_precision_of_the_exporter_passes(precision):
    check_tensorrt(onnx.load_from_string(exported(1, precision)[0]))


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer": {"norm": "layer"},
    "batch": {"norm": "batch", "input_norm": True},
    "categorical": {"atoms": 21},
    "all at once": {"norm": "batch", "input_norm": True, "atoms": 21},
}


@pytest.mark.parametrize("kind", KINDS)
def test_exported_policies_pass_and_differ_in_weights_only(tmp_path, monkeypatch, kind):
    """A policy that was trained further is refitted: its graph differs in nothing that would need a build.

    The unit of its values has changed with it, and so have its atoms, which are the limit times the unit.
    """
    first, spec = exported(1, **KINDS[kind], unit=2.0)
    second, _ = exported(2, **KINDS[kind], unit=3.5)
    check_tensorrt(onnx.load_from_string(first))
    structure = read_structure(first)
    assert read_structure(second) == structure
    old, new = contents(first), contents(second)
    assert old.keys() == new.keys()
    assert {name for name in old if old[name] != new[name]} <= set(structure.weights)
    atoms = {name for name in old if name.endswith(".atoms")}
    assert all(old[name] != new[name] for name in atoms)
    assert len(atoms) == (2 if "atoms" in KINDS[kind] else 0)

    gpu = FakeGpu()
    gpu.install(monkeypatch)
    obs = np.random.default_rng(0).normal(size=(3, spec.observation.size)).astype(np.float32)
    noise = draw_noise(expand_seed(0, 3), spec.noise_shape)
    values = []
    for model in (first, second):
        session = TensorRTSession(model, spec, max_batch_size=4, cache_dir=tmp_path)
        answer, wanted = session.run(obs, noise), OnnxRuntimeSession(model, spec).run(obs, noise)
        np.testing.assert_allclose(answer[0], wanted[0], atol=1e-5)
        assert answer[1] is not None
        assert wanted[1] is not None
        np.testing.assert_allclose(answer[1], wanted[1], rtol=1e-4, atol=1e-4)
        values.append(wanted[1])
    assert np.abs(values[0] - values[1]).max() > 0.1
    assert (gpu.counts["build"], gpu.counts["refit"]) == (1, 1)


def test_critics_of_another_kind_are_another_structure():
    """A refit cannot make one of the other; TensorRT builds a new engine, and other runtimes load the file."""
    kinds = [*KINDS.values(), {"atoms": 31}]
    digests = {read_structure(exported(1, **kind)[0]).digest for kind in kinds}
    # BatchNorm is folded: what is left of "batch" is a plain network, and of "all at once" a categorical one.
    assert len(digests) == len(kinds) - 2
