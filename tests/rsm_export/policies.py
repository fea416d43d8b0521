"""Policies with random weights, of any size and kind, for tests of the exporter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rsm_export.graph.chain import FoldedChain
from rsm_export.graph.fold import FoldedPolicy

from rsm_common.seeds import draw_noise, expand_seed
from rsm_common.spec import BoxSpec, PolicySpec
from rsm_train.model.categorical import make_atoms
from rsm_train.model.critic import CriticNorm, batch_outputs, fold, init_critics, uses_batch
from rsm_train.model.networks import Params, init_denoiser, init_gaussian
from rsm_train.model.samplers.diffusion import DiffusionSampler, DiffusionWeights
from rsm_train.model.samplers.gaussian import GaussianSampler
from rsm_train.policy import TorchPolicy, action_scale


def random_policy(
    *,
    obs_size: int = 5,
    action_size: int = 3,
    steps: int = 6,
    particles: int = 4,
    hidden: Sequence[int] = (24, 16),
    critics: int = 2,
    kind: Mapping[str, Any] | None = None,
    seed: int = 0,
    **sampler: Any,
) -> TorchPolicy:
    """A policy whose biases are not zero, with action bounds that are not symmetric.

    `kind` is of the critics: see `RandomCritics`.
    """
    generator = torch.Generator().manual_seed(seed)
    denoiser = init_denoiser(obs_size, action_size, hidden, generator)
    made = RandomCritics(obs_size, action_size, hidden, generator, members=critics, **(kind or {}))
    move_biases(denoiser, generator)
    values = made.learnt()
    settings = DiffusionSampler("cosine", steps, particles, sampler.pop("prior_std", 0.7), **sampler)
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
    return TorchPolicy(spec, settings.prepare(denoiser, values if particles > 1 else {}, action_scale(spec)))


class RandomCritics:
    """Critics of a kind, whose values are in a unit."""

    def __init__(
        self,
        obs_size: int,
        action_size: int,
        hidden: Sequence[int],
        generator: torch.Generator,
        *,
        members: int = 2,
        norm: CriticNorm = "none",
        input_norm: bool = False,
        atoms: int | None = None,
        limit: float = 5.0,
        unit: float = 1.0,
    ) -> None:
        self._sizes, self._generator, self._unit = (obs_size, action_size), generator, unit
        self._params = init_critics(
            *(obs_size, action_size, hidden, generator),
            members=members,
            norm=norm,
            input_norm=input_norm,
            atoms=None if atoms is None else make_atoms(atoms, limit),
        )

    def learnt(self) -> Params:
        """Folded, as if learnt: biases are not 0, factors not 1, and statistics have seen rows."""
        obs_size, action_size = self._sizes
        move_biases(self._params, self._generator)
        for _ in range(300 if uses_batch(self._params) else 0):
            obs = 2 * torch.randn(64, obs_size, generator=self._generator) + 1
            action = torch.rand(64, action_size, generator=self._generator) * 2 - 1
            batch_outputs(self._params, obs, action, move_statistics=True)
        return fold(self._params, torch.tensor(self._unit))


def move_biases(params: Params, generator: torch.Generator) -> None:
    """Biases away from 0, and the factors of normalisations from 1."""
    for name, value in params.items():
        if name.endswith("bias") or ("norms" in name and name.endswith("weight")):
            value += 0.3 * torch.randn(value.shape, generator=generator)


def weights_of(policy: TorchPolicy) -> DiffusionWeights:
    """The weights of a diffusion policy."""
    assert isinstance(policy.weights, DiffusionWeights)
    return policy.weights


def random_gaussian(
    *,
    particles: int = 1,
    obs_size: int = 5,
    action_size: int = 3,
    depth: int = 2,
    kind: Mapping[str, Any] | None = None,
    **sampler: Any,
) -> TorchPolicy:
    """A Gaussian policy whose biases are not zero, with action bounds that are not symmetric."""
    generator = torch.Generator().manual_seed(1)
    hidden = [24, 16][:depth]
    policy = init_gaussian(obs_size, action_size, hidden, generator)
    made = RandomCritics(obs_size, action_size, hidden, generator, **(kind or {}))
    move_biases(policy, generator)
    critics = made.learnt()
    like = random_policy(obs_size=obs_size, action_size=action_size, steps=1, particles=particles).spec
    spec = dataclasses.replace(like, algorithm="sac", sampler="gaussian")
    weights = GaussianSampler(particles=particles, **sampler).prepare(
        policy, critics if particles > 1 else {}, action_scale(spec)
    )
    return TorchPolicy(spec, weights)


def chain_of(folded: FoldedPolicy) -> FoldedChain:
    """The chain of a folded diffusion policy."""
    assert isinstance(folded.sampler, FoldedChain)
    return folded.sampler


def with_chain(folded: FoldedPolicy, **changes: Any) -> FoldedPolicy:
    """The same policy with another chain."""
    return dataclasses.replace(folded, sampler=dataclasses.replace(chain_of(folded), **changes))


def inputs(spec: PolicySpec, rows: int, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Noise, and observations far beyond what an environment gives, so that every branch is met."""
    obs = np.random.default_rng(seed).normal(0, 3, (rows, spec.observation.size)).astype(np.float32)
    return {"obs": obs, "noise": draw_noise(expand_seed(seed, rows), spec.noise_shape)}
