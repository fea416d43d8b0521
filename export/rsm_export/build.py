"""A checkpoint as an export in memory: the policy as it shall be sampled, graph, specification, probe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from rsm_common.errors import ConfigError
from rsm_common.policy import Policy
from rsm_common.provenance import provenance
from rsm_common.seeds import draw_noise, expand_seed
from rsm_common.spec import DEFAULT_TOLERANCE
from rsm_export.bundles.bundle_writer import write_time
from rsm_export.checks.accuracy import TOLERANCES, Accuracy
from rsm_export.config import ExportConfig
from rsm_export.graph.cost import GraphCost, graph_cost
from rsm_export.graph.fold import fold
from rsm_export.graph.metadata import embed_spec
from rsm_export.graph.onnx_graph import build_graph
from rsm_serve.bundle.contract import Bundle
from rsm_serve.bundle.probe import Probe
from rsm_serve.local import LocalPolicy
from rsm_serve.sessions import Session
from rsm_serve.sessions.choice import RUNTIMES, open_session
from rsm_train.model.samplers.common import Resampling
from rsm_train.model.samplers.diffusion import DiffusionSampler
from rsm_train.policy import TorchPolicy
from rsm_train.run.checkpoint import Checkpoint

PROBE_ROWS = 8
_PROBE_SEED = 0x50_524F_4245


@dataclass(frozen=True)
class Opened:
    """An export that is ready to act."""

    policy: Policy
    session: Session
    cost: GraphCost


@dataclass(frozen=True)
class Built:
    """An export in memory."""

    policy: TorchPolicy
    """What the graph must act like: the same steps, particles and sampler."""
    model: onnx.ModelProto
    bundle: Bundle
    """Its path is a name for messages."""
    backend: str

    def accepted(self, accuracy: Accuracy) -> Built:
        """The same with what was measured of the graph; the probe may be off by as much as the graph may."""
        spec = self.bundle.spec
        tolerance = max(spec.tolerance, accuracy.tolerance.action)
        spec = dataclasses.replace(spec, accuracy=accuracy.to_dict(), tolerance=tolerance)
        return dataclasses.replace(self, bundle=dataclasses.replace(self.bundle, spec=spec))

    def open_session(self) -> Session:
        """Load the graph in the runtime that checks it."""
        return open_session(self.bundle, self.backend)

    def open(self) -> Opened:
        """Load it as a server would."""
        session = self.open_session()
        return Opened(LocalPolicy(self.bundle, session), session, graph_cost(self.model))


def build(checkpoint: Checkpoint, config: ExportConfig) -> Built:
    """Build the graph of a checkpoint, in memory and unchecked.

    Raises:
        CheckpointError, ConfigError: see `sampled_policy`.
    """
    policy = sampled_policy(checkpoint, config)
    made = {**checkpoint.spec.provenance, **provenance(), "exported": write_time()}
    spec = dataclasses.replace(policy.spec, provenance=made)
    policy = TorchPolicy(spec, policy.weights)
    model = build_graph(fold(policy.weights), config.precision)
    embed_spec(model, spec)
    content = model.SerializeToString(deterministic=True)
    probe = make_probe(policy, observations_of(checkpoint))
    # onnxruntime needs no time to compile, and every installation of the exporter has it.
    default = "onnxruntime" if config.precision in RUNTIMES["onnxruntime"].precisions else "auto"
    bundle = Bundle(Path(spec.name), spec, content, probe)
    return Built(policy, model, bundle, config.backend or default)


def diffusion_sampler(checkpoint: Checkpoint) -> DiffusionSampler:
    """How the checkpoint's policy samples, for a search among chains.

    Raises:
        ConfigError: it is not a diffusion policy.
    """
    if not isinstance(checkpoint.sampler, DiffusionSampler):
        raise ConfigError(
            f"wanted a diffusion policy for --auto, got {checkpoint.spec.algorithm}, which has "
            "no chain to shorten; leave --auto out"
        )
    return checkpoint.sampler


def sampled_policy(checkpoint: Checkpoint, config: ExportConfig) -> TorchPolicy:
    """The checkpoint's policy, sampled as the exported graph will sample.

    Raises:
        ConfigError: the settings do not fit it.
    """
    trained = checkpoint.sampler
    try:
        change = Resampling(config.steps, config.particles, config.prior_std, config.sampler, config.eta)
        sampler = trained.resampled(change)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if sampler.particles > 1 and not checkpoint.spec.has_q:
        raise ConfigError(f"wanted --particles 1 for a checkpoint without critics, got {sampler.particles}")
    spec = dataclasses.replace(
        checkpoint.spec,
        steps=sampler.chain_length,
        particles=sampler.particles,
        sampler=sampler.name,
        precision=config.precision,
        has_q=sampler.particles > 1,
        sampling=sampler.record(),
        tolerance=max(DEFAULT_TOLERANCE, TOLERANCES[config.precision]),
        # The evaluation of training holds for the trained sampler alone.
        evaluation=checkpoint.spec.evaluation if sampler == trained else None,
    )
    weights = dataclasses.replace(checkpoint, spec=spec, sampler=sampler).policy().weights
    return TorchPolicy(spec, weights if spec.has_q else weights.without_critics())


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
    q = policy.particles(obs, noise)[1]
    if q is None or policy.spec.particles == 1:
        return np.zeros(len(obs), dtype=np.float32)
    best_two = np.sort(q, axis=1)[:, -2:]
    gap: NDArray[np.float32] = best_two[:, 1] - best_two[:, 0]
    return gap


def observations_of(checkpoint: Checkpoint) -> NDArray[np.float32]:
    """What the policy met in training, [P, O]."""
    return checkpoint.probe_obs.numpy().astype(np.float32)
