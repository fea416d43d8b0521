"""One evaluation: several policies, the same episodes, everything that a report or a JSON file says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsm_common.commandline import parse_seeds
from rsm_common.errors import ConfigError, UsageError
from rsm_common.provenance import installed_versions, machine_facts
from rsm_common.spec import PolicySpec
from rsm_eval.envs import EnvPool, control_dt_s, statistics_warning
from rsm_eval.latency import Latency, measure_latency
from rsm_eval.rollout import RolloutResult, episode_seeds, rollout
from rsm_eval.sources import OpenedPolicy
from rsm_eval.statistics import Summary, summarise
from rsm_serve.sessions.choice import Backend

SCHEMA_VERSION = 1
"""Version of the JSON layout."""

_KIND_NAMES = {"torch": "Torch policy", "bundle": "Bundle", "server": "Server"}


@dataclass(frozen=True)
class EvalConfig:
    """Settings of rsm-eval."""

    env: str | None = field(
        default=None,
        metadata={
            "group": "Environment",
            "help": "Environment id, or module:EnvId with an installed or local module.  [default: the "
            "policy's own]",
        },
    )
    env_arg: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "group": "Environment",
            "help": "Argument of the environment's constructor, such as size=3; can be repeated.  [default: "
            "the arguments of the training]",
        },
    )
    episodes: int = field(default=20, metadata={"group": "Episodes", "help": "Episodes per evaluation seed."})
    seeds: str = field(
        default="0",
        metadata={
            "group": "Episodes",
            "help": "Evaluation seeds, such as 0-4 or 0,3,7. Seed s stands for the fixed episode seeds "
            "expand_seed(s, episodes).",
        },
    )
    deterministic: bool = field(
        default=False,
        metadata={"group": "Policies", "help": "Request deterministic actions instead of sampled ones."},
    )
    latency_calls: int = field(
        default=500,
        metadata={
            "group": "Latency",
            "help": "Number of timed calls with one observation per policy; 0 skips the latency.",
        },
    )
    backend: Backend = field(
        default="auto",
        metadata={
            "group": "Policies",
            "help": "Inference runtime of bundles; auto takes the best that is installed.",
        },
    )
    run: Path | None = field(
        default=None,
        metadata={"group": "Report", "help": "Training run whose learning curve the report shows."},
    )
    report: Path | None = field(
        default=None, metadata={"group": "Report", "help": "Write a self-contained HTML report to this file."}
    )
    json: Path | None = field(
        default=None, metadata={"group": "Report", "help": "Write all measurements to this file."}
    )

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ConfigError(f"wanted --episodes of at least 1, got {self.episodes}")
        if self.latency_calls < 0:
            raise ConfigError(f"wanted --latency-calls of at least 0, got {self.latency_calls}")
        parse_seeds(self.seeds)
        for flag, path in (("--report", self.report), ("--json", self.json)):
            if path is not None and path.is_dir():
                raise ConfigError(f"wanted a file for {flag}, got the directory {str(path)!r}; add a file name")


@dataclass(frozen=True)
class PolicyEvaluation:
    """The measurements of one policy."""

    label: str
    """Short and unique within the evaluation."""
    source: str
    kind: str
    spec: PolicySpec
    rollouts: tuple[RolloutResult, ...] = field(repr=False)
    """One per evaluation seed."""
    summary: Summary
    latency: Latency | None = field(repr=False)
    runtime: str | None = None
    """The runtime of a bundle; None for other policies."""

    @property
    def returns(self) -> NDArray[np.float64]:
        """Returns of all episodes, evaluation seed by evaluation seed."""
        return np.concatenate([result.returns for result in self.rollouts])


@dataclass(frozen=True)
class Evaluation:
    """The policies of one call, and what is needed to repeat it."""

    env_id: str
    env_args: Mapping[str, Any]
    control_dt_s: float | None
    config: EvalConfig
    seeds: tuple[int, ...]
    policies: tuple[PolicyEvaluation, ...]
    command: str
    started_at: str
    """ISO 8601, UTC."""
    versions: dict[str, str]
    machine: dict[str, str | int]

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file: plain numbers, strings, lists and dictionaries."""
        return {
            "schema_version": SCHEMA_VERSION,
            "command": self.command,
            "started_at": self.started_at,
            "versions": self.versions,
            "machine": self.machine,
            "env_id": self.env_id,
            "env_args": dict(self.env_args),
            "control_dt_s": self.control_dt_s,
            "seeds": list(self.seeds),
            "episodes_per_seed": self.config.episodes,
            "deterministic": self.config.deterministic,
            "policies": [_policy_dict(policy, self.seeds) for policy in self.policies],
        }


def choose_env(env_id: str | None, specs: Sequence[PolicySpec]) -> str:
    """The environment to evaluate in: as given, or the one that all policies are made for.

    Raises:
        UsageError: none was given and the policies differ.
    """
    if env_id is not None:
        return env_id
    named = sorted({spec.env_id for spec in specs})
    if len(named) != 1 or not named[0]:
        raise UsageError(
            f"wanted policies of one environment, got {', '.join(named) or 'none'}; name one with --env"
        )
    return named[0]


