"""What TensorRT's ONNX parser takes, checked on the file, without TensorRT.

The table is that of TensorRT 10.15, from docs/operators.md of the parser's repository (onnx/onnx-tensorrt), as
far as a policy's graph could have use of it: an operator that is not in it is refused here even if TensorRT has
it. TensorRT 11 made networks strongly typed: a type that an operator lacks is an error there, no silent detour.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, defs, numpy_helper, shape_inference

from rsm_common.errors import BundleError

OPSETS = range(9, 26)
"""Opsets that the parser of TensorRT 11 takes."""
MAX_TOPK = 3839

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
_NUMBERS = _FLOATS | {TensorProto.INT32, TensorProto.INT64}
_ANY = _NUMBERS | {TensorProto.BOOL}
_FP8 = TensorProto.FLOAT8E4M3FN
_QUANTIZED = frozenset({TensorProto.INT8, TensorProto.INT4, _FP8})

SUPPORTED_TYPES: dict[str, frozenset[int]] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Neg", "Min", "Max", "Abs", "Pow"), _NUMBERS),
    **dict.fromkeys(
        ("Sigmoid", "Tanh", "Softplus", "Softsign", "Exp", "Log", "Sqrt", "Clip", "Erf", "Reciprocal"), _FLOATS
    ),
    **dict.fromkeys(("Gemm", "MatMul", "LayerNormalization", "Softmax"), _FLOATS),
    **dict.fromkeys(
        ("ReduceMax", "ReduceMin", "ReduceMean", "ReduceSum", "ArgMax", "ArgMin", "TopK"), _NUMBERS
    ),
    **dict.fromkeys(("Relu", "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"), _NUMBERS),
    **dict.fromkeys(("Reshape", "Unsqueeze", "Squeeze", "Expand", "Flatten", "Transpose", "Shape"), _ANY),
    **dict.fromkeys(("Concat", "Split", "Slice", "Tile", "Identity", "Where"), _ANY),
    **dict.fromkeys(("Gather", "GatherElements", "GatherND"), _ANY),
    "Cast": _ANY | {TensorProto.UINT8},
    "Constant": _ANY | {_FP8, TensorProto.INT4},
    "ConstantOfShape": _ANY | {_FP8, TensorProto.INT4},
    "Mish": frozenset({TensorProto.FLOAT, TensorProto.FLOAT16}),
    "QuantizeLinear": _FLOATS,
    "DequantizeLinear": _QUANTIZED,
}
"""Operator -> element types of its data. FP4 is left out: not every onnx that we support can name it."""

_REDUCTIONS = ("ReduceMax", "ReduceMin", "ReduceMean", "ReduceSum")


def check_tensorrt(model: onnx.ModelProto) -> None:
    """Check that TensorRT's parser takes the graph.

    Raises:
        BundleError: an opset, an operator, an element type or a use of an operator that it does not take, or
            types that do not fit together; of several the first, with its node.
    """
    versions = [opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")]
    if len(versions) != 1 or versions[0] not in OPSETS:
        raise BundleError(
            f"wanted a graph of one opset from {OPSETS[0]} to {OPSETS[-1]} for TensorRT, got {versions}; "
            "export the policy with this version of rsm-toolkit"
        )
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in SUPPORTED_TYPES:
            domain = "" if node.domain in ("", "ai.onnx") else f" of {node.domain}"
            raise _refusal(node, f"operator {node.op_type}{domain} is not in the table of those it takes")
    types, constants = _element_types(model), _constants(model)
    for node in model.graph.node:
        _check_types(node, types, versions[0])
        restriction = _broken_restriction(node, constants, types)
        if restriction:
            raise _refusal(node, f"of operator {node.op_type} {restriction}")


def _check_types(node: NodeProto, types: dict[str, int], opset: int) -> None:
    allowed = SUPPORTED_TYPES[node.op_type]
    for name in _data_tensors(node, opset):
        if types.get(name) not in allowed:
            wanted = ", ".join(sorted(_type_name(kind) for kind in allowed))
            got = f"{_type_name(types.get(name))} ({name})"
            raise _refusal(node, f"operator {node.op_type} takes {wanted}, got {got}")


def _element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor, by name."""
    try:
        graph = shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    except Exception as error:  # InferenceError is not public
        reason = str(error).splitlines()[0]
        raise BundleError(
            f"the types of the graph do not fit together ({reason}); export the policy again"
        ) from None
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    return types


def _constants(model: onnx.ModelProto) -> dict[str, TensorProto]:
    """Initialisers, and what Constant nodes hold as a tensor."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                found[node.output[0]] = attribute.t
    return found


def _data_tensors(node: NodeProto, opset: int) -> Iterator[str]:
    """Inputs that the table's types are about, those of the operator's own type parameter, and Cast's output.

    Shapes, indices and axes are not among them, nor is what a comparison gives.
    """
    if node.op_type in ("Constant", "ConstantOfShape"):
        yield node.output[0]
        return
    if node.op_type == "Cast":
        yield node.output[0]
    formal = defs.get_schema(node.op_type, opset, "").inputs
    data = formal[1 if node.op_type == "Where" else 0].type_str
    for index, name in enumerate(node.input):
        # The last formal input may be variadic.
        if name and formal[min(index, len(formal) - 1)].type_str == data:
            yield name


def _broken_restriction(
    node: NodeProto, constants: dict[str, TensorProto], types: dict[str, int]
) -> str | None:
    """What the table says of an operator besides types, where this node breaks it."""
    if node.op_type in (*_REDUCTIONS, "Squeeze", "Unsqueeze"):
        axes = node.input[1] if len(node.input) > 1 else ""  # an attribute in old opsets
        return "the axes must be a constant" if axes and axes not in constants else None
    if node.op_type == "LayerNormalization":
        return None if not any(node.output[1:]) else "only the first output may be used"
    if node.op_type == "TopK":
        return _broken_topk(node, constants)
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return _broken_quantization(node, constants, types)
    if node.op_type == "Constant":
        kinds = {attribute.name for attribute in node.attribute}
        refused = kinds & {"sparse_value", "value_string", "value_strings"}
        return f"{', '.join(sorted(refused))} cannot be read" if refused else None
    return None


def _broken_topk(node: NodeProto, constants: dict[str, TensorProto]) -> str | None:
    if any(attribute.name == "sorted" and attribute.i != 1 for attribute in node.attribute):
        return "sorted must be 1"
    count = constants.get(node.input[1]) if len(node.input) > 1 else None
    if count is not None and int(numpy_helper.to_array(count).max()) > MAX_TOPK:
        return f"K must be at most {MAX_TOPK}"
    return None


def _broken_quantization(
    node: NodeProto, constants: dict[str, TensorProto], types: dict[str, int]
) -> str | None:
    """Quantisation is symmetric, and to signed types."""
    quantized = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
    if types.get(quantized) not in _QUANTIZED:
        return f"{_type_name(types.get(quantized))} cannot be the quantised type"
    if len(node.input) < 3 or not node.input[2]:
        return None
    zero = constants.get(node.input[2])
    if zero is None or np.any(numpy_helper.to_array(zero).astype(np.float32) != 0):
        return "the zero point must be a constant 0"
    return None


def _refusal(node: NodeProto, what: str) -> BundleError:
    name = node.name or (node.output[0] if node.output else "?")
    return BundleError(
        f"TensorRT's parser does not take node {name!r}: {what}; export the policy in another "
        "precision, or for another backend"
    )


def _type_name(kind: int | None) -> str:
    return "an unknown type" if not kind else TensorProto.DataType.Name(kind).lower()
