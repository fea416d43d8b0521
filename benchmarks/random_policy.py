"""Policies with random weights, at the sizes that the benchmarks quote; time does not depend on the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rsm_export.build import make_probe
from rsm_export.bundles.bundle_writer import write_bundle
from rsm_export.graph.fold import fold
from rsm_export.graph.onnx_graph import build_graph

from rsm_common.spec import BoxSpec, PolicySpec
from rsm_serve.bundle.contract import Bundle
from rsm_serve.bundle.probe import Probe
from rsm_train.model.critic import init_critics
from rsm_train.model.networks import init_denoiser
from rsm_train.model.samplers.diffusion import DiffusionSampler, DiffusionWeights
from rsm_train.policy import TorchPolicy, action_scale

OBS_SIZE, ACTION_SIZE, HIDDEN = 17, 6, [256, 256, 256]
"""HalfCheetah's sizes."""


def make_spec(name: str, steps: int, particles: int, version: int = 1) -> PolicySpec:
    """Make a specification; only a policy with several particles returns a critic's value."""
    obs_box = BoxSpec(tuple(f"o{i}" for i in range(OBS_SIZE)), (None,) * OBS_SIZE, (None,) * OBS_SIZE)
    box = BoxSpec(tuple(f"a{i}" for i in range(ACTION_SIZE)), (-1.0,) * ACTION_SIZE, (1.0,) * ACTION_SIZE)
    return PolicySpec(
        name, "dpmd", "none", obs_box, box, steps, particles, has_q=particles > 1, version=str(version)
    )


def make_weights(spec: PolicySpec, seed: int = 0) -> DiffusionWeights:
    """Three layers of 256 in the denoiser and in each of two critics."""
    sizes = spec.observation.size, spec.action.size, HIDDEN
    g = torch.Generator().manual_seed(seed)
    denoiser, critics = init_denoiser(*sizes, g), init_critics(*sizes, g)
    sampler = DiffusionSampler("cosine", spec.steps, spec.particles, 1.0)
    return sampler.prepare(denoiser, critics if spec.particles > 1 else {}, action_scale(spec))


def make_bundle(steps: int, particles: int) -> Bundle:
    """Make a bundle in memory, without a probe."""
    spec, empty = make_spec("random", steps, particles), np.empty((0,), np.float32)
    return Bundle(Path(), spec, _graph(make_weights(spec)), Probe(empty, empty, empty))


def publish(repository: Path, spec: PolicySpec, seed: int = 0) -> Path:
    """Write a bundle into a repository, as rsm-export would; returns its directory."""
    weights = make_weights(spec, seed)
    obs = np.random.default_rng(0).normal(size=(256, OBS_SIZE)).astype(np.float32)
    return write_bundle(repository, spec, _graph(weights), make_probe(TorchPolicy(spec, weights), obs))


def _graph(weights: DiffusionWeights) -> bytes:
    model: bytes = build_graph(fold(weights)).SerializeToString()
    return model
