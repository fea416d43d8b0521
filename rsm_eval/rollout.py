"""Vectorised rollouts of any policy, with fixed seeds.

Every episode is a function of (policy, environment id, episode seed) alone. All episodes of a call run
together, one environment each, and one batch of observations per control step goes to the policy; an
environment whose episode is over leaves the batch and is not stepped again.

Shape legend: E episodes, B rows of a batch, L steps of an episode, O observation size, A action size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import BackendError, ConfigError
from rsm_common.policy import ActResult, Policy, Timing
from rsm_common.seeds import expand_seed
from rsm_common.spec import check_env
from rsm_eval.envs import BoxEnv, EnvPool, env_seed, observation_size, time_limit

MAX_BATCH_ROWS = 64
"""Rows per policy call; more episodes are split into several calls. Servers bound their batches."""

Ask = Callable[[NDArray[np.float32], NDArray[np.uint64], NDArray[np.intp]], ActResult]
"""Observations [B, O], policy seeds [B] and numbers [B] of the episodes they belong to -> actions [B, A]."""

_ACTION_SEED_MARK = 0x4143_5449_4F4E_5321  # "ACTIONS!" in ASCII

DEFAULT_MAX_STEPS = 10_000
"""Longest episode in an environment that has no time limit of its own."""


@dataclass(frozen=True)
class Trajectory:
    """One recorded episode."""

    episode_seed: int
    observations: NDArray[np.float32]
    """[L + 1, O]; row k is what the policy saw before action k, the last row is the final observation."""
    actions: NDArray[np.float32]
    """[L, A], environment units."""
    rewards: NDArray[np.float64]
    """[L]"""


@dataclass(frozen=True)
class RolloutResult:
    """The course of each of E episodes, in the order of their seeds."""

    episode_seeds: NDArray[np.uint64]
    """[E]"""
    returns: NDArray[np.float64]
    """[E], undiscounted sum of rewards."""
    lengths: NDArray[np.int64]
    """[E], steps."""
    terminated: NDArray[np.bool_]
    """[E], the environment reached a terminal state."""
    truncated: NDArray[np.bool_]
    """[E], a time limit ended the episode."""
    timings: tuple[Timing, ...] = field(repr=False)
    """One per policy call, in order. The policy's own split; `total_us` as measured around the call."""
    wall_s: float
    """Duration of the whole rollout."""
    policy_s: float
    """The part of it inside `Policy.act`."""
    trajectory: Trajectory | None = field(default=None, repr=False)
    """The recorded episode, if one was asked for."""

    @property
    def steps(self) -> int:
        """Environment steps of all episodes."""
        return int(self.lengths.sum())


def episode_seeds(seed: int, episodes: int) -> NDArray[np.uint64]:
    """The episode seeds [episodes] of one evaluation seed: `rsm_common.seeds.expand_seed`.

    The first is the evaluation seed itself, and a longer evaluation starts with the episodes of a shorter.
    """
    return expand_seed(seed, episodes)


def action_seeds(episode_seed: int, steps: int) -> NDArray[np.uint64]:
    """The policy seeds [steps] of an episode: action k is sampled with element k.

    A pure function of the episode seed and the step, so a trajectory can be replayed on any backend. The
    sequence starts at another place than `episode_seeds`, or the k-th action of the first episode would
    have the noise of the first action of the k-th.
    """
    return expand_seed(int(episode_seed) ^ _ACTION_SEED_MARK, steps)


