"""The training loop: collect, learn, evaluate, keep. It knows no algorithm and no environment."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsm_eval.envs import EnvPool, control_dt_s, env_boxes
from rsm_eval.rollout import episode_seeds
from rsm_serve import atomic
from rsm_serve.commandline import require_extra
from rsm_serve.errors import ConfigError, TrainingError
from rsm_serve.policy import PolicySpec
from rsm_serve.provenance import provenance
from rsm_serve.seeds import expand_seed
from rsm_train.algorithms.common import Algorithm, Metrics
from rsm_train.checkpoint import CONFIG_FILE, Checkpoint, prune_checkpoints, save_checkpoint
from rsm_train.config import AlgorithmConfig, RunConfig, make_algorithm
from rsm_train.envs import TrainingEnvs
from rsm_train.evaluation import Evaluation, evaluate
from rsm_train.kernels import Compute, can_compile
from rsm_train.metrics import RunLog, extra_sinks
from rsm_train.replay import ReplayBuffer

PROBE_ROWS = 256
RECENT_EPISODES = 20
_EVALUATION_SEED = 2**32
"""Evaluation episodes of a run with seed s use the seeds of 2**32 + s, which no environment of the run has."""


class Trainer:
    """One run: its environments, its replay buffer, its algorithm and its books."""

    def __init__(self, run: RunConfig, algorithm_config: AlgorithmConfig, run_dir: Path) -> None:
        """Create everything; nothing is written yet.

        Raises:
            UnsupportedEnvError: the environment is unknown or not Box-to-Box.
            ConfigError: the device is not available.
        """
        self.run = run
        self.algorithm_config = algorithm_config
        self.run_dir = run_dir
        self.device = pick_device(run.device)
        torch.set_float32_matmul_precision("high" if run.precision == "tf32" else "highest")
        self.envs = TrainingEnvs(run.env, run.num_envs, run.seed)
        # Separate streams: what is drawn for acting does not depend on how often the networks are updated,
        # and no stream of one run is a stream of the run with the next seed.
        initial, acting, learning = (int(seed) for seed in expand_seed(run.seed, 4)[1:])
        self._acting_generator = torch.Generator().manual_seed(acting)
        self._learning_generator = torch.Generator(self.device).manual_seed(learning)
        self.algorithm: Algorithm = make_algorithm(
            algorithm_config,
            self.envs.obs_size,
            self.envs.action_size,
            generator=torch.Generator().manual_seed(initial),
            device=self.device,
            compute=pick_compute(run, self.device),
        )
        self.replay = ReplayBuffer(
            run.replay_size, self.envs.obs_size, self.envs.action_size, device=self.device
        )
        self.step = 0
        self.updates = 0
        self._recent_returns: deque[float] = deque(maxlen=RECENT_EPISODES)
        self._means = _RunningMeans()
        self._pool = EnvPool(run.env)

    def train(self, log: RunLog) -> None:
        """Run to the last step, leaving metrics and checkpoints in the run directory."""
        run = self.run
        next_log, next_eval = run.log_every, run.eval_every
        while self.step < run.total_steps:
            self.collect()
            self.learn()
            if self.step >= next_log or self.step >= run.total_steps:
                next_log += run.log_every
                log.train(self.step, self._summary())
            if self.step >= next_eval or self.step >= run.total_steps:
                next_eval += run.eval_every
                evaluation = self.evaluate()
                log.evaluation(self.step, evaluation)
                self.save(evaluation.returns)
            log.advance(self.step)

    def collect(self) -> None:
        """One step of every environment: random ones in the warm-up, then exploring ones."""
        count, size = self.envs.count, self.envs.action_size
        if self.step < self.run.warmup_steps:
            action = torch.rand(count, size, generator=self._acting_generator) * 2 - 1
        else:
            sampler = self.algorithm.agent.sampler
            noise_shape = (count, sampler.steps, sampler.particles, size)
            noise = torch.randn(noise_shape, generator=self._acting_generator)
            exploration = torch.randn(count, size, generator=self._acting_generator)
            action = self.algorithm.agent.act(*(x.to(self.device) for x in (self.envs.obs, noise, exploration)))
        batch, returns = self.envs.step(action.cpu())
        self.replay.add(batch)
        self._recent_returns.extend(returns)
        self.step += count

    def learn(self) -> None:
        """As many updates as are due after the steps taken so far."""
        due = int(max(0, self.step - self.run.warmup_steps) * self.run.updates_per_step)
        while self.updates < due:
            batch = self.replay.sample(self.run.batch_size, self._learning_generator)
            noise = self.algorithm.draw_noise(self.run.batch_size, self._learning_generator)
            self._means.add(self.algorithm.update(batch, noise))
            self.updates += 1

    def evaluate(self, max_steps: int | None = None) -> Evaluation:
        """Returns of the evaluation episodes, the same initial states every time."""
        policy = self.checkpoint(None).policy()
        seeds = episode_seeds(_EVALUATION_SEED + self.run.seed, self.run.eval_episodes)
        one_particle = self.run.eval_one_particle
        return evaluate(policy, self._pool, seeds, one_particle=one_particle, max_steps=max_steps)

    def save(self, returns: list[float] | None) -> None:
        """Write a checkpoint and delete those no longer kept."""
        try:
            save_checkpoint(self.run_dir, self.checkpoint(returns))
        except OSError as error:
            raise TrainingError(
                f"cannot write the checkpoint of step {self.step} to {str(self.run_dir)!r}: {error.strerror}; "
                "earlier checkpoints are intact, make room and train again"
            ) from None
        prune_checkpoints(self.run_dir, self.run.keep_checkpoints)

    def checkpoint(self, returns: list[float] | None) -> Checkpoint:
        """The present state as a checkpoint, with the evaluation's returns if there was one."""
        evaluation = None
        if returns is not None:
            evaluation = {
                "mean": float(np.mean(returns)),
                "std": float(np.std(returns)),
                "episodes": len(returns),
                "seed": _EVALUATION_SEED + self.run.seed,
            }
        return Checkpoint(
            path=self.run_dir,
            spec=dataclasses.replace(self._spec(), evaluation=evaluation),
            sampler=self.algorithm.agent.sampler,
            networks=self.algorithm.agent.networks(),
            state={"step": self.step, "updates": self.updates, "evaluation": evaluation},
            probe_obs=self._probe_obs(),
            config=self.config(),
        )

    def config(self) -> dict[str, Any]:
        """The resolved configuration, as written beside every checkpoint."""
        return {
            "run": dataclasses.asdict(self.run),
            "algorithm": dataclasses.asdict(self.algorithm_config),
            "provenance": provenance(),
        }

    def close(self) -> None:
        """Close every environment."""
        self.envs.close()
        self._pool.close()

    def _probe_obs(self) -> Tensor:
        rows = min(PROBE_ROWS, len(self.replay))
        generator = torch.Generator(self.device).manual_seed(self.run.seed)
        return self.replay.sample_obs(rows, generator).cpu()

    def _spec(self) -> PolicySpec:
        env = self._pool.take(1)[0]
        observation, action = env_boxes(env)
        return PolicySpec(
            name=self.run_dir.name,
            algorithm=self.run.algo,
            env_id=self.run.env,
            observation=observation,
            action=action,
            steps=self.algorithm.agent.sampler.steps,
            particles=self.algorithm.agent.sampler.particles,
            control_dt_s=control_dt_s(env),
            provenance={"run": self.run_dir.name, "step": self.step, **provenance()},
        )

    def _summary(self) -> dict[str, float]:
        rates = self._means.rates(self.step, self.updates)
        values = {**rates, **self._means.take(), "temperature": self.algorithm.agent.temperature}
        if self._recent_returns:
            values["episode_return"] = float(np.mean(self._recent_returns))
        values["updates"] = self.updates
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{name} became {value} at step {self.step}; checkpoints written so far are intact, lower "
                    "the learning rates or raise the temperature"
                )
        return values


