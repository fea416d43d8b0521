"""The training loop: collect, learn, evaluate, keep. It knows no algorithm and no environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from rsm_common.errors import EnvFaultError, TrainingError, UnsupportedEnvError
from rsm_common.provenance import provenance
from rsm_common.spec import PolicySpec
from rsm_eval.envs import EnvPool, Factory, control_dt_s, env_boxes, statistics_warning
from rsm_eval.rollout import episode_seeds
from rsm_train.algorithms.common import AlgorithmConfig
from rsm_train.config import RunConfig
from rsm_train.environments.evaluation import Evaluation, evaluate
from rsm_train.environments.identity import check_same_env
from rsm_train.progress import Callback, Kind, Progress, wants_stop
from rsm_train.run.checkpoint import Checkpoint
from rsm_train.run.checkpoint_files import checkpoint_path
from rsm_train.run.learner import Learner
from rsm_train.run.machine import changes, effective_settings, pick_compute, pick_device
from rsm_train.run.metrics import RunLog
from rsm_train.run.run_directory import resume_command
from rsm_train.run.saving import RunCheckpoints, evaluation_due
from rsm_train.run.stopping import RunStopped, StopRequest

_EVALUATION_SEED = 2**32
"""Evaluation episodes of a run with seed s use the seeds of 2**32 + s, not those of `rsm-eval --seeds s`."""

Tell: TypeAlias = Callable[[Kind, Mapping[str, Any]], None]
"""Tells of an event of a kind, with its line of metrics."""


class Trainer:
    """One run: what learns, what evaluates it, and the checkpoints of both."""

    def __init__(
        self,
        run: RunConfig,
        algorithm_config: AlgorithmConfig,
        run_dir: Path,
        checkpoint: Checkpoint | None = None,
        *,
        factory: Factory | None = None,
    ) -> None:
        """Create everything, the environments as they were at the checkpoint; nothing is written yet.

        With a factory, `run.env` is the id that stands for it.

        Raises:
            UnsupportedEnvError: the environment cannot be created, is not Box-to-Box, or is not the one of the
                checkpoint.
            EnvFaultError: an environment fails in its first reset.
            ConfigError: the device or a compiler is not available, or the replay buffer does not fit.
            CheckpointError: the state of the environments in the checkpoint is damaged.
        """
        self.run = run
        self.algorithm_config = algorithm_config
        self.run_dir = run_dir
        self.device = pick_device(run.device)
        torch.set_float32_matmul_precision("high" if run.precision == "tf32" else "highest")
        compute = pick_compute(run, self.device)
        self.effective = effective_settings(self.device, compute)
        self.changed = "" if checkpoint is None else changes(checkpoint.config.get("effective"), self.effective)
        """What of it is another than at the checkpoint, in words."""
        self._pool = EnvPool(run.env, run.env_arg, factory=factory)
        self._evaluation_due = False
        if checkpoint is not None:
            check_same_env(checkpoint.spec, self._pool.take(1)[0])
        self.learner = Learner(run, algorithm_config, self.device, compute, checkpoint, factory=factory)
        self._checkpoints = RunCheckpoints(run_dir, run.keep_checkpoints, self.learner.replay)

    def train(self, log: RunLog, stop: StopRequest, callback: Callback | None = None) -> None:
        """Run to the last step, leaving metrics and checkpoints in the run directory.

        Raises:
            RunStopped: a signal or the callback asked for it; everything is saved.
            TrainingError: the run cannot go on; the last checkpoint is intact.
        """
        tell = self._teller(stop, callback)
        try:
            if self._evaluation_due:  # the run ended between a checkpoint and its evaluation
                self._evaluate_and_record(log, tell)
            while self.learner.step < self.run.total_steps and not stop.made:
                self._advance(log, tell)
        except (EnvFaultError, UnsupportedEnvError) as error:
            raise TrainingError(f"{error}, then go on with: {resume_command(self.run_dir)}") from error
        if self.learner.step < self.run.total_steps:
            self._save(log, tell)
            done = (
                f"stopped and saved at step {self.learner.step:,}; go on with"
                if self.learner.step
                else "stopped before the first step; begin again with"
            )
            raise RunStopped(f"{stop.reason}: {done}: {resume_command(self.run_dir)}", stop.signal)

    def _advance(self, log: RunLog, tell: Tell) -> None:
        """One step of every environment and all that is due after it."""
        self.learner.collect()
        self.learner.learn()
        if self.learner.due(self.run.log_every):
            tell("train", log.train(self.learner.step, self.learner.summary()))
        if self.learner.due(self.run.eval_every):
            self._evaluation_due = True
            self._save(log, tell)  # first: an evaluation that fails must not take steps with it
            self._evaluate_and_record(log, tell)
        elif self.learner.due(self.run.checkpoint_every):
            self._save(log, tell)
        log.advance(self.learner.step)

    def _evaluate_and_record(self, log: RunLog, tell: Tell) -> None:
        """Evaluate the policy of the checkpoint that was just saved, and add the returns to it."""
        step, evaluation = self.learner.step, self.evaluate()
        record = log.evaluation(step, evaluation)
        self._checkpoints.record(step, evaluation.returns, _EVALUATION_SEED + self.run.seed)
        self._evaluation_due = False
        log.show(step, evaluation)
        tell("eval", record)

    def _save(self, log: RunLog, tell: Tell) -> None:
        """Write a checkpoint, and tell of it if there was none of the present step."""
        before = self._checkpoints.saved_step
        self.save(log.times)
        if self._checkpoints.saved_step != before:
            tell("checkpoint", {})

    def _teller(self, stop: StopRequest, callback: Callback | None) -> Tell:
        """What tells the callback of an event and notes whether it wants to stop."""

        def tell(kind: Kind, values: Mapping[str, Any]) -> None:
            if callback is not None:
                saved = self._checkpoints.saved_step
                newest = checkpoint_path(self.run_dir, saved) if saved else None
                progress = Progress(kind, self.learner.step, self.run.total_steps, values, newest)
                stop.by_callback |= wants_stop(callback, progress)

        return tell

    @property
    def evaluation_due(self) -> bool:
        """True if the newest checkpoint is still to be evaluated."""
        return self._evaluation_due

    @property
    def env_warning(self) -> str | None:
        """A warning about the environment; None if there is none."""
        return statistics_warning(self.run.env, self._pool.take(1)[0])

    def evaluate(self, max_steps: int | None = None) -> Evaluation:
        """Returns of the evaluation episodes, the same initial states every time."""
        policy = self.checkpoint().policy()
        seeds = episode_seeds(_EVALUATION_SEED + self.run.seed, self.run.eval_episodes)
        one_particle = self.run.eval_one_particle
        return evaluate(policy, self._pool, seeds, one_particle=one_particle, max_steps=max_steps)

    def save(self, times: Mapping[str, float]) -> None:
        """Write a checkpoint that the run can be resumed from, unless the present step has one.

        Args:
            times: `RunLog.times`.

        Raises:
            TrainingError: it cannot be written, or would hold NaN or Inf.
        """
        if self.learner.step == self._checkpoints.saved_step:
            return
        self.learner.require_finite()
        counters = {
            **times,
            "log_counts": self.learner.log_counts,
            "evaluation_due": self._evaluation_due,
        }
        self._checkpoints.save(self.checkpoint(), counters, self.learner.state())

    def restore(self, checkpoint: Checkpoint) -> None:
        """The reverse of `save`, but for the environments, which began where they were.

        Raises:
            CheckpointError: the checkpoint's training state or its transitions are missing or damaged.
        """
        self._evaluation_due = evaluation_due(checkpoint.state)
        self.learner.restore(checkpoint)
        self._checkpoints.restore(checkpoint)

    def checkpoint(self) -> Checkpoint:
        """The present policy as a checkpoint, not evaluated yet."""
        return Checkpoint(
            path=self.run_dir,
            spec=self._spec(),
            sampler=self.learner.algorithm.agent.sampler,
            networks=self.learner.networks(),
            state={"step": self.learner.step, "updates": self.learner.updates, "evaluation": None},
            probe_obs=self.learner.probe_obs(),
            config=self.config(),
        )

    def config(self) -> dict[str, Any]:
        """The resolved configuration, as written beside every checkpoint."""
        return {
            "run": dataclasses.asdict(self.run),
            "algorithm": dataclasses.asdict(self.algorithm_config),
            "effective": self.effective,
            "provenance": provenance(),
        }

    def close(self) -> None:
        """Close every environment."""
        self.learner.close()
        self._pool.close()

    def _spec(self) -> PolicySpec:
        env = self._pool.take(1)[0]
        observation, action = env_boxes(env)
        return PolicySpec(
            name=self.run_dir.name,
            algorithm=self.run.algo,
            env_id=self.run.env,
            env_args=self.run.env_arg,
            observation=observation,
            action=action,
            steps=self.learner.algorithm.agent.sampler.steps,
            particles=self.learner.algorithm.agent.sampler.particles,
            sampler=self.learner.algorithm.agent.sampler.name,
            control_dt_s=control_dt_s(env),
            provenance={"run": self.run_dir.name, "step": self.learner.step, **provenance()},
        )