def rollout(
    policy: Policy,
    env: str | EnvPool,
    seeds: Iterable[int] | NDArray[np.uint64],
    *,
    deterministic: bool = False,
    max_steps: int | None = None,
    max_batch_rows: int = MAX_BATCH_ROWS,
    record: int | None = None,
    ask: Ask | None = None,
) -> RolloutResult:
    """Run one episode per seed and return what happened.

    Args:
        policy: anything that acts.
        env: an environment id, without arguments, or a pool whose environments are used and left open.
        seeds: one episode seed per episode; resets the environment by `env_seed`, and gives the policy's
            seeds by `action_seeds`.
        deterministic: ask the policy for its deterministic action instead.
        max_steps: truncate episodes after this many steps; None leaves it to the environment, or to
            DEFAULT_MAX_STEPS where that has no limit.
        max_batch_rows: most observations in one policy call.
        record: index of the episode whose trajectory is kept.
        ask: how the policy is asked for the actions of a batch, where episodes are to be acted in different
            ways; None asks for `policy.act(obs, seed=seeds)`.

    Raises:
        UnsupportedEnvError: the environment cannot be created, is not Box-to-Box, or is not one the policy is
            made for.
        EnvFaultError: the environment fails, or answers with what its spaces rule out.
        ConfigError: no seeds, or an argument out of range.
        BackendError: the policy answered with a wrong shape, NaN or Inf.
        RequestError: see `Policy.act`.
    """
    seeds_E = np.array([int(seed) for seed in seeds], dtype=np.uint64)
    _check_arguments(len(seeds_E), max_steps, max_batch_rows, record)
    pool = EnvPool(env) if isinstance(env, str) else env
    try:
        envs = pool.take(len(seeds_E))
        check_env(policy.spec, envs[0])
        limit = max_steps or time_limit(envs[0]) or DEFAULT_MAX_STEPS
        episodes = _Episodes(envs, seeds_E, limit, record)
        caller = _Caller(policy, ask or _plainly(policy, deterministic), max_batch_rows)
        started = time.perf_counter()
        while episodes.running:
            numbers = np.array(episodes.running, dtype=np.intp)
            episodes.step(caller.act(episodes.observations(), episodes.action_seeds(), numbers))
        wall_s = time.perf_counter() - started
    finally:
        if pool is not env:
            pool.close()
    return RolloutResult(
        episode_seeds=seeds_E,
        returns=episodes.returns,
        lengths=episodes.lengths,
        terminated=episodes.terminated,
        truncated=episodes.truncated,
        timings=tuple(caller.timings),
        wall_s=wall_s,
        policy_s=sum(timing.total_us for timing in caller.timings) * 1e-6,
        trajectory=episodes.trajectory(),
    )


def _check_arguments(episodes: int, max_steps: int | None, max_batch_rows: int, record: int | None) -> None:
    if episodes < 1:
        raise ConfigError("wanted at least one episode seed, got none; ask for one episode or more")
    if max_batch_rows < 1 or (max_steps is not None and max_steps < 1):
        raise ConfigError(
            f"wanted max_steps and max_batch_rows of at least 1, got {max_steps} and {max_batch_rows}"
        )
    if record is not None and not 0 <= record < episodes:
        raise ConfigError(f"wanted to record an episode from 0 to {episodes - 1}, got {record}")


def _plainly(policy: Policy, deterministic: bool) -> Ask:
    if deterministic:
        return lambda obs_BO, seeds_B, numbers_B: policy.act(obs_BO, deterministic=True)
    return lambda obs_BO, seeds_B, numbers_B: policy.act(obs_BO, seed=seeds_B)