def train(run: RunConfig, algorithm_config: AlgorithmConfig, run_dir: Path) -> Path:
    """Train and return the run directory.

    Raises:
        ConfigError: the run directory holds another run already, or the device is not available.
        UnsupportedEnvError: the environment is unknown or not Box-to-Box.
        MissingExtraError: wandb is asked for and not installed.
    """
    if run.wandb is not None:
        require_extra("rsm-train --wandb", "wandb", ["wandb"])
    _check_run_directory(run_dir)
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    trainer = Trainer(run, algorithm_config, run_dir)
    try:
        _make_run_directory(run_dir)
        # First, as wandb may refuse: the directory is then still empty, and can be used again.
        sinks = extra_sinks(run.wandb, run_dir, trainer.config())
        content = json.dumps(trainer.config(), indent=2) + "\n"
        atomic.write_file(run_dir / CONFIG_FILE, content.encode())
        with RunLog(run_dir, run.total_steps, sinks) as log:
            trainer.train(log)
    finally:
        trainer.close()
    return run_dir


def pick_compute(run: RunConfig, device: torch.device) -> Compute:
    """How a run computes its particles.

    Raises:
        ConfigError: compilation was asked for and there is no compiler.
    """
    possible = can_compile(device)
    if run.compile == "on" and not possible:
        wanted = "Triton" if device.type == "cuda" else "a C++ compiler (g++, clang++ or $CXX)"
        raise ConfigError(f"wanted {wanted} for compile on, found none; install one or use --compile off")
    enabled = run.compile == "on" or (run.compile == "auto" and possible)
    return Compute(precision=run.precision, compile=enabled)


def _check_run_directory(run_dir: Path) -> None:
    if run_dir.exists() and not (run_dir.is_dir() and not any(run_dir.iterdir())):
        found = "is not empty" if run_dir.is_dir() else "is a file"
        raise ConfigError(
            f"wanted a new run directory, got {str(run_dir)!r}, which {found}; choose another with --out"
        )


def _make_run_directory(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot create the run directory {str(run_dir)!r}: {error.strerror}; choose another with --out"
        ) from None


def pick_device(name: str) -> torch.device:
    """The torch device of a name; "auto" is CUDA where there is one.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"wanted a device of auto, cpu, cuda or cuda:N, got {name!r}") from None
    available = device.type == "cpu" or (
        device.type == "cuda" and torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    )
    if not available:
        raise ConfigError(f"device {name!r} is not available here; use --device cpu or --device auto")
    return device


class _RunningMeans:
    """Means of metrics since the last log line, summed on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._last = (time.monotonic(), 0, 0)

    def add(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            total = self._sums.get(name)
            self._sums[name] = value.clone() if total is None else total.add_(value)
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means

    def rates(self, step: int, updates: int) -> dict[str, float]:
        now = time.monotonic()
        before, last_step, last_updates = self._last
        self._last = (now, step, updates)
        seconds = max(now - before, 1e-9)
        return {
            "steps_per_s": (step - last_step) / seconds,
            "updates_per_s": (updates - last_updates) / seconds,
        }
