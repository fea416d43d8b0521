"""The exported graph against a naive export of the same policy and against OpenVINO, on one thread.

    python benchmarks/export.py [--rounds 15] [--out FILE]

The naive graph is torch.onnx's export of the obvious module: T passes over the plain network on the
concatenation [observation, action, time embedding], Mish as torch exports it, and a copy of the observation for
every particle. Weights are random; sizes are those of HalfCheetah and Humanoid, with three layers of 256 and 20
steps. All programs take turns in every round, so that they see the same machine. Peak memory is measured in a
process of its own, above the memory that it uses before it loads the graph.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from record import write_record
from rsm_export.graph.cost import graph_cost
from rsm_export.graph.fold import fold
from rsm_export.graph.onnx_graph import OPSET, build_graph
from torch import Tensor, nn

from rsm_common.spec import BoxSpec, PolicySpec
from rsm_train.model.critic import init_critics
from rsm_train.model.diffusion import NoiseSchedule, reverse_chain
from rsm_train.model.networks import Params, depth, embed_time, init_denoiser
from rsm_train.model.samplers.diffusion import DiffusionSampler
from rsm_train.policy import action_scale

STEPS = 20
HIDDEN = [256, 256, 256]
SIZES = {"halfcheetah": (17, 6), "humanoid": (348, 17)}
BATCHES = (1, 8, 64)
RUNTIMES = ("onnxruntime", "openvino", "openvino_bf16")


class Plain(nn.Module):
    """The best-of-N chain written directly, with no work shared between steps or particles."""

    def __init__(
        self, policy: Params, critics: Params, schedule: NoiseSchedule, sampler: DiffusionSampler
    ) -> None:
        super().__init__()
        self.schedule, self.sampler = schedule, sampler
        self.embeddings = embed_time(policy, schedule.steps)
        self.denoiser = _mlp(policy)
        self.critics = nn.ModuleList(
            _mlp({name: value[e] for name, value in critics.items()})
            for e in range(2 if sampler.particles > 1 else 0)
        )

    def forward(self, obs: Tensor, noise: Tensor) -> Any:
        obs_BNO = obs.unsqueeze(1).expand(-1, self.sampler.particles, -1)

        def predict(action: Tensor, t: int) -> Tensor:
            time = self.embeddings[t].expand(*action.shape[:2], -1)
            eps: Tensor = self.denoiser(torch.cat([obs_BNO, action, time], dim=-1))
            return eps

        action = reverse_chain(self.schedule, predict, noise, prior_std=self.sampler.prior_std)
        if not self.critics:
            return action[:, 0]
        values = [critic(torch.cat([obs_BNO, action], dim=-1)).squeeze(-1) for critic in self.critics]
        q, best = torch.minimum(values[0], values[1]).max(dim=1)
        return action.gather(1, best[:, None, None].expand(-1, 1, action.shape[2])).squeeze(1), q


def _mlp(params: Params) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(depth(params)):
        weight, bias = params[f"layers.{i}.weight"], params[f"layers.{i}.bias"]
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": bias})
        layers += [linear, nn.Mish()]
    return nn.Sequential(*layers[:-1])


def make_graphs(size: str, particles: int) -> dict[str, onnx.ModelProto]:
    """The naive and the folded graph of the same random policy."""
    obs, actions = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    policy, critics = (
        init_denoiser(obs, actions, HIDDEN, generator),
        init_critics(obs, actions, HIDDEN, generator),
    )
    sampler = DiffusionSampler("cosine", STEPS, particles, 1.0)
    names = tuple(f"a{i}" for i in range(actions))
    action_box = BoxSpec(names, (-1.0,) * actions, (1.0,) * actions)
    obs_box = BoxSpec(tuple(f"o{i}" for i in range(obs)), (None,) * obs, (None,) * obs)
    spec = PolicySpec("benchmark", "dpmd", size, obs_box, action_box, STEPS, particles)
    weights = sampler.prepare(policy, critics if particles > 1 else {}, action_scale(spec))
    return {
        "naive": _naive(Plain(policy, critics, weights.schedule, sampler), size),
        "folded": build_graph(fold(weights)),
    }


def _naive(module: Plain, size: str) -> onnx.ModelProto:
    batch = torch.export.Dim("batch", min=1, max=2**16)
    obs, actions = SIZES[size]
    inputs = (torch.zeros(2, obs), torch.zeros(2, STEPS, module.sampler.particles, actions))
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=["obs", "noise"],
            output_names=["action", "q"][: 2 if module.critics else 1],
            dynamic_shapes={"obs": {0: batch}, "noise": {0: batch}},
            verbose=False,
        )
    logging.disable(logging.NOTSET)
    assert program is not None
    return program.model_proto


Run = Callable[[dict[str, Any]], list[Any]]


def open_runtime(runtime: str, content: bytes) -> Run:
    """The bare runtime on one thread, without this project's sessions."""
    if runtime == "onnxruntime":
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as our session does
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return lambda feeds: list(session.run(None, feeds))
    import rsm_serve.sessions.openvino  # noqa: I001, F401 - first: it keeps OpenVINO's telemetry out
    import openvino

    precision = "bf16" if runtime.endswith("bf16") else "f32"
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision}
    core = openvino.Core()
    request = core.compile_model(core.read_model(content), "CPU", settings).create_infer_request()

    def run(feeds: dict[str, Any]) -> list[Any]:
        request.infer(feeds, share_inputs=True)
        return [tensor.data for tensor in request.output_tensors]

    return run


