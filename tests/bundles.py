"""Tiny valid bundles for tests: a real ONNX graph with the contract's inputs and outputs, made without torch.

action = center + scale * tanh(obs @ W + mean of the noise over T and N)
q      = sum of the observation
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from rsm_common.manifest import MANIFEST_FILE, manifest_json
from rsm_common.seeds import draw_noise, expand_seed
from rsm_common.spec import BoxSpec, PolicySpec
from rsm_serve.bundle.contract import CONFIG_FILE, MODEL_FILE, PAYLOAD_FILES, SPEC_FILE
from rsm_serve.bundle.probe import PROBE_FILE, Probe


def make_spec(
    name: str = "tiny",
    version: str = "1",
    *,
    obs_size: int = 4,
    action_size: int = 2,
    steps: int = 3,
    particles: int = 2,
    has_q: bool = True,
) -> PolicySpec:
    """A specification with action bounds [-3, 1]."""
    return PolicySpec(
        name=name,
        algorithm="dpmd",
        env_id="Tiny-v0",
        observation=BoxSpec(tuple(f"o{i}" for i in range(obs_size)), (None,) * obs_size, (None,) * obs_size),
        action=BoxSpec(tuple(f"a{i}" for i in range(action_size)), (-3.0,) * action_size, (1.0,) * action_size),
        steps=steps,
        particles=particles,
        has_q=has_q,
        version=version,
        control_dt_s=0.05,
    )


def weights(spec: PolicySpec) -> NDArray[np.float32]:
    """W [O, A], a fixed function of the sizes."""
    count = spec.observation.size * spec.action.size
    return np.linspace(-1, 1, count, dtype=np.float32).reshape(spec.observation.size, spec.action.size)


def reference_action(
    spec: PolicySpec, obs_BO: NDArray[np.float32], noise_BTNA: NDArray[np.float32]
) -> NDArray[np.float32]:
    """What the graph computes, in numpy."""
    center, scale = (spec.action_high + spec.action_low) / 2, (spec.action_high - spec.action_low) / 2
    result: NDArray[np.float32] = center + scale * np.tanh(obs_BO @ weights(spec) + noise_BTNA.mean((1, 2)))
    return result


def make_model(spec: PolicySpec, *, work: int = 0) -> bytes:
    """The graph of a specification; `work` adds that many useless 256x256 products, to make it slow.

    The product with the observation is of the specification's precision.
    """
    o, a = spec.observation.size, spec.action.size
    constants: dict[str, NDArray[Any]] = {
        "center": (spec.action_high + spec.action_low) / 2,
        "scale": (spec.action_high - spec.action_low) / 2,
        "low": spec.action_low,
        "high": spec.action_high,
        "axes_tn": np.array([1, 2], np.int64),
        "axis_o": np.array([1], np.int64),
        "big": np.full((256, 256), 1e-6, np.float32),
        "zero": np.zeros((1, 1), np.float32),
        "widen": np.zeros((a, 256), np.float32),
        "narrow": np.zeros((256, a), np.float32),
    }
    product, typed = _product(spec)
    constants |= typed
    nodes = [
        *product,
        helper.make_node("ReduceMean", ["noise", "axes_tn"], ["noise_mean"], keepdims=0),
        helper.make_node("Add", ["obs_W", "noise_mean"], ["latent"]),
        helper.make_node("MatMul", ["latent", "widen"], ["h0"]),
        *(helper.make_node("MatMul", [f"h{i}", "big"], [f"h{i + 1}"]) for i in range(work)),
        helper.make_node("MatMul", [f"h{work}", "narrow"], ["nothing"]),
        helper.make_node("Add", ["latent", "nothing"], ["latent_2"]),
        helper.make_node("Tanh", ["latent_2"], ["squashed"]),
        helper.make_node("Mul", ["squashed", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "center"], ["shifted"]),
        helper.make_node("Max", ["shifted", "low"], ["above"]),
        helper.make_node("Min", ["above", "high"], ["action"]),
    ]
    outputs = [helper.make_tensor_value_info("action", TensorProto.FLOAT, ["batch", a])]
    if spec.has_q:
        nodes.append(helper.make_node("ReduceSum", ["obs", "axis_o"], ["q"], keepdims=0))
        outputs.append(helper.make_tensor_value_info("q", TensorProto.FLOAT, ["batch"]))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info("obs", TensorProto.FLOAT, ["batch", o]),
            helper.make_tensor_value_info("noise", TensorProto.FLOAT, ["batch", *spec.noise_shape]),
        ],
        outputs,
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def _product(spec: PolicySpec) -> tuple[list[Any], dict[str, NDArray[Any]]]:
    """Nodes and constants of obs_W = obs @ W, as an exporter types them for the precision."""
    node, W = helper.make_node, weights(spec)
    if spec.precision == "fp32":
        return [node("MatMul", ["obs", "W"], ["obs_W"])], {"W": W}
    if spec.precision == "int8":
        nodes = [
            node("DynamicQuantizeLinear", ["obs"], ["obs_q", "obs_scale", "obs_zero"]),
            node("MatMulInteger", ["obs_q", "W", "obs_zero"], ["product"]),
            node("Cast", ["product"], ["product_f"], to=TensorProto.FLOAT),
            node("Mul", ["obs_scale", "W_scale"], ["scales"]),
            node("Mul", ["product_f", "scales"], ["obs_W"]),
        ]
        # Of the 8 bits one is left unused: processors without VNNI add two products in 16 bits, which saturate.
        scale = np.abs(W).max(0) / 63
        return nodes, {"W": np.round(W / scale).astype(np.int8), "W_scale": scale}
    onnx_type = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[spec.precision]
    dtype = helper.tensor_dtype_to_np_dtype(onnx_type)
    nodes = [
        node("Cast", ["obs"], ["obs_t"], to=onnx_type),
        node("Gemm", ["obs_t", "W", "bias"], ["product"]),
        # An activation that changes nothing, as chains have them in their own precision.
        node("Max", ["product", "lowest"], ["active"]),
        node("Cast", ["active"], ["obs_W"], to=TensorProto.FLOAT),
    ]
    return nodes, {"W": W.astype(dtype), "bias": np.zeros(W.shape[1], dtype), "lowest": np.array([-1e4], dtype)}


def make_probe(spec: PolicySpec, rows: int = 4) -> Probe:
    """Recorded inputs and the actions of `reference_action`."""
    obs = np.linspace(-1, 1, rows * spec.observation.size, dtype=np.float32).reshape(rows, -1)
    noise = draw_noise(expand_seed(7, rows), spec.noise_shape)
    return Probe(obs, noise, reference_action(spec, obs, noise))


def write_bundle(
    repository: Path, spec: PolicySpec, *, model: bytes | None = None, probe: Probe | None = None
) -> Path:
    """Write a bundle and return its version directory."""
    version_dir = repository / spec.name / spec.version
    version_dir.mkdir(parents=True)
    content = {
        MODEL_FILE: make_model(spec) if model is None else model,
        SPEC_FILE: spec.to_json().encode(),
        PROBE_FILE: (probe or make_probe(spec)).to_bytes(),
    }
    for name, data in content.items():
        (version_dir / name).write_bytes(data)
    (version_dir / MANIFEST_FILE).write_bytes(manifest_json(content))
    (version_dir.parent / CONFIG_FILE).write_text("max_batch_size: 64\n")
    return version_dir


def rewrite(version_dir: Path, name: str, content: bytes) -> None:
    """Change a file and make the manifest agree with it."""
    (version_dir / name).write_bytes(content)
    files = {payload: (version_dir / payload).read_bytes() for payload in PAYLOAD_FILES}
    (version_dir / MANIFEST_FILE).write_bytes(manifest_json(files))
