"""What of an ONNX file is structure and what is weights, read without the onnx package.

An engine that TensorRT can refit stays valid for new weights of the same shape. It is therefore looked up by
a digest of the file without the contents of those weights. Only the few fields of onnx.proto that matter are
decoded; all the rest is hashed as it is, so whatever is not understood counts as structure.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from rsm_serve.bundle.onnx_file import (
    ATTRIBUTE_GRAPHS,
    GRAPH_INITIALIZER,
    GRAPH_NODE,
    GRAPH_OUTPUT,
    MODEL_GRAPH,
    NODE_ATTRIBUTE,
    NODE_INPUT,
    NODE_OP_TYPE,
    TENSOR_DIMS,
    TENSOR_NAME,
    TENSOR_RAW,
    TENSOR_TYPE,
    fields,
)

# Element types that a policy's weights have.
_FLOAT, _FLOAT16, _BFLOAT16 = 1, 10, 16
_VALUE_NAME = 1

REFITTABLE_OPS = frozenset({b"MatMul", b"Gemm", b"Add", b"Mul", b"Split", b"LayerNormalization"})
"""Operators whose weight operands TensorRT keeps as weights. Elsewhere it may turn a constant into a setting of
a layer, as with the bounds of Clip, and a refit would then leave the old value in place without a word."""


@dataclass(frozen=True)
class OnnxStructure:
    """An ONNX file without the contents of its weights."""

    digest: str
    """sha256 of everything else, hexadecimal."""
    weights: tuple[str, ...]
    """Names of the initialisers whose contents the digest leaves out, in the file's order."""


def read_structure(model: bytes) -> OnnxStructure:
    """Separate a serialised ONNX model into structure and weights.

    Float tensors that are no scalars and feed nothing but operators of REFITTABLE_OPS are weights. Scalars are
    coefficients of the sampler, which the builder may fold; new weights do not change them.

    Raises:
        ValueError: the bytes are no protobuf message, or end too early.
    """
    graphs = [value for number, value in fields(model) if number == MODEL_GRAPH]
    graph = list(fields(graphs[-1])) if graphs else []
    weights = _weight_names(graph)
    digest = hashlib.sha256()
    for number, value in fields(model):
        if number == MODEL_GRAPH:
            for part, content in fields(value):
                _update(
                    digest,
                    part,
                    _without_content(content, weights) if part == GRAPH_INITIALIZER else content,
                )
        else:
            _update(digest, number, value)
    return OnnxStructure(digest.hexdigest(), tuple(name.decode() for name in weights))


def _weight_names(graph: list[tuple[int, Any]]) -> dict[bytes, None]:
    consumers: defaultdict[bytes, set[bytes]] = defaultdict(set)
    for number, content in graph:
        if number == GRAPH_NODE:
            parts = list(fields(content))
            op_type = next((value for key, value in parts if key == NODE_OP_TYPE), b"")
            for key, value in parts:
                if key == NODE_INPUT:
                    consumers[value].add(op_type)
                elif key == NODE_ATTRIBUTE and any(part in ATTRIBUTE_GRAPHS for part, _ in fields(value)):
                    # A subgraph sees all names of the outer graph; none of our graphs has one.
                    return {}
        elif number == GRAPH_OUTPUT:
            names = [value for key, value in fields(content) if key == _VALUE_NAME]
            consumers[names[-1] if names else b""].add(b"output")
    initializers = [list(fields(content)) for number, content in graph if number == GRAPH_INITIALIZER]
    names = [_name(tensor) for tensor in initializers if _is_weight_like(tensor)]
    return {name: None for name in names if consumers[name] and consumers[name] <= REFITTABLE_OPS}


def _is_weight_like(tensor: list[tuple[int, Any]]) -> bool:
    """Floats with at least one dimension, stored as raw bytes in one field."""
    kinds = [value for key, value in tensor if key == TENSOR_TYPE]
    raw = [value for key, value in tensor if key == TENSOR_RAW]
    has_dims = any(key == TENSOR_DIMS for key, _ in tensor)
    return has_dims and len(raw) == 1 and kinds in ([_FLOAT], [_FLOAT16], [_BFLOAT16])


def _without_content(content: bytes, weights: dict[bytes, None]) -> bytes:
    tensor = list(fields(content))
    if _name(tensor) not in weights:
        return content
    kept = hashlib.sha256()
    for number, value in tensor:
        _update(kept, number, b"" if number == TENSOR_RAW else value)
    return kept.digest()


def _name(tensor: list[tuple[int, Any]]) -> bytes:
    name: bytes = next((value for key, value in tensor if key == TENSOR_NAME), b"")
    return name


def _update(digest: Any, number: int, value: int | bytes) -> None:
    """Add a field; its number, kind and length go in as well, so that fields cannot run into one another."""
    content = value if isinstance(value, bytes) else str(value).encode()
    digest.update(f"{number}:{type(value).__name__}:{len(content)}:".encode())
    digest.update(content)