def feeds(size: str, particles: int, batch: int) -> dict[str, Any]:
    obs, actions = SIZES[size]
    rng = np.random.default_rng(0)
    return {
        "obs": rng.standard_normal((batch, obs), dtype=np.float32),
        "noise": rng.standard_normal((batch, STEPS, particles, actions), dtype=np.float32),
    }


def time_all(runs: dict[str, Run], inputs: dict[str, Any], rounds: int) -> dict[str, float]:
    """Median milliseconds of each program; they take turns, and the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run(inputs)
            found[name].append(1e3 * (time.perf_counter() - started))
    return {name: round(float(np.median(values[1:])), 4) for name, values in found.items()}


def measure(size: str, particles: int, rounds: int) -> list[dict[str, Any]]:
    graphs = {name: graph.SerializeToString() for name, graph in make_graphs(size, particles).items()}
    runs = {
        f"{graph}_{runtime}": open_runtime(runtime, graphs[graph]) for graph in graphs for runtime in RUNTIMES
    }
    results = []
    for batch in BATCHES:
        inputs = feeds(size, particles, batch)
        # A millisecond is repeated until it can be told from noise.
        ms = time_all(runs, inputs, rounds * max(1, 256 // (batch * particles)))
        folded = ms["folded_onnxruntime"]
        results.append(
            {
                "size": size,
                "particles": particles,
                "batch": batch,
                "ms": ms,
                "naive_over_folded": round(ms["naive_onnxruntime"] / folded, 2),
                "folded_over_openvino": round(folded / ms["folded_openvino"], 2),
            }
        )
        print(json.dumps(results[-1]), file=sys.stderr)
    return results


def agreement(size: str, particles: int) -> float:
    """Largest difference between the actions of the naive and the folded graph, of the action range."""
    graphs = make_graphs(size, particles)
    inputs = feeds(size, particles, 64)
    naive, folded = (
        open_runtime("onnxruntime", graphs[name].SerializeToString())(inputs)[0] for name in ("naive", "folded")
    )
    return float(np.abs(naive - folded).max() / 2)


def peak_memory_mb(content: bytes, size: str, particles: int, runtime: str) -> float:
    """Measure a process that loads the graph and runs the largest batch, above its memory before."""
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(content)
        file.flush()
        command = [sys.executable, __file__, "--memory-of", file.name, size, str(particles), runtime]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def report_memory(path: str, size: str, particles: int, runtime: str) -> None:
    """The child of `peak_memory_mb`."""
    inputs = feeds(size, particles, BATCHES[-1])
    content = Path(path).read_bytes()
    open_runtime(runtime, _identity())  # what the runtime takes for itself
    before = _memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    run = open_runtime(runtime, content)
    for _ in range(2):
        run(inputs)
    print(_memory_mb("VmHWM") - before)


def _memory_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def _identity() -> bytes:
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", value[:1], value[1:])
    opset = onnx.helper.make_opsetid("", OPSET)
    content: bytes = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
    return content


def measure_graphs(size: str, particles: int) -> dict[str, Any]:
    found: dict[str, Any] = {"size": size, "particles": particles, "max_difference": agreement(size, particles)}
    for name, graph in make_graphs(size, particles).items():
        content = graph.SerializeToString()
        memory = {
            runtime: round(peak_memory_mb(content, size, particles, runtime), 1)
            for runtime in ("onnxruntime", "openvino")
        }
        cost = dataclasses.asdict(graph_cost(graph)) if name == "folded" else {"nodes": len(graph.graph.node)}
        found[name] = {**cost, "file_bytes": len(content), "peak_memory_mb": memory}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        path, size, particles, runtime = options.memory_of
        report_memory(path, size, int(particles), runtime)
        return
    cases = [(size, particles) for size in SIZES for particles in (1, 32)]
    timings = [row for size, particles in cases for row in measure(size, particles, options.rounds)]
    graphs = [measure_graphs(size, particles) for size, particles in cases]
    write_record({"threads": 1, "rounds": options.rounds, "timings": timings, "graphs": graphs}, options.out)


if __name__ == "__main__":
    main()
