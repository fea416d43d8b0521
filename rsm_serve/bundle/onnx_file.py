"""Reads metadata and tensor locations of ONNX files without the package onnx or a runtime.

An ONNX file is one protobuf message, ModelProto of onnx.proto; the constants below are its field numbers. Other
fields are skipped without being decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rsm_common.errors import BundleError

POLICY_KEY = "rsm.policy"
"""Key of the metadata entry that repeats policy.json."""

MODEL_GRAPH, _MODEL_METADATA = 7, 14
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_OUTPUT = 1, 5, 12
NODE_INPUT, NODE_OP_TYPE, NODE_ATTRIBUTE = 1, 4, 5
ATTRIBUTE_GRAPHS = (6, 11)
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_RAW = 1, 2, 8, 9
_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
_MAX_TAG = (
    2**32 - 1
)  # onnxruntime's protobuf drops higher bits, so it would read another field than this module

# All paths of onnx.proto from a model to a tensor: the fields of each message that lead to tensors. A runtime
# reads an external tensor at any of these places; onnxruntime reads those of sparse tensors even for a model in
# memory.
_WAYS_TO_TENSORS: dict[str, dict[int, str]] = {
    "model": {MODEL_GRAPH: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {GRAPH_NODE: "node", GRAPH_INITIALIZER: "tensor", 15: "sparse tensor"},
    "node": {NODE_ATTRIBUTE: "attribute"},
    "attribute": {5: "tensor", 10: "tensor", 22: "sparse tensor", 23: "sparse tensor"}
    | dict.fromkeys(ATTRIBUTE_GRAPHS, "graph"),
    "sparse tensor": {1: "tensor", 2: "tensor"},
}


def read_metadata(model: bytes) -> dict[str, str]:
    """Return the metadata of a model file.

    Raises:
        BundleError: it is not an ONNX file.
    """
    try:
        entries = (dict(fields(value)) for number, value in fields(model) if number == _MODEL_METADATA)
        return {entry.get(_ENTRY_KEY, b"").decode(): entry.get(_ENTRY_VALUE, b"").decode() for entry in entries}
    except (ValueError, AttributeError):
        raise _not_onnx() from None


def check_self_contained(model: bytes) -> None:
    """Check that a model file holds all of its tensors, because other files were not verified.

    Raises:
        BundleError: a tensor lies in another file, or it is not an ONNX file.
    """
    try:
        outside = next(_external_tensors("model", model), None)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise _not_onnx() from None
    if outside is not None:
        raise BundleError(
            f"wanted a graph that holds its weights itself, got tensor {outside!r} in another file; "
            "export the policy again"
        )


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of every field of a protobuf message: int for varints, bytes for all others.

    Raises:
        ValueError: not a protobuf message, or an incomplete one.
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag > _MAX_TAG:
            raise ValueError(f"protobuf tag {tag} before byte {at}")
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(message, at)
        elif kind in (_FIXED_64, _FIXED_32):
            size = 8 if kind == _FIXED_64 else 4
        else:
            raise ValueError(f"protobuf wire type {kind} at byte {at}")
        if size > len(message) - at:
            raise ValueError(f"a protobuf field of {size} bytes at byte {at} of {len(message)}")
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return (value, position after it) of a number in base 128, least significant digit first."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        digit = message[at]
        at += 1
        value |= (digit & 0x7F) << shift
        if digit < 0x80:
            return value, at
    raise ValueError(f"an unfinished protobuf number before byte {at}")


def _external_tensors(kind: str, message: bytes) -> Iterator[str]:
    """Yield the names of the external tensors in a message; `kind` is a key of _WAYS_TO_TENSORS."""
    if kind == "tensor":
        yield from _if_external(message)
        return
    ways = _WAYS_TO_TENSORS[kind]
    for number, value in fields(message):
        if number in ways:
            yield from _external_tensors(ways[number], value)


def _if_external(tensor: bytes) -> Iterator[str]:
    found = dict(fields(tensor))
    if _TENSOR_EXTERNAL_DATA in found or found.get(_TENSOR_DATA_LOCATION, 0) != 0:
        yield found.get(TENSOR_NAME, b"").decode()


def _not_onnx() -> BundleError:
    return BundleError(
        "wanted an ONNX file, got other or damaged content; copy the file again, or export the policy again"
    )