class _Caller:
    """Asks the policy for a batch of actions, and notes how long each call took."""

    def __init__(self, policy: Policy, ask: Ask, max_batch_rows: int) -> None:
        self._policy = policy
        self._ask = ask
        self._max_rows = max_batch_rows
        self._action_size = policy.spec.action.size
        self.timings: list[Timing] = []

    def act(
        self, obs_BO: NDArray[np.float32], seeds_B: NDArray[np.uint64], numbers_B: NDArray[np.intp]
    ) -> NDArray[np.float32]:
        rows = len(obs_BO)
        if rows <= self._max_rows:
            return self._call(obs_BO, seeds_B, numbers_B)
        cuts = [slice(start, start + self._max_rows) for start in range(0, rows, self._max_rows)]
        return np.concatenate([self._call(obs_BO[cut], seeds_B[cut], numbers_B[cut]) for cut in cuts])

    def _call(
        self, obs_BO: NDArray[np.float32], seeds_B: NDArray[np.uint64], numbers_B: NDArray[np.intp]
    ) -> NDArray[np.float32]:
        started = time.perf_counter()
        result = self._ask(obs_BO, seeds_B, numbers_B)
        total_us = (time.perf_counter() - started) * 1e6
        timing, action_BA = result.timing, result.action
        self.timings.append(
            Timing(timing.queue_us, timing.batch_us, timing.compute_us, timing.batch_rows, total_us)
        )
        if action_BA.shape != (len(obs_BO), self._action_size) or not np.isfinite(action_BA).all():
            raise BackendError(
                f"wanted finite actions of shape {[len(obs_BO), self._action_size]} from policy "
                f"{self._policy.spec.name!r}, got shape {list(action_BA.shape)} with values from "
                f"{action_BA.min()} to {action_BA.max()}; the policy is damaged or has diverged"
            )
        return action_BA


class _Episodes:
    """The environments of a rollout and their books; knows nothing of policies."""

    def __init__(
        self, envs: Sequence[BoxEnv], seeds_E: NDArray[np.uint64], limit: int, record: int | None
    ) -> None:
        count = len(envs)
        self.returns = np.zeros(count)
        self.lengths = np.zeros(count, dtype=np.int64)
        self.terminated = np.zeros(count, dtype=np.bool_)
        self.truncated = np.zeros(count, dtype=np.bool_)
        self._envs = envs
        self._seeds_E = seeds_E
        self._limit = limit
        self._now = 0
        self._action_dtype = envs[0].action_space.dtype
        self._obs_EO = np.empty((count, observation_size(envs[0])), dtype=np.float32)
        for index, (env, seed) in enumerate(zip(envs, seeds_E.tolist(), strict=True)):
            self._obs_EO[index], _ = env.reset(seed=env_seed(seed))
        self.running = list(range(count))
        self._record = record
        self._recorded: list[tuple[NDArray[np.float32], NDArray[np.float32], float]] = []
        self._seed_table = np.empty((0, count), dtype=np.uint64)

    def observations(self) -> NDArray[np.float32]:
        """Observations [B, O] of the episodes that are still running."""
        return self._obs_EO[self.running]

    def action_seeds(self) -> NDArray[np.uint64]:
        """Policy seeds [B] of the present step of the episodes that are still running."""
        if self._now >= len(self._seed_table):
            steps = min(self._limit, max(1024, 2 * self._now))
            columns = [action_seeds(seed, steps) for seed in self._seeds_E.tolist()]
            self._seed_table = np.stack(columns, axis=1)
        return self._seed_table[self._now, self.running]

    def step(self, action_BA: NDArray[np.float32]) -> None:
        """Apply one action [B, A] to each running episode."""
        self._now += 1
        out_of_time = self._now >= self._limit
        ended = False
        for index, action in zip(self.running, action_BA.astype(self._action_dtype), strict=True):
            obs, reward, terminated, truncated, _ = self._envs[index].step(action)
            if index == self._record:
                self._recorded.append((self._obs_EO[index].copy(), action.copy(), float(reward)))
            self._obs_EO[index] = obs
            self.returns[index] += float(reward)
            if terminated or truncated or out_of_time:
                ended = True
                self.lengths[index] = self._now
                self.terminated[index] = terminated
                # The cap is a truncation only of what has not ended by itself.
                self.truncated[index] = truncated or not terminated
        if ended:
            self.running = [index for index in self.running if self.lengths[index] == 0]

    def trajectory(self) -> Trajectory | None:
        """The recorded episode; None if none was asked for."""
        if self._record is None:
            return None
        observations, actions, rewards = zip(*self._recorded, strict=True)
        return Trajectory(
            episode_seed=int(self._seeds_E[self._record]),
            observations=np.stack([*observations, self._obs_EO[self._record]]),
            actions=np.stack(actions).astype(np.float32),
            rewards=np.array(rewards),
        )
