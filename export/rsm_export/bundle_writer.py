"""Writing bundles: the layout that `rsm_serve.bundle` reads, complete or absent."""

from __future__ import annotations

import time
from pathlib import Path

from rsm_serve import atomic
from rsm_serve.bundle import (
    CONFIG_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    PROBE_FILE,
    SPEC_FILE,
    Probe,
    check_policy_name,
    list_versions,
    manifest_json,
)
from rsm_serve.errors import BundleError
from rsm_serve.policy import PolicySpec

MAX_BATCH_SIZE = 64
"""Largest batch that config.pbtxt lets Triton form."""


def next_version(repository: Path, name: str) -> int:
    """The version number that the next bundle of a policy gets, from 1.

    Raises:
        BundleError: the name is not safe as a directory name.
    """
    versions = list_versions(repository / check_policy_name(name))
    return versions[-1] + 1 if versions else 1


def write_bundle(repository: Path, spec: PolicySpec, model: bytes, probe: Probe) -> Path:
    """Write one version of a policy and return its directory.

    Raises:
        BundleError: the version exists already, or the repository cannot be written.
    """
    policy_dir = repository / check_policy_name(spec.name)
    payload = {MODEL_FILE: model, SPEC_FILE: spec.to_json().encode(), PROBE_FILE: probe.to_bytes()}
    version_dir = policy_dir / spec.version
    try:
        with atomic.new_directory(version_dir) as directory:
            for name, content in (payload | {MANIFEST_FILE: manifest_json(payload)}).items():
                (directory / name).write_bytes(content)
                (directory / name).chmod(0o644)  # the server may be another user
        atomic.write_file(policy_dir / CONFIG_FILE, triton_config(spec).encode())
    except FileExistsError:
        raise BundleError(
            f"version {spec.version} of policy {spec.name!r} exists already in {str(repository)!r}; "
            "another export is running, try again"
        ) from None
    except OSError as error:
        raise BundleError(
            f"cannot write a bundle to {str(repository)!r}: {error.strerror}; choose another --repo"
        ) from None
    return version_dir


def triton_config(spec: PolicySpec) -> str:
    """config.pbtxt: the bundle as Triton and KServe see it; shapes are without the batch axis."""
    outputs = [("action", [spec.action.size])]
    if spec.has_q:
        outputs.append(("q", []))
    return f"""\
name: "{spec.name}"
platform: "onnxruntime_onnx"
max_batch_size: {MAX_BATCH_SIZE}
input [
{_tensor("obs", [spec.observation.size])},
{_tensor("noise", list(spec.noise_shape))}
]
output [
{f",{chr(10)}".join(_tensor(name, dims) for name, dims in outputs)}
]
dynamic_batching {{ }}
model_warmup [
  {{
    name: "one row"
    batch_size: 1
{_warm_up_input("obs", [spec.observation.size])}
{_warm_up_input("noise", list(spec.noise_shape))}
  }}
]
"""


def _warm_up_input(name: str, dims: list[int]) -> str:
    value = f"{{ data_type: TYPE_FP32 dims: {_dims(dims)} zero_data: true }}"
    return f'    inputs {{ key: "{name}" value: {value} }}'


def _tensor(name: str, dims: list[int]) -> str:
    # Triton has no tensors without dimensions: a scalar per row is [1] reshaped to [].
    reshape = "" if dims else " reshape: { shape: [ ] }"
    return f'  {{ name: "{name}" data_type: TYPE_FP32 dims: {_dims(dims or [1])}{reshape} }}'


def _dims(dims: list[int]) -> str:
    return f"[ {', '.join(str(size) for size in dims)} ]"


def write_time() -> str:
    """The present time in UTC, as provenance records it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
