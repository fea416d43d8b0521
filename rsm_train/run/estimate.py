"""What a run would cost in time, memory and disk, measured for a few seconds with the run's own parts."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rsm_common.commandline import aligned
from rsm_eval.envs import make_env, time_limit
from rsm_eval.rollout import DEFAULT_MAX_STEPS
from rsm_train.algorithms.common import AlgorithmConfig
from rsm_train.config import RunConfig
from rsm_train.model.graphs import WARM_UP_CALLS
from rsm_train.run.checkpoint import Checkpoint
from rsm_train.run.loop import Trainer
from rsm_train.run.metrics import duration

BUDGET_S = 3.0
"""Measuring goes on for about this long; an update that takes longer is still measured a few times."""

_WARM_UP = 2
"""Repetitions of everything that are not counted: allocation, compilation, caches. Even, see below."""
_RANDOM_STEPS = 20
_EVAL_STEPS = 10


@dataclass(frozen=True)
class Estimate:
    """What was measured, and what follows from the configuration."""

    device: str
    threads: int
    random_step_s: float
    """One step of every environment with random actions, as in the warm-up; transitions stored."""
    step_s: float
    """One step of every environment with the policy's actions; transitions stored."""
    update_s: float
    """One update, with drawing its batch and its noise."""
    eval_step_s: float
    """One control step of all evaluation episodes."""
    eval_limit: int
    """Steps of an episode that its environment does not end earlier."""
    replay_bytes: int
    network_bytes: int
    """Parameters, their averages and target networks."""
    learning_bytes: int
    """Optimiser state and gradients."""
    program_bytes: int | None
    """Most memory this process has had, the replay buffer hardly filled; None where that is not known."""
    checkpoint_bytes: int
    """Networks, the observations beside them and the training state, with little recorded of open episodes."""


def estimate(run: RunConfig, algorithm_config: AlgorithmConfig, run_dir: Path) -> Estimate:
    """Measure a run's parts; nothing is written.

    Raises:
        UnsupportedEnvError: the environment is unknown or not Box-to-Box.
        ConfigError: the device is not available.
    """
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    # One update per step, so that both are measured equally often; what each costs does not depend on it.
    warmup = min(run.warmup_steps, (_WARM_UP + _RANDOM_STEPS) * run.num_envs)
    short = dataclasses.replace(run, warmup_steps=warmup, updates_per_step=1 / run.num_envs)
    trainer = Trainer(short, algorithm_config, run_dir)
    try:
        random_step_s = _measure_random_steps(trainer)
        step_s, update_s = _measure_learning(trainer)
        eval_step_s = _measure_evaluation(trainer)
        agent = trainer.learner.algorithm.agent
        networks = [value for params in agent.networks().values() for value in params.values()]
        learnt = [value for value in networks if value.requires_grad]  # an update holds a gradient of each
        return Estimate(
            device=_device_name(trainer.device),
            threads=torch.get_num_threads(),
            random_step_s=random_step_s,
            step_s=step_s,
            update_s=update_s,
            eval_step_s=eval_step_s,
            eval_limit=_episode_limit(run),
            replay_bytes=trainer.learner.replay.nbytes,
            network_bytes=_nbytes(networks),
            learning_bytes=_nbytes([*agent.state().values(), *learnt]),
            program_bytes=_program_bytes(),
            checkpoint_bytes=_checkpoint_bytes(trainer.checkpoint(), trainer.learner.state()),
        )
    finally:
        trainer.close()


def format_estimate(run: RunConfig, cost: Estimate) -> str:
    """The estimate as text: time by part, memory, disk."""
    threads = f"{cost.threads} thread{'s' if cost.threads > 1 else ''}"
    rows = [["time", "each", "number", "total"]]
    total_s = 0.0
    for name, each_s, number in _parts(run, cost):
        total_s += each_s * number
        each = duration(each_s) if each_s >= 1 else f"{each_s * 1e3:.3g} ms"
        rows.append([name, each, f"{number:,}", duration(each_s * number)])
    rows.append(["all", "", "", duration(total_s)])
    memory = [["memory", "size"], ["replay buffer, full", size(cost.replay_bytes)]]
    memory.append(["networks", size(cost.network_bytes)])
    memory.append(["optimisers and gradients", size(cost.learning_bytes)])
    if cost.program_bytes is not None:
        memory.append(["process, as measured, and a full replay buffer", size(_process_bytes(run, cost))])
    disk = [["disk, at most", "size"]]
    disk.append(
        [f"checkpoints, {kept_checkpoints(run)} kept", size(kept_checkpoints(run) * cost.checkpoint_bytes)]
    )
    disk.append(["transitions to resume from", size(_replay_disk_bytes(run, cost))])
    disk.append(["all but metrics", size(disk_bytes(run, cost))])
    return "\n\n".join(
        [
            f"estimate, measured on {cost.device} with {threads}",
            aligned(rows),
            "Evaluations count as if no episode ended before its time limit.",
            aligned(memory),
            aligned(disk),
        ]
    )


