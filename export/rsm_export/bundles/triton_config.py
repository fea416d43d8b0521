"""config.pbtxt: a bundle as Triton and KServe see it.

Triton reads one config.pbtxt for all versions of a policy, while versions may differ in T, N or sizes, and it
refuses a version whose graph has other shapes than the configuration. So the configuration names the one
version that it describes (`version_policy`); it is replaced after that version is complete, and what a reader
finds in between is the previous version and its own description.

`noise` is a required input: Triton's onnxruntime backend draws none. (rsm-serve, which does, shows it as
optional in its own ModelConfig.)
"""

from __future__ import annotations

from rsm_common.spec import PolicySpec
from rsm_serve.bundle.contract import MODEL_FILE

MAX_BATCH_SIZE = 64
"""Largest batch that Triton may form."""

_TEMPLATE = """\
name: "{name}"
platform: "onnxruntime_onnx"
backend: "onnxruntime"
default_model_filename: "{model}"
# The shapes below are those of this version.
version_policy {{ specific {{ versions: [ {version} ] }} }}
max_batch_size: {max_batch}
# Without the batch axis. Noise is standard normal, and the caller's to draw.
input [
{inputs}
]
output [
{outputs}
]
# No preferred size and no delay: what waits when an instance is free is the next batch.
dynamic_batching {{ }}
model_warmup [
{warm_ups}
]
"""


def triton_config(spec: PolicySpec) -> str:
    """The content of config.pbtxt for one version of a policy, in protobuf's text format.

    Args:
        spec: its name is safe as a directory name (see `rsm_serve.bundle.check_policy_name`), and its version
            is a number.
    """
    inputs = {"obs": [spec.observation.size], "noise": list(spec.noise_shape)}
    outputs: dict[str, list[int]] = {"action": [spec.action.size]}
    if spec.has_q:
        outputs["q"] = []
    return _TEMPLATE.format(
        name=spec.name,
        model=MODEL_FILE,
        version=int(spec.version),
        max_batch=MAX_BATCH_SIZE,
        inputs=_tensors(inputs),
        outputs=_tensors(outputs),
        warm_ups=",\n".join(_warm_up(rows, inputs) for rows in (1, MAX_BATCH_SIZE)),
    )


def _tensors(tensors: dict[str, list[int]]) -> str:
    return ",\n".join(_tensor(name, dims) for name, dims in tensors.items())


def _tensor(name: str, dims: list[int]) -> str:
    # Triton has no tensors without dimensions: a scalar per row is [1] reshaped to [].
    reshape = "" if dims else " reshape: { shape: [ ] }"
    return f'  {{ name: "{name}" data_type: TYPE_FP32 dims: {_dims(dims or [1])}{reshape} }}'


def _warm_up(rows: int, inputs: dict[str, list[int]]) -> str:
    """Zeros of `rows` rows: time and memory of a batch do not depend on the numbers in it."""
    lines = [
        f'    inputs {{ key: "{name}" value: {{ data_type: TYPE_FP32 dims: {_dims(dims)} zero_data: true }} }}'
        for name, dims in inputs.items()
    ]
    return "\n".join([f'  {{\n    name: "batch of {rows}"\n    batch_size: {rows}', *lines, "  }"])


def _dims(dims: list[int]) -> str:
    return f"[ {', '.join(str(size) for size in dims)} ]"
