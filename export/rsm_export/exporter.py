"""One export: checkpoint -> policy as it shall be sampled -> folded chain -> graph -> checks -> bundle."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsm_export.accuracy import TOLERANCES
from rsm_export.bundle_writer import next_version, write_bundle, write_time
from rsm_export.chain import fold
from rsm_export.config import ExportConfig
from rsm_export.cost import GraphCost, graph_cost
from rsm_export.onnx_graph import build_graph
from rsm_export.verification import Verification, verify
from rsm_serve.bundle import Bundle, Probe
from rsm_serve.errors import CheckpointError, ConfigError
from rsm_serve.local import open_session
from rsm_serve.policy import DEFAULT_TOLERANCE, PolicySpec
from rsm_serve.provenance import provenance
from rsm_serve.seeds import draw_noise, expand_seed
from rsm_train.checkpoint import Checkpoint, load_checkpoint
from rsm_train.diffusion import SamplerSettings, timesteps
from rsm_train.policy import PolicyWeights, TorchPolicy

PROBE_ROWS = 8
_PROBE_SEED = 0x50_524F_4245


@dataclass(frozen=True)
class Export:
    """What an export made."""

    path: Path
    spec: PolicySpec
    verification: Verification | None
    """None if it was switched off."""
    cost: GraphCost
    model_bytes: int


def export_checkpoint(
    source: str | Path, repository: Path, name: str | None = None, config: ExportConfig | None = None
) -> Export:
    """Export a checkpoint, or the best one of a run, as the next version of a policy.

    Args:
        source: a run or checkpoint directory of rsm-train.
        repository: directory of bundles; created if needed.
        name: of the policy; by default that of the run.
        config: how the exported chain samples; by default as it was trained, in float32.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or not of a diffusion policy.
        ConfigError: the settings do not fit the checkpoint.
        BundleError: the name or the repository is not usable, or the graph failed a check.
        ParityError: the graph does not act like the checkpoint; nothing was written.
    """
    config = config or ExportConfig()
    checkpoint = load_checkpoint(source)
    name = name or checkpoint.spec.name
    version = str(next_version(repository, name))
    policy = sampled_policy(checkpoint, config)
    weights = policy.weights
    assert isinstance(weights, PolicyWeights)
    spec = dataclasses.replace(
        policy.spec,
        name=name,
        version=version,
        provenance={**checkpoint.spec.provenance, **provenance(), "exported": write_time()},
    )
    policy = TorchPolicy(spec, weights)
    model = build_graph(fold(weights), config.precision)
    content = model.SerializeToString(deterministic=True)
    pool = checkpoint.probe_obs.numpy().astype(np.float32)
    probe = make_probe(policy, pool)
    verification = None
    if config.verify:
        bundle = Bundle(repository / name / version, spec, content, probe)
        verification = verify(model, policy, lambda: open_session(bundle), pool, config.precision)
        spec = dataclasses.replace(spec, accuracy=verification.accuracy.to_dict())
    path = write_bundle(repository, spec, content, probe)
    return Export(path, spec, verification, graph_cost(model), len(content))


def sampled_policy(checkpoint: Checkpoint, config: ExportConfig) -> TorchPolicy:
    """The checkpoint's policy, sampled as the exported chain will sample.

    Raises:
        CheckpointError: it is not a diffusion policy.
        ConfigError: the settings do not fit it.
    """
    trained = checkpoint.sampler
    if not isinstance(trained, SamplerSettings):
        raise CheckpointError(
            f"wanted a diffusion policy (dpmd, sdac) to export, got {checkpoint.spec.algorithm} at "
            f"{str(checkpoint.path)!r}; evaluate it with rsm-eval"
        )
    sampler = resample(trained, config)
    indices = timesteps(sampler.steps, sampler.chain_steps)
    spec = dataclasses.replace(
        checkpoint.spec,
        steps=len(indices),
        particles=sampler.particles,
        sampler=config.sampler,
        precision=config.precision,
        has_q=sampler.particles > 1,
        sampling={
            "schedule": sampler.schedule,
            "train_steps": sampler.steps,
            "timesteps": list(indices),
            "eta": sampler.eta,
            "prior_std": sampler.prior_std,
        },
        tolerance=max(DEFAULT_TOLERANCE, TOLERANCES[config.precision]),
        # What was measured in training was measured of another chain.
        evaluation=checkpoint.spec.evaluation if sampler == trained else None,
    )
    weights = dataclasses.replace(checkpoint, spec=spec, sampler=sampler).policy().weights
    assert isinstance(weights, PolicyWeights)
    return TorchPolicy(spec, weights if spec.has_q else dataclasses.replace(weights, critics={}))


def resample(trained: SamplerSettings, config: ExportConfig) -> SamplerSettings:
    """The sampler of the exported chain.

    Raises:
        ConfigError: more steps than were trained.
    """
    if config.steps is not None and config.steps > trained.steps:
        raise ConfigError(
            f"wanted --steps of at most {trained.steps}, as many as were trained, got {config.steps}"
        )
    changed: dict[str, Any] = {
        "chain_steps": config.steps,
        "particles": config.particles,
        "prior_std": config.prior_std,
        "eta": 1.0 if config.sampler == "ddpm" else config.eta or 0.0,
    }
    return dataclasses.replace(trained, **{name: value for name, value in changed.items() if value is not None})


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
