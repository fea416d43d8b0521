"""One export: checkpoint -> unrolled policy -> graph -> parity -> bundle."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from rsm_export.bundle_writer import next_version, write_bundle, write_time
from rsm_export.chain import UnrolledPolicy
from rsm_export.onnx_graph import build_graph
from rsm_export.parity import Parity, check_parity
from rsm_serve.bundle import Probe
from rsm_serve.errors import CheckpointError
from rsm_serve.policy import PolicySpec
from rsm_serve.provenance import provenance
from rsm_serve.seeds import draw_noise, expand_seed
from rsm_serve.sessions.onnxruntime import OnnxRuntimeSession
from rsm_train.checkpoint import Checkpoint, load_checkpoint
from rsm_train.policy import PolicyWeights, TorchPolicy

PROBE_ROWS = 8
_PROBE_SEED = 0x50_524F_4245


@dataclass(frozen=True)
class Export:
    """What an export made."""

    path: Path
    spec: PolicySpec
    parity: Parity
    nodes: int
    model_bytes: int


def export_checkpoint(source: str | Path, repository: Path, name: str | None = None) -> Export:
    """Export a checkpoint, or the best one of a run, as the next version of a policy.

    Args:
        source: a run or checkpoint directory of rsm-train.
        repository: directory of bundles; created if needed.
        name: of the policy; by default that of the run.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or not of a diffusion policy.
        BundleError: the name or the repository is not usable.
        ParityError: the graph does not act like the checkpoint; nothing was written.
    """
    checkpoint = load_checkpoint(source)
    name = name or checkpoint.spec.name
    spec = dataclasses.replace(
        checkpoint.spec,
        name=name,
        version=str(next_version(repository, name)),
        provenance={**checkpoint.spec.provenance, **provenance(), "exported": write_time()},
    )
    weights = checkpoint.policy().weights
    if not isinstance(weights, PolicyWeights):
        raise CheckpointError(
            f"wanted a diffusion policy (dpmd, sdac) to export, got {spec.algorithm} at "
            f"{str(checkpoint.path)!r}; evaluate it with rsm-eval"
        )
    policy = TorchPolicy(spec, weights)
    model = build_graph(UnrolledPolicy(weights), spec.noise_shape)
    session = OnnxRuntimeSession(model, spec)
    parity = check_parity(policy, session, _observations(checkpoint))
    probe = make_probe(policy, _observations(checkpoint))
    path = write_bundle(repository, spec, model, probe)
    nodes = len(onnx.load_from_string(model).graph.node)
    return Export(path, spec, parity, nodes, len(model))


def make_probe(policy: TorchPolicy, obs_PO: NDArray[np.float32]) -> Probe:
    """Inputs and the policy's own actions, to be replayed wherever the bundle is loaded.

    Rows are chosen so that no two particles nearly tie for the best: another machine's rounding may break
    a tie differently, which would be no fault.
    """
    rows = min(len(obs_PO), 8 * PROBE_ROWS)
    obs = obs_PO[:rows]
    noise = draw_noise(expand_seed(_PROBE_SEED, rows), policy.spec.noise_shape)
    clearest = np.argsort(-_value_gap(policy, obs, noise), kind="stable")[:PROBE_ROWS]
    obs, noise = obs[clearest], noise[clearest]
    return Probe(obs=obs, noise=noise, action=policy.act(obs, noise=noise).action)


def _value_gap(
    policy: TorchPolicy, obs: NDArray[np.float32], noise: NDArray[np.float32]
) -> NDArray[np.float32]:
    """By how much the best particle's value exceeds the second best's, [P]."""
    if policy.spec.particles == 1:
        return np.zeros(len(obs), dtype=np.float32)
    best_two = np.sort(policy.particles(obs, noise)[1], axis=1)[:, -2:]
    gap: NDArray[np.float32] = best_two[:, 1] - best_two[:, 0]
    return gap


def _observations(checkpoint: Checkpoint) -> NDArray[np.float32]:
    return checkpoint.probe_obs.numpy().astype(np.float32)
