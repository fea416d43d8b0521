"""What of an ONNX file is structure and what is weights, read without the onnx package.

An engine that TensorRT can refit stays valid for new weights of the same shape. It is therefore looked up by
a digest of the file without the contents of those weights. Only the few fields of onnx.proto that matter are
decoded; all the rest is hashed as it is, so whatever is not understood counts as structure.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Of onnx.proto: field numbers, and the element types that a policy's weights have.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_OUTPUT = 1, 5, 12
_NODE_INPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE = 1, 4, 5
_ATTRIBUTE_GRAPHS = (6, 11)
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_VALUE_NAME = 1
_FLOAT, _FLOAT16, _BFLOAT16 = 1, 10, 16

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
    graphs = [value for number, value in _fields(model) if number == _MODEL_GRAPH]
    graph = list(_fields(graphs[-1])) if graphs else []
    weights = _weight_names(graph)
    digest = hashlib.sha256()
    for number, value in _fields(model):
        if number == _MODEL_GRAPH:
            for part, content in _fields(value):
                _update(
                    digest, part, _without_content(content, weights) if part == _GRAPH_INITIALIZER else content
                )
        else:
            _update(digest, number, value)
    return OnnxStructure(digest.hexdigest(), tuple(name.decode() for name in weights))


def _weight_names(graph: list[tuple[int, Any]]) -> dict[bytes, None]:
    consumers: defaultdict[bytes, set[bytes]] = defaultdict(set)
    for number, content in graph:
        if number == _GRAPH_NODE:
            fields = list(_fields(content))
            op_type = next((value for key, value in fields if key == _NODE_OP_TYPE), b"")
            for key, value in fields:
                if key == _NODE_INPUT:
                    consumers[value].add(op_type)
                elif key == _NODE_ATTRIBUTE and any(part in _ATTRIBUTE_GRAPHS for part, _ in _fields(value)):
                    # A subgraph sees all names of the outer graph; none of our graphs has one.
                    return {}
        elif number == _GRAPH_OUTPUT:
            names = [value for key, value in _fields(content) if key == _VALUE_NAME]
            consumers[names[-1] if names else b""].add(b"output")
    initializers = [list(_fields(content)) for number, content in graph if number == _GRAPH_INITIALIZER]
    names = [_name(tensor) for tensor in initializers if _is_weight_like(tensor)]
    return {name: None for name in names if consumers[name] and consumers[name] <= REFITTABLE_OPS}


def _is_weight_like(tensor: list[tuple[int, Any]]) -> bool:
    """Floats with at least one dimension, stored as raw bytes in one field."""
    kinds = [value for key, value in tensor if key == _TENSOR_TYPE]
    raw = [value for key, value in tensor if key == _TENSOR_RAW]
    has_dims = any(key == _TENSOR_DIMS for key, _ in tensor)
    return has_dims and len(raw) == 1 and kinds in ([_FLOAT], [_FLOAT16], [_BFLOAT16])


def _without_content(content: bytes, weights: dict[bytes, None]) -> bytes:
    tensor = list(_fields(content))
    if _name(tensor) not in weights:
        return content
    kept = hashlib.sha256()
    for number, value in tensor:
        _update(kept, number, b"" if number == _TENSOR_RAW else value)
    return kept.digest()


def _name(tensor: list[tuple[int, Any]]) -> bytes:
    name: bytes = next((value for key, value in tensor if key == _TENSOR_NAME), b"")
    return name


def _update(digest: Any, number: int, value: int | bytes) -> None:
    """Add a field; its number, kind and length go in as well, so that fields cannot run into one another."""
    content = value if isinstance(value, bytes) else str(value).encode()
    digest.update(f"{number}:{type(value).__name__}:{len(content)}:".encode())
    digest.update(content)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: whole numbers for varints, bytes for all other kinds."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if kind == 2:
            size, position = _varint(message, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"protobuf wire type {kind} at byte {position}")
        if position + size > len(message):
            raise ValueError(f"a protobuf field of {size} bytes at byte {position} of {len(message)}")
        yield number, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """(value, position after it)."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
    raise ValueError(f"an unfinished protobuf number before byte {position}")