def total_s(run: RunConfig, cost: Estimate) -> float:
    """Seconds of the whole run; at most, as evaluation episodes may end early."""
    return sum(each_s * number for _, each_s, number in _parts(run, cost))


def disk_bytes(run: RunConfig, cost: Estimate) -> int:
    """What the run directory grows to, without metrics.jsonl and TensorBoard's files."""
    return kept_checkpoints(run) * cost.checkpoint_bytes + _replay_disk_bytes(run, cost)


def kept_checkpoints(run: RunConfig) -> int:
    """Most checkpoints that are kept: the newest and, when older, the best."""
    before_last = (math.ceil(run.total_steps / run.num_envs) - 1) * run.num_envs
    both = math.lcm(run.eval_every, run.checkpoint_every)
    due = before_last // run.eval_every + before_last // run.checkpoint_every - before_last // both
    # A step saves once, however many multiples it passes.
    saves = min(due, before_last // run.num_envs) + 1
    return min(run.keep_checkpoints + 1, saves)


def size(count: int) -> str:
    """Bytes as KiB, MiB or GiB."""
    for exponent, unit in ((30, "GiB"), (20, "MiB")):
        if count >= 2**exponent:
            return f"{count / 2**exponent:,.1f} {unit}"
    return f"{count / 2**10:,.1f} KiB"


def _parts(run: RunConfig, cost: Estimate) -> list[tuple[str, float, int]]:
    """(name, seconds each, number) of everything that a run spends its time on."""
    envs = f"step of {run.num_envs} environment{'s' if run.num_envs > 1 else ''}"
    random_steps = math.ceil(run.warmup_steps / run.num_envs)
    steps = math.ceil(run.total_steps / run.num_envs)
    updates = int(max(0, steps * run.num_envs - run.warmup_steps) * run.updates_per_step)
    return [
        (f"{envs}, random", cost.random_step_s, random_steps),
        (f"{envs}, acting", cost.step_s, steps - random_steps),
        ("update", cost.update_s, updates),
        ("evaluation, at most", cost.eval_step_s * cost.eval_limit, _evaluations(run)),
    ]


def _evaluations(run: RunConfig) -> int:
    return math.ceil(run.total_steps / run.eval_every)


def _replay_disk_bytes(run: RunConfig, cost: Estimate) -> int:
    """Of the transitions that the kept checkpoints need: a full buffer at the oldest, and those since."""
    between = min(run.eval_every, run.checkpoint_every)
    steps = math.ceil(run.total_steps / run.num_envs) * run.num_envs
    # A file goes when nothing in it is needed: up to one interval more than is needed.
    rows = min(steps, run.replay_size + run.keep_checkpoints * between)
    return rows * cost.replay_bytes // run.replay_size


def _process_bytes(run: RunConfig, cost: Estimate) -> int:
    assert cost.program_bytes is not None
    return cost.program_bytes + (cost.replay_bytes if cost.device == "cpu" else 0)


def _measure_random_steps(trainer: Trainer) -> float:
    seconds, count = 0.0, 0
    rounds = trainer.run.warmup_steps // trainer.run.num_envs
    for index in range(rounds):
        spent = _timed(trainer.device, trainer.learner.collect)
        if index >= min(_WARM_UP, rounds - 1):
            seconds, count = seconds + spent, count + 1
    return seconds / count


def _measure_learning(trainer: Trainer) -> tuple[float, float]:
    # On a GPU an update is captured when it has run a few times, with the policy's part and without.
    captured = trainer.device.type == "cuda"
    for _ in range(2 * (WARM_UP_CALLS + 1) if captured else _WARM_UP):
        trainer.learner.collect()
        trainer.learner.learn()
    started, first = time.monotonic(), trainer.learner.updates
    collecting = learning = 0.0
    rounds = 0
    # An even number: updates of the policy come with every second one of the critics, unless told otherwise.
    while rounds < 2 or rounds % 2 or time.monotonic() - started < BUDGET_S:
        collecting += _timed(trainer.device, trainer.learner.collect)
        learning += _timed(trainer.device, trainer.learner.learn)
        rounds += 1
    return collecting / rounds, learning / max(1, trainer.learner.updates - first)


def _measure_evaluation(trainer: Trainer) -> float:
    trainer.evaluate(max_steps=1)  # creates the environments
    few = _timed(trainer.device, lambda: trainer.evaluate(max_steps=1))
    many = _timed(trainer.device, lambda: trainer.evaluate(max_steps=1 + _EVAL_STEPS))
    return max(0.0, many - few) / _EVAL_STEPS


def _timed(device: torch.device, function: Callable[[], object]) -> float:
    _synchronise(device)
    started = time.perf_counter()
    function()
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _episode_limit(run: RunConfig) -> int:
    env = make_env(run.env, run.env_arg)
    try:
        return time_limit(env) or DEFAULT_MAX_STEPS
    finally:
        env.close()


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _checkpoint_bytes(checkpoint: Checkpoint, training: Mapping[str, Tensor]) -> int:
    networks = [value for params in checkpoint.networks.values() for value in params.values()]
    return _nbytes([*networks, checkpoint.probe_obs, *training.values()])


def _program_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # in KiB elsewhere
