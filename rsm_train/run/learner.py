"""One step of learning: act in the environments, store the transitions, update the networks."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from rsm_common.errors import TrainingError
from rsm_common.seeds import expand_seed
from rsm_eval.envs import Factory
from rsm_train.algorithms.common import Algorithm, AlgorithmConfig, Batch, Metrics
from rsm_train.config import RunConfig, find_algorithm
from rsm_train.environments.envs import TrainingEnvs, check_state
from rsm_train.environments.episodes import EnvSource
from rsm_train.model.kernels import Compute
from rsm_train.model.networks import Params, subset
from rsm_train.model.normalizer import ReturnStatistics, RunningStatistics, scaled
from rsm_train.run.checkpoint import Checkpoint, damaged_training
from rsm_train.run.held_noise import HeldNoise
from rsm_train.run.network_checks import NORMALIZER, VALUE
from rsm_train.run.replay import ReplayBuffer

PROBE_ROWS = 256
RECENT_EPISODES = 20


class Learner:
    """The environments, the replay buffer and the algorithm of a run, with its random streams."""

    def __init__(
        self,
        run: RunConfig,
        algorithm_config: AlgorithmConfig,
        device: torch.device,
        compute: Compute,
        checkpoint: Checkpoint | None = None,
        *,
        factory: Factory | None = None,
    ) -> None:
        """Begin at step 0, but with the environments as they were at the checkpoint.

        Raises:
            UnsupportedEnvError: the environment cannot be created or is not Box-to-Box.
            EnvFaultError: an environment fails in its first reset.
            ConfigError: the replay buffer does not fit into memory.
            CheckpointError: the state of the environments in the checkpoint is damaged.
        """
        self._run = run
        self._device = device
        self.envs = TrainingEnvs(
            EnvSource(run.env, run.env_arg, factory),
            run.num_envs,
            run.seed,
            vector=run.vector,
            state=_env_state(checkpoint, run.num_envs),
        )
        # Separate streams: what is drawn for acting does not depend on how often the networks are updated,
        # and no stream of one run is a stream of the run with the next seed.
        initial, acting, learning = (int(seed) for seed in expand_seed(run.seed, 4)[1:])
        self._acting_generator = torch.Generator().manual_seed(acting)
        self._learning_generator = torch.Generator(device).manual_seed(learning)
        self.algorithm: Algorithm = find_algorithm(run.algo)(
            algorithm_config,
            self.envs.obs_size,
            self.envs.action_size,
            generator=torch.Generator().manual_seed(initial),
            device=device,
            compute=compute,
        )
        self.replay = ReplayBuffer(run.replay_size, self.envs.obs_size, self.envs.action_size, device=device)
        self._statistics = RunningStatistics(self.envs.obs_size) if run.normalize_observation else None
        self._scale = None if self._statistics is None else self._statistics.scale(device)
        self._reward_scale = algorithm_config.reward_scale
        self._returns = ReturnStatistics(run.num_envs, algorithm_config.gamma) if run.normalize_reward else None
        self._held = self._make_held_noise() if run.noise_hold > 1 else None
        self.step = 0
        self.updates = 0
        self._recent_returns: deque[float] = deque(maxlen=RECENT_EPISODES)
        self._means = _RunningMeans(device)

    def collect(self) -> None:
        """One step of every environment: random ones in the warm-up, then exploring ones."""
        count, size = self.envs.count, self.envs.action_size
        if self.step < self._run.warmup_steps:
            action = torch.rand(count, size, generator=self._acting_generator) * 2 - 1
        else:
            noise = {
                name: torch.randn(count, *shape, generator=self._acting_generator)
                for name, shape in self._noise_shapes().items()
            }
            if self._held is not None:
                noise = self._held.hold(noise)
            obs = self._normalized(self.envs.obs.to(self._device))
            drawn = (noise[name].to(self._device) for name in ("policy", "exploration"))
            action = self.algorithm.agent.act(obs, *drawn)
        batch, returns = self.envs.step(action.cpu())
        self.replay.add(batch)
        if self._statistics is not None:
            self._statistics.add(batch.obs)
            self._scale = self._statistics.scale(self._device)
        if self._returns is not None:
            self._returns.add(batch.reward, self.envs.ended)
        if self._held is not None:
            self._held.release(self.envs.ended)
        self._recent_returns.extend(returns)
        self.step += count

    def _noise_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the noise with which one environment acts, in the order in which it is drawn."""
        sampler, size = self.algorithm.agent.sampler, self.envs.action_size
        return {"policy": (sampler.steps, sampler.particles, size), "exploration": (size,)}

    def _make_held_noise(self) -> HeldNoise:
        run = self._run
        return HeldNoise(run.num_envs, run.noise_hold, self._acting_generator, self._noise_shapes())

    def learn(self) -> None:
        """As many updates as are due after the steps taken so far."""
        due = int(max(0, self.step - self._run.warmup_steps) * self._run.updates_per_step)
        while self.updates < due:
            batch = self._normalized_batch(self.replay.sample(self._run.batch_size, self._learning_generator))
            noise = self.algorithm.draw_noise(self._run.batch_size, self._learning_generator)
            self._means.add(self.algorithm.update(batch, noise))
            self.updates += 1

    def due(self, every: int) -> bool:
        """True if the present step is the first at or after a multiple of `every`, or the last of all."""
        last = self.step >= self._run.total_steps
        return last or self.step // every > (self.step - self.envs.count) // every

    def summary(self) -> dict[str, float]:
        """Means of the metrics since the last call, and the rates and counters of a log line.

        Raises:
            TrainingError: a value is NaN or Inf.
        """
        rates = self._means.rates(self.step, self.updates)
        values = {**rates, **self._means.take(), "temperature": self.algorithm.agent.temperature}
        if self._recent_returns:
            values["episode_return"] = float(np.mean(self._recent_returns))
        values["updates"] = self.updates
        for name, value in values.items():
            if not math.isfinite(value):
                raise self._diverged(f"{name} became {value}")
        return values

    def networks(self) -> dict[str, Params]:
        """The networks of the agent, the unit of their values and the normalisation of observations."""
        networks = self.algorithm.agent.networks()
        unit = 1.0 if self._returns is None else self._returns.unit
        networks[VALUE] = {"unit": torch.tensor(unit / self._reward_scale)}
        if self._statistics is not None:
            networks[NORMALIZER] = dict(vars(self._statistics.scale()))
        return networks

    def probe_obs(self) -> Tensor:
        """(P, O) observations from the replay buffer, the same choice for the same content."""
        rows = min(PROBE_ROWS, len(self.replay))
        generator = torch.Generator(self._device).manual_seed(self._run.seed)
        return self.replay.sample_obs(rows, generator).cpu()

    @property
    def log_counts(self) -> dict[str, int]:
        """How many values each mean of `summary` holds so far, by the name of the metric."""
        return self._means.counts

    def state(self) -> dict[str, Tensor]:
        """What learning continues from beside the networks and the replay buffer.

        "algorithm.*" is `Agent.state`, "envs.*" `TrainingEnvs.state`, "normalizer.*" `RunningStatistics.state`,
        "returns.*" `ReturnStatistics.state`, "held.*" `HeldNoise.state`, "means.*" the sums of the metrics
        since the last log line, "generator.*" the states of the random generators, "recent_returns" the last
        episode returns.
        """
        return {
            **_prefixed("algorithm", self.algorithm.agent.state()),
            **_prefixed("envs", self.envs.state()),
            **_prefixed("means", self._means.sums),
            **({} if self._statistics is None else _prefixed("normalizer", self._statistics.state())),
            **({} if self._returns is None else _prefixed("returns", self._returns.state())),
            **({} if self._held is None else _prefixed("held", self._held.state())),
            "generator.acting": self._acting_generator.get_state(),
            "generator.learning": self._learning_generator.get_state(),
            "recent_returns": torch.tensor(list(self._recent_returns), dtype=torch.float64),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from the `state` of a checkpoint, but for the environments, which began where they were.

        Raises:
            CheckpointError: the state is damaged.
        """
        training, counters = checkpoint.training, checkpoint.state["training"]
        assert training is not None
        try:
            self.step = int(checkpoint.state["step"])
            self.updates = int(checkpoint.state["updates"])
            self.algorithm.agent.restore(checkpoint.networks, subset(training, "algorithm."), self.updates)
            if self._statistics is not None:
                self._statistics.restore(subset(training, "normalizer."))
                self._scale = self._statistics.scale(self._device)
            restarted = torch.zeros(self.envs.count, dtype=torch.bool)
            restarted[self.envs.restarted] = True
            if self._returns is not None:
                self._returns.restore(subset(training, "returns."))
                self._returns.end_episodes(restarted)
            if self._held is not None:
                self._held.restore(subset(training, "held."))
                self._held.release(restarted)
            self._means.restore(subset(training, "means."), counters["log_counts"], self.step, self.updates)
            self._acting_generator.set_state(training["generator.acting"])
            self._restore_learning_generator(training["generator.learning"])
            self._recent_returns.extend(training["recent_returns"].tolist())
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise damaged_training(checkpoint.path, error) from None

    def _restore_learning_generator(self, state: Tensor) -> None:
        if state.shape == self._learning_generator.get_state().shape:
            self._learning_generator.set_state(state)
        else:
            # A CPU's state means nothing on a GPU: another stream, of this step.
            stream = np.random.SeedSequence(self._run.seed, spawn_key=(self.step,)).generate_state(1, np.uint64)
            self._learning_generator.manual_seed(int(stream[0]))

    def require_finite(self) -> None:
        """Keep NaN and Inf out of evaluations and checkpoints.

        Raises:
            TrainingError: a network, an optimiser or the sum of a metric holds one.
        """
        learnt = [_prefixed(name, params) for name, params in self.algorithm.agent.networks().items()]
        for tensors in (*learnt, self.algorithm.agent.state(), self._means.sums):
            for name, value in tensors.items():
                if value.is_floating_point() and not torch.isfinite(value).all():
                    raise self._diverged(f"{name} holds NaN or Inf")

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()

    def _normalized(self, obs_BO: Tensor) -> Tensor:
        """Observations on the run's device as the networks take them: raw, or with the present statistics."""
        return scaled(self._scale, obs_BO)

    def _normalized_batch(self, batch: Batch) -> Batch:
        obs, next_obs = self._normalized(batch.obs), self._normalized(batch.next_obs)
        reward = batch.reward if self._returns is None else batch.reward / self._returns.unit
        return dataclasses.replace(batch, obs=obs, next_obs=next_obs, reward=reward)

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what} at step {self.step}; checkpoints written so far are intact, begin a run in another "
            "directory with lower learning rates or a higher temperature"
        )


