"""Policies with random weights, of any size and kind, for tests of the exporter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rsm_common.seeds import draw_noise, expand_seed
from rsm_common.spec import BoxSpec, PolicySpec
from rsm_train.model.critic import init_critics
from rsm_train.model.diffusion import SamplerSettings
from rsm_train.model.networks import init_denoiser
from rsm_train.policy import PolicyWeights, TorchPolicy


def random_policy(
    *,
    obs_size: int = 5,
    action_size: int = 3,
    steps: int = 6,
    particles: int = 4,
    hidden: Sequence[int] = (24, 16),
    critics: int = 2,
    layer_norm: bool = False,
    seed: int = 0,
    **sampler: Any,
) -> TorchPolicy:
    """A policy whose biases are not zero, with action bounds that are not symmetric."""
    generator = torch.Generator().manual_seed(seed)
    denoiser = init_denoiser(obs_size, action_size, hidden, generator)
    values = init_critics(obs_size, action_size, hidden, generator, members=critics, layer_norm=layer_norm)
    for params in (denoiser, values):
        for name, value in params.items():
            if name.endswith("bias") or "norms" in name:
                value += 0.3 * torch.randn(value.shape, generator=generator)
    settings = SamplerSettings("cosine", steps, particles, sampler.pop("prior_std", 0.7), **sampler)
    spec = PolicySpec(
        name="random",
        algorithm="dpmd",
        env_id="Random-v0",
        observation=BoxSpec(tuple(f"o{i}" for i in range(obs_size)), (None,) * obs_size, (None,) * obs_size),
        action=BoxSpec(tuple(f"a{i}" for i in range(action_size)), (-0.4,) * action_size, (2.0,) * action_size),
        steps=settings.chain_steps or steps,
        particles=particles,
        has_q=particles > 1,
    )
    return TorchPolicy(spec, PolicyWeights.prepare(denoiser, values if particles > 1 else {}, settings, spec))


def weights_of(policy: TorchPolicy) -> PolicyWeights:
    """The weights of a diffusion policy."""
    assert isinstance(policy.weights, PolicyWeights)
    return policy.weights


def inputs(spec: PolicySpec, rows: int, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Noise, and observations far beyond what an environment gives, so that every branch is met."""
    obs = np.random.default_rng(seed).normal(0, 3, (rows, spec.observation.size)).astype(np.float32)
    return {"obs": obs, "noise": draw_noise(expand_seed(seed, rows), spec.noise_shape)}
