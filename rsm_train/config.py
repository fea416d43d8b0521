"""The configuration of a run: dataclasses, presets, and how they combine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from rsm_common.errors import ConfigError
from rsm_train.algorithms.common import Algorithm
from rsm_train.algorithms.dpmd import DPMD, DPMDConfig
from rsm_train.algorithms.sac import SAC, SACConfig
from rsm_train.algorithms.sdac import SDAC, SDACConfig
from rsm_train.model.kernels import DEFAULT_COMPUTE, CompileMode, Compute, Precision

VectorName = Literal["sync", "async", "envpool"]
AlgorithmName = Literal["dpmd", "sdac", "sac"]
AlgorithmConfig = DPMDConfig | SDACConfig | SACConfig

ALGORITHM_CONFIGS: dict[str, type[AlgorithmConfig]] = {
    "dpmd": DPMDConfig,
    "sdac": SDACConfig,
    "sac": SACConfig,
}


@dataclass(frozen=True)
class RunConfig:
    """Settings of the training loop; what an algorithm needs beyond them is in its own configuration."""

    env: str = field(metadata={"help": "Gymnasium environment id, or module:EnvId."})
    algo: AlgorithmName = field(default="dpmd", metadata={"help": "Learning algorithm."})
    preset: str = field(default="paper", metadata={"help": "Named set of defaults; see --list-presets."})
    seed: int = field(default=0, metadata={"help": "Seed of everything random in the run."})
    device: str = field(default="auto", metadata={"help": "One of auto, cpu, cuda and cuda:N."})
    out: str | None = field(
        default=None, metadata={"help": "Run directory; default runs/ENV-ALGO-PRESET-sSEED."}
    )
    total_steps: int = field(default=1_000_000, metadata={"help": "Environment steps, of all environments."})
    warmup_steps: int = field(default=30_000, metadata={"help": "Steps with random actions at the start."})
    num_envs: int = field(default=5, metadata={"help": "Environments stepped together."})
    vector: VectorName = field(
        default="sync",
        metadata={"help": "How environments are stepped: sync, async (processes), or envpool (C++ threads)."},
    )
    updates_per_step: float = field(default=0.2, metadata={"help": "Updates per environment step."})
    batch_size: int = field(default=256, metadata={"help": "Transitions per update."})
    replay_size: int = field(default=1_000_000, metadata={"help": "Transitions kept for replay."})
    eval_every: int = field(default=25_000, metadata={"help": "Steps between evaluations."})
    eval_episodes: int = field(default=20, metadata={"help": "Episodes per evaluation."})
    checkpoint_every: int = field(
        default=5_000, metadata={"help": "Steps between checkpoints; every evaluation makes one as well."}
    )
    eval_one_particle: bool = field(
        default=True, metadata={"help": "Evaluate N=1 too: as many episodes without the critics' choice."}
    )
    keep_checkpoints: int = field(
        default=3, metadata={"help": "Newest checkpoints kept; the best is always kept as well."}
    )
    log_every: int = field(default=1_000, metadata={"help": "Steps between lines in metrics.jsonl."})
    precision: Precision = field(
        default="fp32",
        metadata={"help": "Of the products while sampling: fp32, tf32 (on CUDA, everywhere) or bf16."},
    )
    compile: CompileMode = field(
        default="auto",
        metadata={
            "help": "Compile the sampling; auto: where there is a compiler. It takes up to a minute, once."
        },
    )
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads of torch; default as torch decides."}
    )
    wandb: str | None = field(
        default=None, metadata={"help": "Project of Weights & Biases that gets the metrics too."}
    )

    def __post_init__(self) -> None:
        for name in ("total_steps", "num_envs", "batch_size", "replay_size", "eval_every", "eval_episodes"):
            _require(getattr(self, name) >= 1, f"wanted {name} >= 1, got {getattr(self, name)}")
        for name in ("checkpoint_every", "keep_checkpoints", "log_every"):
            _require(getattr(self, name) >= 1, f"wanted {name} >= 1, got {getattr(self, name)}")
        _require(self.threads is None or self.threads >= 1, f"wanted threads >= 1, got {self.threads}")
        _require(
            0 < self.updates_per_step < math.inf,
            f"wanted a finite updates_per_step > 0, got {self.updates_per_step}",
        )
        _require(0 <= self.seed < 2**63, f"wanted a seed from 0 to 2**63 - 1, got {self.seed}")
        _require(
            self.num_envs <= self.warmup_steps <= self.total_steps,
            f"wanted num_envs <= warmup_steps <= total_steps, got {self.num_envs}, {self.warmup_steps} and "
            f"{self.total_steps}; the first update needs at least one stored transition",
        )
        _require(
            self.replay_size >= self.num_envs,
            f"wanted replay_size >= num_envs, got {self.replay_size} and {self.num_envs}",
        )


_QUICK_DIFFUSION: dict[str, Any] = {
    "diffusion_steps": 5,
    "particles": 8,
    "target_particles": 1,
    "prior_std": 0.5,
    "temperature_schedule": "constant",
    "temperature": 0.5,
    "exploration_noise": 1.0,
}


@dataclass(frozen=True)
class Preset:
    """A named set of defaults."""

    description: str
    """One line for --list-presets."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """For every algorithm that has them."""
    per_algorithm: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By the algorithm's name; wins over `settings`."""
    algorithms: tuple[str, ...] = tuple(ALGORITHM_CONFIGS)
    """Those that have it."""

    def of(self, algo: str) -> dict[str, Any]:
        """The settings for one algorithm."""
        return {**self.settings, **self.per_algorithm.get(algo, {})}


