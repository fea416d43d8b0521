"""From the unrolled policy to one self-contained ONNX file."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import torch

from rsm_export.chain import UnrolledPolicy, example_inputs
from rsm_serve.errors import BundleError

OPSET = 18
IR_VERSION = 10
PRODUCER = "rsm-export"

# What a runtime could not unroll, reproduce or give a static shape.
FORBIDDEN_OPS = frozenset(
    {"Loop", "If", "Scan", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
     "Multinomial", "Bernoulli", "NonZero", "Unique", "Compress"}
)  # fmt: skip


def build_graph(module: UnrolledPolicy, noise_shape: tuple[int, int, int]) -> bytes:
    """Export to ONNX, opset 18, batch the only dynamic axis, no external data.

    Args:
        module: the policy.
        noise_shape: (T, N, A).

    Raises:
        BundleError: the graph breaks one of the static rules.
    """
    batch = torch.export.Dim("batch", min=1, max=2**16)
    # Two rows, because a dimension of size 1 would be taken for a constant.
    inputs = example_inputs(module, noise_shape, rows=2)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=["obs", "noise"],
            output_names=["action", "q"],
            dynamic_shapes={"obs": {0: batch}, "noise": {0: batch}},
            verbose=False,
        )
    assert program is not None, "the dynamo exporter returns a program"
    model = program.model_proto
    _strip(model)
    onnx.checker.check_model(model, full_check=True)
    check_static_rules(model)
    return model.SerializeToString(deterministic=True)


def check_static_rules(model: onnx.ModelProto) -> None:
    """Check what every backend relies on.

    Raises:
        BundleError: control flow, randomness or data-dependent shapes; a foreign operator domain; external
            data; or an input or output that is not float32 with the batch as its one dynamic axis.
    """
    for node in model.graph.node:
        if node.op_type in FORBIDDEN_OPS or node.domain not in ("", "ai.onnx"):
            raise BundleError(f"the graph must not contain {node.domain or 'ONNX'} operator {node.op_type}")
    if any(tensor.external_data for tensor in model.graph.initializer):
        raise BundleError("the graph must hold its weights in the same file")
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.tensor_type
        dynamic = [not axis.HasField("dim_value") for axis in kind.shape.dim]
        if kind.elem_type != onnx.TensorProto.FLOAT or dynamic != [True] + [False] * (len(dynamic) - 1):
            raise BundleError(
                f"{value.name} must be float32 with only the batch axis dynamic, got element type "
                f"{kind.elem_type} and dynamic axes {dynamic}"
            )


def _strip(model: onnx.ModelProto) -> None:
    """Remove what depends on the machine and not on the policy, such as stack traces with paths."""
    model.producer_name, model.producer_version = PRODUCER, ""
    model.ir_version = IR_VERSION
    model.doc_string = ""
    del model.metadata_props[:]
    del model.functions[:]
    graph = model.graph
    graph.doc_string = ""
    del graph.metadata_props[:]
    del graph.value_info[:]
    parts: list[Any] = [*graph.node, *graph.input, *graph.output, *graph.initializer]
    for part in parts:
        part.doc_string = ""
        del part.metadata_props[:]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its own progress and deprecations; none of it concerns a user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