class _RunningMeans:
    """Means of metrics since the last log line, summed on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._last = (time.monotonic(), 0, 0)

    def add(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            total = self.sums.get(name)
            self.sums[name] = value.clone() if total is None else total.add_(value)
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums.clear()
        self.counts.clear()
        return means

    def restore(self, sums: Mapping[str, Tensor], counts: Mapping[str, int], step: int, updates: int) -> None:
        self.counts = {name: int(count) for name, count in counts.items()}
        self.sums = {name: sums[name].to(self._device) for name in self.counts}  # in the order of a log line
        self._last = (time.monotonic(), step, updates)

    def rates(self, step: int, updates: int) -> dict[str, float]:
        now = time.monotonic()
        before, last_step, last_updates = self._last
        self._last = (now, step, updates)
        seconds = max(now - before, 1e-9)
        return {
            "steps_per_s": (step - last_step) / seconds,
            "updates_per_s": (updates - last_updates) / seconds,
        }


def _env_state(checkpoint: Checkpoint | None, count: int) -> dict[str, Tensor] | None:
    """The tensors that the environments of a checkpoint are restored from.

    Raises:
        CheckpointError: some of it is missing or has another length.
    """
    if checkpoint is None or checkpoint.training is None:
        return None
    state = subset(checkpoint.training, "envs.")
    try:
        check_state(state, count)
    except ValueError as error:
        raise damaged_training(checkpoint.path, error) from None
    return state


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in tensors.items()}
