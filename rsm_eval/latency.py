"""Latency of a control loop: one observation per call, each answered before the next is made."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import ConfigError
from rsm_common.policy import STAGES, Policy
from rsm_common.spec import check_env
from rsm_eval.envs import EnvPool, env_seed
from rsm_eval.rollout import action_seeds

PERCENTILES = (50, 90, 99)
WARMUP_CALLS = 50


@dataclass(frozen=True)
class Latency:
    """Samples of one policy, C calls."""

    samples_ms: dict[str, NDArray[np.float64]] = field(repr=False)
    """Per stage [C], milliseconds."""

    @property
    def calls(self) -> int:
        """C, the number of calls that were measured."""
        return len(self.samples_ms["total"])

    def percentile_ms(self, stage: str, percent: float) -> float:
        """A percentile of one stage, milliseconds."""
        return float(np.percentile(self.samples_ms[stage], percent))

    def percentiles(self) -> dict[str, dict[str, float]]:
        """{stage: {"p50_ms": ..., "p90_ms": ..., "p99_ms": ...}}"""
        return {
            stage: {f"p{percent}_ms": self.percentile_ms(stage, percent) for percent in PERCENTILES}
            for stage in STAGES
        }


def measure_latency(
    policy: Policy,
    env: str | EnvPool,
    *,
    calls: int = 500,
    warmup_calls: int = WARMUP_CALLS,
    seed: int = 0,
    deterministic: bool = False,
) -> Latency:
    """Drive one environment with the policy, and time every call.

    Args:
        policy: anything that acts.
        env: an environment id, without arguments, or a pool whose first environment is used and left open.
        calls: number of timed calls.
        warmup_calls: calls before them that are not counted.
        seed: episode seed of the environment and of the actions; later episodes go on from it.
        deterministic: ask for deterministic actions.

    Raises:
        UnsupportedEnvError, ConfigError: see `rsm_eval.rollout.rollout`.
        RequestError: see `Policy.act`.
    """
    if calls < 1 or warmup_calls < 0:
        raise ConfigError(f"wanted at least 1 latency call, got {calls} after {warmup_calls} for warm-up")
    pool = EnvPool(env) if isinstance(env, str) else env
    try:
        (environment,) = pool.take(1)
        check_env(policy.spec, environment)
        obs, _ = environment.reset(seed=env_seed(seed))
        rows: list[tuple[float, ...]] = []
        for action_seed in action_seeds(seed, warmup_calls + calls).tolist():
            action, row = _timed_act(policy, np.asarray(obs, dtype=np.float32), action_seed, deterministic)
            rows.append(row)
            obs, _, terminated, truncated, _ = environment.step(action)
            if terminated or truncated:
                obs, _ = environment.reset()
    finally:
        if pool is not env:
            pool.close()
    table = np.array(rows[warmup_calls:])
    return Latency({stage: table[:, column] for column, stage in enumerate(STAGES)})


def _timed_act(
    policy: Policy, obs: NDArray[np.float32], seed: int, deterministic: bool
) -> tuple[NDArray[Any], tuple[float, ...]]:
    """One action [A] and the milliseconds of each of STAGES."""
    started = time.perf_counter()
    result = policy.act(obs, deterministic=True) if deterministic else policy.act(obs, seed=seed)
    total_ms = (time.perf_counter() - started) * 1e3
    timing = result.timing
    known = (timing.queue_us / 1e3, timing.batch_us / 1e3, timing.compute_us / 1e3)
    # Another clock measured the known stages: their sum may exceed the total by a rounding error.
    return result.action, (*known, max(0.0, total_ms - sum(known)), total_ms)
