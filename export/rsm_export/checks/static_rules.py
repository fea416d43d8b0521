"""What every backend relies on, checked on the file alone."""

from __future__ import annotations

import onnx

from rsm_common.errors import BundleError

FORBIDDEN_OPS = frozenset(
    {"Loop", "If", "Scan", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
     "Multinomial", "Bernoulli", "NonZero", "Unique", "Compress"}
)  # fmt: skip
"""What a runtime could not unroll, reproduce or give a static shape."""


def check_model(model: onnx.ModelProto) -> None:
    """The ONNX checker, with strict shape inference.

    Raises:
        BundleError: the graph is not valid ONNX, or shapes or types do not fit together.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BundleError(f"the graph is not valid ONNX: {' '.join(str(error).split())}") from None


def check_static_rules(model: onnx.ModelProto) -> None:
    """Check what every backend relies on.

    Raises:
        BundleError: control flow, randomness or data-dependent shapes; a foreign operator domain; external
            data; or an input or output that is not float32 with the batch as its one dynamic axis.
    """
    for node in model.graph.node:
        if node.op_type in FORBIDDEN_OPS or node.domain not in ("", "ai.onnx"):
            raise BundleError(
                f"the graph must not contain {node.domain or 'ONNX'} operator {node.op_type}, "
                f"got it as node {node.name!r}"
            )
    for tensor in model.graph.initializer:
        if tensor.external_data:
            raise BundleError(
                f"the graph must hold its weights in the same file, got {tensor.name!r} elsewhere"
            )
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.tensor_type
        dynamic = [not axis.HasField("dim_value") for axis in kind.shape.dim]
        if kind.elem_type != onnx.TensorProto.FLOAT or dynamic != [True] + [False] * (len(dynamic) - 1):
            raise BundleError(
                f"{value.name} must be float32 with only the batch axis dynamic, got element type "
                f"{kind.elem_type} and dynamic axes {dynamic}"
            )
