"""What one action costs: counted on the graph itself, for a batch of one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx
from onnx import helper


@dataclass(frozen=True)
class GraphCost:
    """Of one run of a graph with one row."""

    nodes: int
    flops: int
    """Multiply-adds of matrix products count twice, every other computing node once per output element."""
    weight_bytes: int
    """Initialisers, which a run reads once, whatever the batch."""
    activation_bytes: int
    """What the computing nodes write, which grows with the batch."""


# What computes nothing: without a copy, and with one.
_VIEWS = frozenset({"Reshape", "Unsqueeze", "Squeeze", "Identity"})
_MOVES = _VIEWS | {"Split", "Expand", "Cast", "GatherND", "Concat"}


def graph_cost(model: onnx.ModelProto) -> GraphCost:
    """Count nodes, floating-point operations and bytes of a graph whose only dynamic axis is the batch."""
    single = onnx.ModelProto()
    single.CopyFrom(model)
    for value in single.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del single.graph.output[:]
    single.graph.output.extend(helper.make_empty_tensor_value_info(value.name) for value in model.graph.output)
    graph = onnx.shape_inference.infer_shapes(single, strict_mode=True, data_prop=True).graph
    shapes = {tensor.name: (list(tensor.dims), tensor.data_type) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        shapes[value.name] = ([axis.dim_value for axis in kind.shape.dim], kind.elem_type)
    flops = written = 0
    for node in graph.node:
        elements = sum(math.prod(shapes[name][0]) for name in node.output)
        if node.op_type in ("Gemm", "MatMul"):
            flops += 2 * elements * _inner_size(node, shapes[node.input[0]][0])
        elif node.op_type not in _MOVES:
            flops += elements
        if node.op_type not in _VIEWS:
            written += sum(
                math.prod(shape) * _size(kind) for shape, kind in map(shapes.__getitem__, node.output)
            )
    weights = sum(math.prod(tensor.dims) * _size(tensor.data_type) for tensor in graph.initializer)
    return GraphCost(len(graph.node), flops, weights, written)


def _inner_size(node: onnx.NodeProto, shape: list[int]) -> int:
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return shape[0] if transposed else shape[-1]


def _size(element_type: int) -> int:
    return int(helper.tensor_dtype_to_np_dtype(element_type).itemsize)
