"""The training loop: collect, learn, evaluate, keep. It knows no algorithm and no environment."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import sys
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from rsm_common import atomic
from rsm_common.commandline import require_extra
from rsm_common.errors import (
    CheckpointError,
    ConfigError,
    DamagedCheckpointError,
    EnvFaultError,
    TrainingError,
    UnsupportedEnvError,
)
from rsm_common.manifest import FileRecord
from rsm_common.provenance import provenance
from rsm_common.seeds import expand_seed
from rsm_common.spec import PolicySpec
from rsm_eval.envs import EnvPool, control_dt_s, env_boxes, statistics_warning
from rsm_eval.rollout import episode_seeds
from rsm_train.algorithms.common import Algorithm, AlgorithmConfig, Batch, Metrics
from rsm_train.config import RunConfig, find_algorithm
from rsm_train.environments.envs import TrainingEnvs, check_state
from rsm_train.environments.episodes import EnvSource
from rsm_train.environments.evaluation import Evaluation, evaluate
from rsm_train.environments.identity import check_same_env
from rsm_train.model.kernels import Compute, can_compile
from rsm_train.model.networks import Params, subset
from rsm_train.model.normalizer import RunningStatistics, scaled
from rsm_train.run.checkpoint import (
    NORMALIZER,
    Checkpoint,
    damaged_training,
    is_sound,
    load_training,
    record_evaluation,
    save_checkpoint,
)
from rsm_train.run.checkpoint_files import (
    CONFIG_FILE,
    REPLAY_DIR,
    checkpoint_path,
    list_checkpoints,
    prune_checkpoints,
    read_state,
    set_aside,
)
from rsm_train.run.metrics import RunLog, Tolerant, extra_sinks, mute_closed_streams
from rsm_train.run.replay import ReplayBuffer, load_segments, needed_records, remove_segments, write_segments
from rsm_train.run.run_directory import (
    lock,
    make,
    remove_leftovers,
    require_new,
    require_no_lost_checkpoint,
    resume_command,
    sync_metrics,
    trim_metrics,
    write_advice,
)
from rsm_train.run.stopping import RunStopped, StopRequest

PROBE_ROWS = 256
RECENT_EPISODES = 20
_EVALUATION_SEED = 2**32
"""Evaluation episodes of a run with seed s use the seeds of 2**32 + s, not those of `rsm-eval --seeds s`."""

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


class Trainer:
    """One run: its environments, its replay buffer, its algorithm and its books."""

    def __init__(
        self,
        run: RunConfig,
        algorithm_config: AlgorithmConfig,
        run_dir: Path,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Create everything, the environments as they were at the checkpoint; nothing is written yet.

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
        self.effective = {
            "threads": torch.get_num_threads(),
            "compiled": compute.compile,
            "device": str(self.device),
            "torch": torch.__version__,
        }
        """What the settings came to here; other values round differently."""
        self.changed = (
            "" if checkpoint is None else _changes(checkpoint.config.get("effective"), self.effective)
        )
        """What of it is another than at the checkpoint, in words."""
        self._pool = EnvPool(run.env, run.env_arg)
        self._evaluation_due = False
        if checkpoint is not None:
            check_same_env(checkpoint.spec, self._pool.take(1)[0])
        self.envs = TrainingEnvs(
            EnvSource(run.env, run.env_arg),
            run.num_envs,
            run.seed,
            vector=run.vector,
            state=_env_state(checkpoint, run.num_envs),
        )
        # Separate streams: what is drawn for acting does not depend on how often the networks are updated,
        # and no stream of one run is a stream of the run with the next seed.
        initial, acting, learning = (int(seed) for seed in expand_seed(run.seed, 4)[1:])
        self._acting_generator = torch.Generator().manual_seed(acting)
        self._learning_generator = torch.Generator(self.device).manual_seed(learning)
        self.algorithm: Algorithm = find_algorithm(run.algo)(
            algorithm_config,
            self.envs.obs_size,
            self.envs.action_size,
            generator=torch.Generator().manual_seed(initial),
            device=self.device,
            compute=compute,
        )
        self.replay = ReplayBuffer(
            run.replay_size, self.envs.obs_size, self.envs.action_size, device=self.device
        )
        self._statistics = RunningStatistics(self.envs.obs_size) if run.normalize_observation else None
        self._scale = None if self._statistics is None else self._statistics.scale(self.device)
        self.step = 0
        self.updates = 0
        self._saved_step = 0
        self._replay_records: dict[str, FileRecord] = {}
        self._recent_returns: deque[float] = deque(maxlen=RECENT_EPISODES)
        self._means = _RunningMeans(self.device)

    def train(self, log: RunLog, stop: StopRequest) -> None:
        """Run to the last step, leaving metrics and checkpoints in the run directory.

        Raises:
            RunStopped: a signal asked for it; everything is saved.
            TrainingError: the run cannot go on; the last checkpoint is intact.
        """
        try:
            if self._evaluation_due:  # the run ended between a checkpoint and its evaluation
                self._evaluate_and_record(log)
            while self.step < self.run.total_steps and stop.signal_name is None:
                self._advance(log)
        except (EnvFaultError, UnsupportedEnvError) as error:
            raise TrainingError(f"{error}, then go on with: {resume_command(self.run_dir)}") from error
        if self.step < self.run.total_steps:
            self.save(log.wall_s)
            done = (
                f"stopped and saved at step {self.step:,}; go on with"
                if self.step
                else "stopped before the first step; begin again with"
            )
            raise RunStopped(f"{stop.signal_name}: {done}: {resume_command(self.run_dir)}")

    def _advance(self, log: RunLog) -> None:
        """One step of every environment and all that is due after it."""
        self.collect()
        self.learn()
        if self._due(self.run.log_every):
            log.train(self.step, self._summary())
        if self._due(self.run.eval_every):
            self._evaluation_due = True
            self.save(log.wall_s)  # first: an evaluation that fails must not take steps with it
            self._evaluate_and_record(log)
        elif self._due(self.run.checkpoint_every):
            self.save(log.wall_s)
        log.advance(self.step)

    def _evaluate_and_record(self, log: RunLog) -> None:
        """Evaluate the policy of the checkpoint that was just saved, and add the returns to it."""
        evaluation = self.evaluate()
        log.evaluation(self.step, evaluation)
        with _disk_errors(self.run_dir, f"the evaluation of step {self.step}"):
            sync_metrics(self.run_dir)
            record_evaluation(
                checkpoint_path(self.run_dir, self.step), self._return_statistics(evaluation.returns)
            )
        self._evaluation_due = False
        self._prune()
        log.show(self.step, evaluation)

    def _return_statistics(self, returns: list[float]) -> dict[str, Any]:
        return {
            "mean": float(np.mean(returns)),
            "std": float(np.std(returns)),
            "episodes": len(returns),
            "seed": _EVALUATION_SEED + self.run.seed,
        }

    @property
    def evaluation_due(self) -> bool:
        """True if the newest checkpoint is still to be evaluated."""
        return self._evaluation_due

    @property
    def env_warning(self) -> str | None:
        """A warning about the environment; None if there is none."""
        return statistics_warning(self.run.env, self._pool.take(1)[0])

    def _due(self, every: int) -> bool:
        """Whether the present step is the first at or after a multiple of `every`, or the last of all."""
        last = self.step >= self.run.total_steps
        return last or self.step // every > (self.step - self.envs.count) // every

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
            obs = self._normalized(self.envs.obs.to(self.device))
            action = self.algorithm.agent.act(obs, noise.to(self.device), exploration.to(self.device))
        batch, returns = self.envs.step(action.cpu())
        self.replay.add(batch)
        if self._statistics is not None:
            self._statistics.add(batch.obs)
            self._scale = self._statistics.scale(self.device)
        self._recent_returns.extend(returns)
        self.step += count

    def learn(self) -> None:
        """As many updates as are due after the steps taken so far."""
        due = int(max(0, self.step - self.run.warmup_steps) * self.run.updates_per_step)
        while self.updates < due:
            batch = self._normalized_batch(self.replay.sample(self.run.batch_size, self._learning_generator))
            noise = self.algorithm.draw_noise(self.run.batch_size, self._learning_generator)
            self._means.add(self.algorithm.update(batch, noise))
            self.updates += 1

    def _normalized(self, obs_BO: Tensor) -> Tensor:
        """Observations on the run's device as the networks take them: raw, or with the present statistics."""
        return scaled(self._scale, obs_BO)

    def _normalized_batch(self, batch: Batch) -> Batch:
        obs, next_obs = self._normalized(batch.obs), self._normalized(batch.next_obs)
        return dataclasses.replace(batch, obs=obs, next_obs=next_obs)

    def evaluate(self, max_steps: int | None = None) -> Evaluation:
        """Returns of the evaluation episodes, the same initial states every time."""
        policy = self.checkpoint().policy()
        seeds = episode_seeds(_EVALUATION_SEED + self.run.seed, self.run.eval_episodes)
        one_particle = self.run.eval_one_particle
        return evaluate(policy, self._pool, seeds, one_particle=one_particle, max_steps=max_steps)

    def save(self, wall_s: float) -> None:
        """Write a checkpoint that the run can be resumed from, and delete what is no longer needed.

        Raises:
            TrainingError: it cannot be written, or would hold NaN or Inf.
        """
        if self.step == self._saved_step:
            return
        self._require_finite()
        checkpoint = self.checkpoint()
        state = {
            "added": self.replay.added,
            "wall_s": wall_s,
            "log_counts": self._means.counts,
            "evaluation_due": self._evaluation_due,
        }
        with _disk_errors(self.run_dir, f"the checkpoint of step {self.step}"):
            sync_metrics(self.run_dir)
            write_segments(self.run_dir / REPLAY_DIR, self.replay, self._replay_records)
            save_checkpoint(
                self.run_dir,
                dataclasses.replace(
                    checkpoint,
                    state={**checkpoint.state, "training": state},
                    training=self.training_state(),
                    replay_records=needed_records(self._replay_records, self.replay.oldest),
                ),
            )
        self._saved_step = self.step
        self._prune()

    def training_state(self) -> dict[str, Tensor]:
        """What learning continues from beside the networks and the replay buffer.

        "algorithm.*" is `Agent.state`, "envs.*" `TrainingEnvs.state`, "normalizer.*" `RunningStatistics.state`,
        "means.*" the sums of the metrics since the last log line, "generator.*" the states of the random
        generators, "recent_returns" the last episode returns.
        """
        return {
            **_prefixed("algorithm", self.algorithm.agent.state()),
            **_prefixed("envs", self.envs.state()),
            **_prefixed("means", self._means.sums),
            **({} if self._statistics is None else _prefixed("normalizer", self._statistics.state())),
            "generator.acting": self._acting_generator.get_state(),
            "generator.learning": self._learning_generator.get_state(),
            "recent_returns": torch.tensor(list(self._recent_returns), dtype=torch.float64),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """The reverse of `save`, but for the environments, which began where they were.

        Raises:
            CheckpointError: the checkpoint's training state or its transitions are missing or damaged.
        """
        training, counters = checkpoint.training, checkpoint.state["training"]
        assert training is not None
        try:
            self.step = self._saved_step = int(checkpoint.state["step"])
            self.updates = int(checkpoint.state["updates"])
            self._evaluation_due = evaluation_due(checkpoint.state)
            self.algorithm.agent.restore(checkpoint.networks, subset(training, "algorithm."), self.updates)
            if self._statistics is not None:
                self._statistics.restore(subset(training, "normalizer."))
                self._scale = self._statistics.scale(self.device)
            self._means.restore(subset(training, "means."), counters["log_counts"], self.step, self.updates)
            self._acting_generator.set_state(training["generator.acting"])
            self._restore_learning_generator(training["generator.learning"])
            self._recent_returns.extend(training["recent_returns"].tolist())
            added = int(counters["added"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise damaged_training(checkpoint.path, error) from None
        self._replay_records = dict(checkpoint.replay_records)
        load_segments(self.run_dir / REPLAY_DIR, self.replay, added, self._replay_records)

    def _restore_learning_generator(self, state: Tensor) -> None:
        if state.shape == self._learning_generator.get_state().shape:
            self._learning_generator.set_state(state)
        else:
            # A CPU's state means nothing on a GPU: another stream, of this step.
            stream = np.random.SeedSequence(self.run.seed, spawn_key=(self.step,)).generate_state(1, np.uint64)
            self._learning_generator.manual_seed(int(stream[0]))

    def _require_finite(self) -> None:
        """Keep NaN and Inf out of evaluations and checkpoints.

        Raises:
            TrainingError: a network, an optimiser or the sum of a metric holds one.
        """
        learnt = [_prefixed(name, params) for name, params in self.algorithm.agent.networks().items()]
        for tensors in (*learnt, self.algorithm.agent.state(), self._means.sums):
            for name, value in tensors.items():
                if value.is_floating_point() and not torch.isfinite(value).all():
                    raise self._diverged(f"{name} holds NaN or Inf")

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what} at step {self.step}; checkpoints written so far are intact, lower the learning rates or "
            "raise the temperature"
        )

    def _prune(self) -> None:
        """First the checkpoints that are no longer kept, then the transitions that no kept one needs."""
        keep = self.run.keep_checkpoints
        prune_checkpoints(self.run_dir, keep)
        try:
            oldest = read_state(list_checkpoints(self.run_dir)[-keep:][0])
        except DamagedCheckpointError:
            return  # its transitions are kept: a later save deletes them
        if "training" in oldest:
            needed = oldest["training"]["added"] - self.replay.capacity
            for name in remove_segments(self.run_dir / REPLAY_DIR, before=needed):
                self._replay_records.pop(name, None)

    def checkpoint(self) -> Checkpoint:
        """The present policy as a checkpoint, not evaluated yet."""
        return Checkpoint(
            path=self.run_dir,
            spec=self._spec(),
            sampler=self.algorithm.agent.sampler,
            networks=self._networks(),
            state={"step": self.step, "updates": self.updates, "evaluation": None},
            probe_obs=self._probe_obs(),
            config=self.config(),
        )

    def _networks(self) -> dict[str, Params]:
        """The networks of the agent and, as one more, the normalisation of observations."""
        networks = self.algorithm.agent.networks()
        if self._statistics is not None:
            networks[NORMALIZER] = dict(vars(self._statistics.scale()))
        return networks

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
            env_args=self.run.env_arg,
            observation=observation,
            action=action,
            steps=self.algorithm.agent.sampler.steps,
            particles=self.algorithm.agent.sampler.particles,
            sampler=self.algorithm.agent.sampler.name,
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
                raise self._diverged(f"{name} became {value}")
        return values


def train(run: RunConfig, algorithm_config: AlgorithmConfig, run_dir: Path, *, resume: bool = False) -> Path:
    """Train and return the run directory.

    SIGINT, SIGTERM and SIGHUP, in the main thread, end the run after its present step and a checkpoint.

    Args:
        run: settings of the loop.
        algorithm_config: settings of the algorithm.
        run_dir: where everything is written.
        resume: go on from the newest sound checkpoint in the directory, or from the start where there is none;
            the settings are those of `rsm_train.run.run_directory.resume_settings`.

    Raises:
        ConfigError: the run directory holds another run already or another process writes there, the device
            or a compiler is not available, or the replay buffer does not fit into memory.
        UnsupportedEnvError: the environment is unknown or not Box-to-Box.
        CheckpointError: no checkpoint can be resumed from, or the checkpoints were deleted.
        TrainingError: the run cannot go on; its last checkpoint is intact.
        RunStopped: a signal ended it; its message has the command to resume.
        MissingExtraError: wandb is asked for and not installed.
    """
    if run.wandb is not None:
        require_extra("rsm-train --wandb", "wandb", ["wandb"])
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    with StopRequest() as stop, contextlib.ExitStack() as stack:
        stack.callback(mute_closed_streams)  # for what the caller says at the end
        continuing = resume and (run_dir / CONFIG_FILE).is_file()
        if continuing:
            stack.enter_context(lock(run_dir))
        else:
            require_new(run_dir)
        start = _start(run, algorithm_config, run_dir)
        if start is None:
            return run_dir
        trainer, checkpoint = start.trainer, start.checkpoint
        stack.callback(trainer.close)
        if not continuing:
            make(run_dir)
            stack.enter_context(lock(run_dir))
            require_new(run_dir)
        wall_s = 0.0 if checkpoint is None else float(checkpoint.state["training"]["wall_s"])
        # First, as wandb may refuse: the directory is then still empty, and can be used again.
        sinks = extra_sinks(run.wandb, run_dir, trainer.config())
        with _disk_errors(run_dir, "the run", _DISK):
            _set_aside(start)
            _prepare(trainer)
            with RunLog(
                run_dir,
                run.total_steps,
                sinks,
                first_step=trainer.step,
                wall_s=wall_s,
                warmup_steps=run.warmup_steps,
            ) as log:
                trainer.train(log, stop)
    return run_dir


@dataclass(frozen=True)
class _Start:
    """Where a run starts from."""

    trainer: Trainer
    checkpoint: Checkpoint | None
    """None at step 0."""
    damaged: Sequence[tuple[Path, str]] = ()
    """Newer checkpoints that cannot be resumed, newest first, and why."""


def _start(run: RunConfig, algorithm_config: AlgorithmConfig, run_dir: Path) -> _Start | None:
    """Make the trainer, at the newest checkpoint that is sound if there is one; None if the run is finished.

    Raises:
        CheckpointError: there are checkpoints and none can be resumed; or they were deleted.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(list_checkpoints(run_dir)):
        try:
            checkpoint = load_training(path)
            if checkpoint.state["step"] >= run.total_steps and not evaluation_due(checkpoint.state):
                _say(f"the run is finished at step {checkpoint.state['step']:,}; raise --total-steps to go on")
                return None
            return _Start(_restored(run, algorithm_config, run_dir, checkpoint), checkpoint, damaged)
        except CheckpointError as error:
            damaged.append((path, str(error)))
    if damaged:
        raise _none_sound(damaged)
    if (run_dir / CONFIG_FILE).is_file():
        require_no_lost_checkpoint(run_dir, run)
        _say(f"warning: the run in {str(run_dir)!r} has no checkpoint, so it begins again at step 0")
    return _Start(Trainer(run, algorithm_config, run_dir), None)


def _restored(
    run: RunConfig, algorithm_config: AlgorithmConfig, run_dir: Path, checkpoint: Checkpoint
) -> Trainer:
    trainer = Trainer(run, algorithm_config, run_dir, checkpoint)
    try:
        trainer.restore(checkpoint)
    except BaseException:
        trainer.close()
        raise
    return trainer


def _none_sound(damaged: Sequence[tuple[Path, str]]) -> CheckpointError:
    policy = next((path for path, _ in damaged if is_sound(path)), None)
    remedy = "restore the run directory from a copy" if policy is None else f"use the policy in {policy}"
    return CheckpointError(
        f"{damaged[0][1]}; no checkpoint of the run can be resumed, {remedy}, or begin a run in another "
        "directory with --out"
    )


def _set_aside(start: _Start) -> None:
    """Rename the damaged checkpoints that are newer than the one resumed from, with a warning for each."""
    for path, reason in start.damaged:
        assert start.checkpoint is not None
        kept = set_aside(path)
        _say(
            f"warning: {reason}; the run goes on from the older checkpoint {start.checkpoint.path}, and the "
            f"damaged one is kept as {kept}"
        )


def _prepare(trainer: Trainer) -> None:
    """Leave in the run directory what belongs to the present step, and nothing else."""
    run_dir = trainer.run_dir
    remove_leftovers(run_dir)
    remove_segments(run_dir / REPLAY_DIR, beyond=trainer.replay.added)
    trim_metrics(run_dir, trainer.step, without_evaluation=trainer.evaluation_due)
    content = json.dumps(trainer.config(), indent=2) + "\n"
    atomic.write_file(run_dir / CONFIG_FILE, content.encode())
    if trainer.step:
        _say(f"resuming at step {trainer.step:,}")
    if trainer.env_warning is not None:
        _say(trainer.env_warning)
    if trainer.envs.restarted:
        names = ", ".join(map(str, trainer.envs.restarted))
        _say(
            f"warning: the open episodes of environments {names} could not be restored and begin anew, so the "
            "run is not bit for bit the one without an interruption"
        )
    if trainer.changed:
        _say(
            f"warning: the run goes on with {trainer.changed}, so it is not bit for bit the one without an "
            "interruption"
        )


def evaluation_due(state: Mapping[str, Any]) -> bool:
    """True if the evaluation of a checkpoint, given by its state, was due and did not end."""
    return bool(state["training"].get("evaluation_due")) and state.get("evaluation") is None


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


def _changes(before: Any, now: Mapping[str, Any]) -> str:
    """ "threads 1 instead of 2, ..."; empty if nothing changed or the values before are unknown."""
    if not isinstance(before, Mapping):
        return ""
    differing = [name for name in now if name in before and before[name] != now[name]]
    return ", ".join(f"{name} {now[name]} instead of {before[name]}" for name in differing)


def _say(sentence: str) -> None:
    print(sentence, file=Tolerant(sys.stderr))


@contextlib.contextmanager
def _disk_errors(run_dir: Path, what: str, numbers: Collection[int] = ()) -> Iterator[None]:
    """Make one sentence of an error in writing; of only those numbers where others may have other causes."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if numbers and getattr(error, "errno", None) not in numbers:
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise TrainingError(
            f"cannot write {what} to {str(run_dir)!r}: {reason}; earlier checkpoints are intact, "
            f"{write_advice(getattr(error, 'errno', None), run_dir)}"
        ) from None


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


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