def choose_env_args(env_id: str, given: Mapping[str, Any], specs: Sequence[PolicySpec]) -> dict[str, Any]:
    """The environment's arguments: those of the policies that are made for it, and those given over them.

    Raises:
        UsageError: the policies were trained with different arguments and none are given.
    """
    own = [dict(spec.env_args) for spec in specs if spec.env_id == env_id]
    if not given and any(other != own[0] for other in own):
        raise UsageError(
            f"wanted policies that were trained with the same arguments of {env_id}, got "
            f"{' and '.join(map(str, own))}; give the arguments with --env-arg"
        )
    return {**(own[0] if own else {}), **given}


def policy_labels(policies: Sequence[OpenedPolicy]) -> list[str]:
    """A short and unique name for each policy: its kind, with its own name where kinds repeat."""
    kinds = [opened.kind for opened in policies]
    labels = [
        _KIND_NAMES[opened.kind] + (f" {_own_name(opened)}" if kinds.count(opened.kind) > 1 else "")
        for opened in policies
    ]
    return [
        label if labels.count(label) == 1 else f"{label} #{labels[: index + 1].count(label)}"
        for index, label in enumerate(labels)
    ]


def _own_name(opened: OpenedPolicy) -> str:
    spec = opened.policy.spec
    return Path(opened.source).name if opened.kind == "torch" else f"{spec.name}:{spec.version}"


def evaluate(
    policies: Sequence[OpenedPolicy],
    config: EvalConfig,
    *,
    command: str,
    started_at: str,
    progress: Callable[[str], None] = lambda message: None,
) -> Evaluation:
    """Run every policy on the same episodes and time its control loop.

    The first episode of the first policy is recorded for the animation.

    Raises:
        UsageError: the policies have no environment in common.
        UnsupportedEnvError: the environment cannot be created or is not the policies'.
        EnvFaultError: the environment fails, or answers with what its spaces rule out.
        RequestError: a policy failed.
    """
    env_id = choose_env(config.env, [opened.policy.spec for opened in policies])
    seeds = parse_seeds(config.seeds)
    env_args = choose_env_args(env_id, config.env_arg, [opened.policy.spec for opened in policies])
    with EnvPool(env_id, env_args) as pool:
        warning = statistics_warning(env_id, pool.take(1)[0])
        if warning is not None:
            progress(warning)
        measured: list[PolicyEvaluation] = []
        for opened, label in zip(policies, policy_labels(policies), strict=True):
            progress(f"{label}: {len(seeds) * config.episodes} episodes of {env_id}")
            measured.append(_evaluate_one(opened, label, pool, seeds, config, record=not measured))
        dt_s = control_dt_s(pool.take(1)[0])
    return Evaluation(
        env_id=env_id,
        env_args=env_args,
        control_dt_s=dt_s,
        config=config,
        seeds=seeds,
        policies=tuple(measured),
        command=command,
        started_at=started_at,
        versions=installed_versions(),
        machine=machine_facts(),
    )


def _evaluate_one(
    opened: OpenedPolicy,
    label: str,
    pool: EnvPool,
    seeds: Sequence[int],
    config: EvalConfig,
    *,
    record: bool,
) -> PolicyEvaluation:
    results = tuple(
        rollout(
            opened.policy,
            pool,
            episode_seeds(seed, config.episodes),
            deterministic=config.deterministic,
            max_batch_rows=opened.max_batch_rows,
            record=0 if record and seed == seeds[0] else None,
        )
        for seed in seeds
    )
    latency = None
    if config.latency_calls:
        latency = measure_latency(
            opened.policy,
            pool,
            calls=config.latency_calls,
            seed=seeds[0],
            deterministic=config.deterministic,
        )
    return PolicyEvaluation(
        label=label,
        source=opened.source,
        kind=opened.kind,
        spec=opened.policy.spec,
        rollouts=results,
        summary=summarise([result.returns for result in results]),
        latency=latency,
        runtime=opened.runtime,
    )


def _policy_dict(policy: PolicyEvaluation, seeds: Sequence[int]) -> dict[str, Any]:
    steps = sum(result.steps for result in policy.rollouts)
    wall_s = sum(result.wall_s for result in policy.rollouts)
    return {
        "label": policy.label,
        "source": policy.source,
        "kind": policy.kind,
        "runtime": policy.runtime,
        "spec": dataclasses.asdict(policy.spec),
        "summary": dataclasses.asdict(policy.summary),
        "episodes": [
            episode
            for seed, result in zip(seeds, policy.rollouts, strict=True)
            for episode in _episode_dicts(seed, result)
        ],
        "rollout": {
            "steps": steps,
            "wall_s": wall_s,
            "policy_s": sum(result.policy_s for result in policy.rollouts),
            "steps_per_s": steps / wall_s,
        },
        "latency": _latency_dict(policy.latency),
    }


def _episode_dicts(seed: int, result: RolloutResult) -> list[dict[str, Any]]:
    columns = {
        "episode_seed": result.episode_seeds,
        "return": result.returns,
        "length": result.lengths,
        "terminated": result.terminated,
        "truncated": result.truncated,
    }
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [{"seed": seed, **dict(zip(columns, row, strict=True))} for row in rows]


def _latency_dict(latency: Latency | None) -> dict[str, Any] | None:
    if latency is None:
        return None
    samples = {stage: np.round(values, 4).tolist() for stage, values in latency.samples_ms.items()}
    return {"calls": latency.calls, "stages": latency.percentiles(), "samples_ms": samples}
