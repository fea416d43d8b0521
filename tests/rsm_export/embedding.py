"""The specification in the metadata of a graph, written into bytes and read back."""

from __future__ import annotations

import onnx
from rsm_export.graph.metadata import embed_spec

from rsm_common.spec import PolicySpec
from rsm_serve.bundle.onnx_file import POLICY_KEY


def read_spec(model: onnx.ModelProto) -> PolicySpec | None:
    """Read the specification as onnx reads it; None if there is none."""
    for entry in model.metadata_props:
        if entry.key == POLICY_KEY:
            return PolicySpec.from_json(entry.value)
    return None


def with_spec(model: bytes, spec: PolicySpec) -> bytes:
    """Return the graph with a specification in its metadata; the bytes depend on nothing else."""
    proto = onnx.load_from_string(model)
    embed_spec(proto, spec)
    content: bytes = proto.SerializeToString(deterministic=True)
    return content
