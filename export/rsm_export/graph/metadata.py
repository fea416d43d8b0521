"""The specification inside the graph, so that a bare model.onnx can be deployed.

`rsm.policy` repeats policy.json; the other entries are for people and for viewers of ONNX files. What is not of
the checkpoint stays out: the version number, the time and the tools of the export, the errors that were
measured on this machine. So the same checkpoint keeps giving the same bytes.
"""

from __future__ import annotations

import dataclasses
import json

import onnx

from rsm_common.spec import PolicySpec
from rsm_serve.bundle.onnx_file import POLICY_KEY

NOT_A_VERSION = "0"
_TRAINING = ("run", "step")
"""Of the provenance: where the weights come from."""
_SHOWN = ("schema_version", "name", "algorithm", "env_id", "steps", "particles", "sampler", "precision")


def embed_spec(model: onnx.ModelProto, spec: PolicySpec) -> None:
    """Write a specification into a graph's metadata, in place of any other metadata."""
    core = dataclasses.replace(
        spec,
        version=NOT_A_VERSION,
        accuracy=None,
        provenance={key: spec.provenance[key] for key in _TRAINING if key in spec.provenance},
    )
    compact = json.dumps(json.loads(core.to_json()), separators=(",", ":"), sort_keys=True)
    shown = {f"rsm.{key}": str(getattr(core, key)) for key in _SHOWN}
    onnx.helper.set_model_props(model, {POLICY_KEY: compact, **shown})
