"""Metadata of an ONNX file, read without onnx or a runtime: any backend, and a robot, can do it.

An ONNX file is one protobuf message, ModelProto. Its field 14, metadata_props, is a list of messages with a
key (field 1) and a value (field 2). The weights, field 7, are stepped over.
"""

from __future__ import annotations

from collections.abc import Iterator

from rsm_serve.errors import BundleError

POLICY_KEY = "rsm.policy"
"""Of the entry that repeats policy.json."""

_METADATA_PROPS = 14
_KEY, _VALUE = 1, 2
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5


def read_metadata(model: bytes) -> dict[str, str]:
    """The metadata of a model file.

    Raises:
        BundleError: it is not an ONNX file.
    """
    try:
        entries = (dict(_fields(value)) for number, value in _fields(model) if number == _METADATA_PROPS)
        return {entry.get(_KEY, b"").decode(): entry.get(_VALUE, b"").decode() for entry in entries}
    except (ValueError, IndexError):
        raise BundleError(
            "wanted an ONNX file, got other or damaged content; copy the file again, or export the policy again"
        ) from None


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, content) of every field of a protobuf message that has a length.

    Raises:
        ValueError, IndexError: not a protobuf message.
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire_type = tag & 7
        if wire_type == _VARINT:
            _, at = _varint(message, at)
            continue
        if wire_type == _BYTES:
            size, at = _varint(message, at)
        elif wire_type in (_FIXED_64, _FIXED_32):
            size = 8 if wire_type == _FIXED_64 else 4
        else:
            raise ValueError("unknown wire type")
        if size > len(message) - at:
            raise ValueError("truncated")
        # Weights may be large, and are not looked at: only what is asked for is copied.
        if wire_type == _BYTES and tag >> 3 in (_KEY, _VALUE, _METADATA_PROPS):
            yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """(value, position behind it) of a number in base 128, least significant digit first."""
    value = 0
    for shift in range(0, 70, 7):
        digit = message[at]
        at += 1
        value |= (digit & 0x7F) << shift
        if digit < 0x80:
            return value, at
    raise ValueError("a number of more than 64 bits")