PRESETS: dict[str, Preset] = {
    "paper": Preset("The mathematics of the paper; the defaults of every setting."),
    "reference": Preset(
        "The published program, with its deviations from the paper, to reproduce its curves.",
        {"prior_std": 0.5},
        per_algorithm={
            "dpmd": {
                "policy_lr_final": 3e-5,
                "noisy_backup": True,
                "critic_repeats": 2,
                "policy_actions": "backup",
                "policy_samples": 1,
                "weighting": "exp",
                "q_scaling": "running_slip",
            },
            "sdac": {
                "policy_lr_final": 3e-5,
                "noisy_backup": True,
                "reverse_draws": "clipped",
                "proposal_particles": 32,
            },
        },
        algorithms=("dpmd", "sdac"),
    ),
    "kl": Preset(
        "Mirror descent with many actions per state and the temperature tuned to a KL of 2 nats.",
        {"updates_per_step": 1.0},
        per_algorithm={
            "dpmd": {
                "policy_samples": 64,
                "old_policy_every": 1_000,
                "proposal_noise": 0.2,
                "critic_selection": "mean",
                "target_particles": 1,
                "temperature_schedule": "kl",
                "temperature": 1.0,
                "target_kl": 2.0,
                "exploration_units": "absolute",
            },
        },
        algorithms=("dpmd",),
    ),
    # InvertedPendulum-v5 in about two minutes.
    "quick": Preset(
        "Small networks and short chains, for small tasks on a CPU.",
        {
            "total_steps": 12_000,
            "warmup_steps": 300,
            "num_envs": 4,
            "updates_per_step": 0.5,
            "batch_size": 128,
            "replay_size": 100_000,
            "eval_every": 1_000,
            "eval_episodes": 5,
            "checkpoint_every": 1_000,
            "log_every": 250,
            # More threads gain nothing at this size, and lose much where another process shares the cores.
            "threads": 1,
            # At this size it takes longer than it saves.
            "compile": "off",
            "width": 64,
            "depth": 2,
            "policy_lr": 1e-3,
            "critic_lr": 1e-3,
            "tau": 0.05,
            "reward_scale": 0.1,
        },
        per_algorithm={
            "dpmd": {**_QUICK_DIFFUSION, "policy_samples": 8, "q_scaling": "state", "proposal_noise": 0.2},
            "sdac": _QUICK_DIFFUSION,
        },
    ),
}


