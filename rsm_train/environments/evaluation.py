"""Evaluation in training: best of N by the critics and, in the same batch, one particle without them.

Shape legend: E episodes, B rows of a batch, O observation size, T denoising steps, N particles, A action size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsm_common.policy import ActResult
from rsm_common.seeds import draw_noise
from rsm_eval.envs import EnvPool
from rsm_eval.rollout import Ask, rollout
from rsm_train.policy import TorchPolicy


@dataclass(frozen=True)
class Evaluation:
    """Returns of the same E episode seeds, acted in two ways."""

    returns: list[float]
    """[E], the policy as it is exported: the best of N particles by the critics."""
    one_particle: list[float] | None = None
    """[E], the policy with N = 1, which no critic helps; None if it was not evaluated."""


def evaluate(
    policy: TorchPolicy,
    pool: EnvPool,
    seeds_E: NDArray[np.uint64],
    *,
    one_particle: bool = True,
    max_steps: int | None = None,
) -> Evaluation:
    """Run one episode per seed and, with `one_particle`, another in which the policy has one particle.

    All of them are one batch. Its rows are particles and not observations, so that the second kind costs
    the network 1/N of the first, and no calls of its own.

    Args:
        policy: of N particles, with a critic.
        pool: where the environments come from.
        seeds_E: episode seeds.
        one_particle: whether to evaluate N = 1 too.
        max_steps: truncate episodes after this many steps.
    """
    count = len(seeds_E)
    if policy.spec.particles == 1 or not one_particle:
        result = rollout(
            policy,
            pool,
            seeds_E,
            deterministic=policy.spec.has_mean_action,
            max_steps=max_steps,
            max_batch_rows=count,
        )
        returns = result.returns.tolist()
        return Evaluation(returns, returns if one_particle else None)
    result = rollout(
        policy,
        pool,
        np.concatenate([seeds_E, seeds_E]),
        max_steps=max_steps,
        max_batch_rows=2 * count,
        ask=both_ways(policy, count),
    )
    return Evaluation(result.returns[:count].tolist(), result.returns[count:].tolist())


def both_ways(policy: TorchPolicy, count: int) -> Ask:
    """Acts for the episodes below `count` by the best of N particles, for the others with one particle."""
    spec = policy.spec
    single = TorchPolicy(dataclasses.replace(spec, particles=1), policy.weights)

    def ask(obs_BO: NDArray[np.float32], seeds_B: NDArray[np.uint64], numbers_B: NDArray[np.intp]) -> ActResult:
        first = int((numbers_B < count).sum())  # episodes come in the order of their numbers
        best_BTNA = draw_noise(seeds_B[:first], spec.noise_shape)
        # One row per particle: [first, T, N, A] -> [first * N, T, 1, A].
        rows = best_BTNA.transpose(0, 2, 1, 3).reshape(-1, *single.spec.noise_shape)
        noise = np.concatenate([rows, draw_noise(seeds_B[first:], single.spec.noise_shape)])
        obs = np.concatenate([np.repeat(obs_BO[:first], spec.particles, axis=0), obs_BO[first:]])
        result = single.act(obs, noise=noise)
        assert result.q is not None, "a TorchPolicy has critics"
        q_BN = result.q[: len(rows)].reshape(first, spec.particles)
        chosen = np.arange(first) * spec.particles + q_BN.argmax(axis=1)
        picked = np.concatenate([chosen, np.arange(len(rows), len(noise))])
        return dataclasses.replace(result, action=result.action[picked], q=result.q[picked], seed=seeds_B)

    return ask