def resolve(given: Mapping[str, Any]) -> tuple[RunConfig, AlgorithmConfig]:
    """Combine the dataclasses' defaults, the preset and what was given, later ones winning.

    Args:
        given: field names to values; None means not given.

    Raises:
        ConfigError: an unknown preset, a setting the algorithm does not have, or values out of range.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    preset = chosen.get("preset", "paper")
    if preset not in PRESETS:
        raise ConfigError(f"wanted a preset of {', '.join(PRESETS)}, got {preset!r}")
    algo = chosen.get("algo", "dpmd")
    if algo not in ALGORITHM_CONFIGS:
        raise ConfigError(f"wanted an algorithm of {', '.join(ALGORITHM_CONFIGS)}, got {algo!r}")
    defaults = PRESETS[preset]
    if algo not in defaults.algorithms:
        raise ConfigError(
            f"wanted an algorithm of {', '.join(defaults.algorithms)} with preset {preset}, got {algo}"
        )
    settings = defaults.of(algo) | chosen
    algorithm_type = ALGORITHM_CONFIGS[algo]
    run_names = {item.name for item in dataclasses.fields(RunConfig)}
    algorithm_names = {item.name for item in dataclasses.fields(algorithm_type)}
    unknown = set(settings) - run_names - algorithm_names
    if unknown:
        raise ConfigError(
            f"no setting named {', '.join(sorted(unknown))} for this algorithm; see rsm-train --help"
        )
    if "env" not in settings:
        raise ConfigError("wanted an environment, got none; give one with --env, for example HalfCheetah-v5")
    run = RunConfig(**{name: value for name, value in settings.items() if name in run_names})
    try:
        algorithm = algorithm_type(
            **{name: value for name, value in settings.items() if name in algorithm_names}
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _refuse_ineffective(chosen, algorithm)
    return run, algorithm


def run_directory(run: RunConfig) -> Path:
    """Where a run writes: as given, or named after what it is."""
    return Path(run.out or f"runs/{run.env}-{run.algo}-{run.preset}-s{run.seed}".replace(":", "_"))


def make_algorithm(
    config: AlgorithmConfig,
    obs_size: int,
    action_size: int,
    *,
    generator: torch.Generator,
    device: torch.device | str,
    compute: Compute = DEFAULT_COMPUTE,
) -> Algorithm:
    """The algorithm of a configuration, with freshly initialised networks."""
    if isinstance(config, DPMDConfig):
        return DPMD(config, obs_size, action_size, generator=generator, device=device, compute=compute)
    if isinstance(config, SDACConfig):
        return SDAC(config, obs_size, action_size, generator=generator, device=device, compute=compute)
    return SAC(config, obs_size, action_size, generator=generator, device=device, compute=compute)


def _refuse_ineffective(given: Mapping[str, Any], algorithm: AlgorithmConfig) -> None:
    """Refuse what was asked for and would change nothing."""
    if isinstance(algorithm, SACConfig):
        asked = {name for name, value in (("precision", "bf16"), ("compile", "on")) if given.get(name) == value}
        _refuse(asked, ("precision", "compile"), "an algorithm that samples particles, dpmd or sdac")
        return
    if algorithm.temperature_schedule != "kl":
        _refuse(given, ("target_kl",), "temperature_schedule kl")
    if algorithm.temperature_schedule != "entropy":
        _refuse(given, ("target_entropy",), "temperature_schedule entropy")
    if algorithm.policy_lr_final is None:
        _refuse(given, ("policy_lr_decay_start", "policy_lr_decay_updates"), "policy_lr_final")
    if isinstance(algorithm, DPMDConfig) and algorithm.policy_actions == "backup":
        _refuse(given, ("old_policy_every", "proposal_noise"), "policy_actions policy")


def _refuse(given: Collection[str], names: tuple[str, ...], needed: str) -> None:
    for name in names:
        if name in given:
            raise ConfigError(f"wanted {needed} with {name}, which changes nothing without; leave it out")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
