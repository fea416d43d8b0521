"""The configuration of a run: dataclasses, presets, and how they combine."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rsm_common.errors import ConfigError
from rsm_common.imports import import_attribute
from rsm_eval.env_ids import factory_name
from rsm_train.algorithms.common import Algorithm, AlgorithmConfig
from rsm_train.algorithms.registry import ALGORITHMS
from rsm_train.model.kernels import CompileMode, Precision
from rsm_train.setting_types import Named, SettingsFile, checked, named_in, nearest, option_name

VectorName = Literal["sync", "async", "envpool"]


@dataclass(frozen=True)
class RunConfig:
    """Settings of the training loop; what an algorithm needs beyond them is in its own configuration."""

    env: str = field(
        metadata={
            "group": "Environment",
            "help": "Gymnasium environment id, or module:EnvId (a module installed or here).",
        }
    )
    env_arg: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "group": "Environment",
            "help": "Argument of the environment's constructor, such as size=3 or model=walker.xml; repeat for "
            "more. The value is read as a JSON number, boolean or null, else as text.",
        },
    )
    algo: str = field(
        default="dpmd",
        metadata={
            "group": "Algorithm",
            "help": f"Learning algorithm: {', '.join(ALGORITHMS)}, or module:Class of your own.",
        },
    )
    preset: str = field(
        default="paper", metadata={"group": "Algorithm", "help": "Named set of defaults; see --list-presets."}
    )
    seed: int = field(default=0, metadata={"group": "Run", "help": "Seed of everything random in the run."})
    device: str = field(
        default="auto", metadata={"group": "Machine", "help": "One of auto, cpu, cuda and cuda:N."}
    )
    out: str | None = field(
        default=None, metadata={"group": "Run", "help": "Run directory; default: runs/ENV-ALGO-PRESET-sSEED."}
    )
    total_steps: int = field(
        default=1_000_000, metadata={"group": "Run", "help": "Total number of steps of all environments."}
    )
    warmup_steps: int = field(
        default=30_000, metadata={"group": "Run", "help": "Steps with random actions at the start."}
    )
    num_envs: int = field(
        default=5,
        metadata={"group": "Environment", "help": "Number of environments that are stepped together."},
    )
    vector: VectorName = field(
        default="sync",
        metadata={
            "group": "Environment",
            "help": "Stepping of the environments: sync (one after the other), async (processes) or envpool "
            "(C++ threads).",
        },
    )
    updates_per_step: float = field(
        default=0.2, metadata={"group": "Replay and updates", "help": "Updates per environment step."}
    )
    batch_size: int = field(
        default=256, metadata={"group": "Replay and updates", "help": "Transitions per update."}
    )
    replay_size: int = field(
        default=1_000_000, metadata={"group": "Replay and updates", "help": "Transitions kept for replay."}
    )
    eval_every: int = field(
        default=25_000, metadata={"group": "Evaluation", "help": "Steps between evaluations."}
    )
    eval_episodes: int = field(default=20, metadata={"group": "Evaluation", "help": "Episodes per evaluation."})
    checkpoint_every: int = field(
        default=5_000,
        metadata={
            "group": "Checkpoints",
            "help": "Steps between checkpoints. Each evaluation also writes one.",
        },
    )
    eval_one_particle: bool = field(
        default=True,
        metadata={
            "group": "Evaluation",
            "help": "Evaluate with N=1 too, in as many episodes, to measure the effect of the critics' choice.",
        },
    )
    keep_checkpoints: int = field(
        default=3,
        metadata={
            "group": "Checkpoints",
            "help": "Number of newest checkpoints that are kept. The best one is always kept too.",
        },
    )
    log_every: int = field(
        default=1_000, metadata={"group": "Run", "help": "Steps between lines in metrics.jsonl."}
    )
    normalize_observation: bool = field(
        default=False,
        metadata={
            "group": "Environment",
            "help": "Normalise observations by the running mean and variance of the stored observations, "
            "clipped to 10 standard deviations. The statistics belong to the policy and to its exported graph.",
        },
    )
    normalize_reward: bool = field(
        default=False,
        metadata={
            "group": "Environment",
            "help": "Divide rewards by the running standard deviation of the discounted return, or by a fifth "
            "of its largest magnitude if that is larger. The exported q is in the environment's rewards.",
        },
    )
    noise_hold: int = field(
        default=1,
        metadata={
            "group": "Environment",
            "help": "Largest number of steps that exploration noise is held; a span has n steps with "
            "probability proportional to 1 / n^2. 1 draws new noise in each step.",
        },
    )
    precision: Precision = field(
        default="fp32",
        metadata={
            "group": "Machine",
            "help": "Precision of matrix products in sampling. tf32 needs CUDA and also applies to the "
            "updates.",
        },
    )
    compile: CompileMode = field(
        default="auto",
        metadata={
            "group": "Machine",
            "help": "Compile sampling and updates; auto compiles if a compiler is installed. This takes up to "
            "a minute; later runs with the same settings find the result on disk.",
        },
    )
    threads: int | None = field(
        default=None,
        metadata={"group": "Machine", "help": "CPU threads of torch; default: the number that torch chooses."},
    )
    wandb: str | None = field(
        default=None,
        metadata={"group": "Run", "help": "Project of Weights & Biases that also gets the metrics."},
    )

    def __post_init__(self) -> None:
        for name in ("total_steps", "num_envs", "batch_size", "replay_size", "eval_every", "eval_episodes"):
            _require(getattr(self, name) >= 1, f"wanted {name} >= 1, got {getattr(self, name)}")
        for name in ("checkpoint_every", "keep_checkpoints", "log_every", "noise_hold"):
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


@dataclass(frozen=True)
class Preset:
    """A named set of defaults. The settings of an algorithm's own stand beside it, in `Algorithm.presets`."""

    description: str
    """One line for --list-presets."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the run, and those that the algorithms of the toolkit share."""


PRESETS: dict[str, Preset] = {
    "paper": Preset("The mathematics of the paper; the defaults of every setting."),
    "reference": Preset("The published program, with its deviations from the paper, to reproduce its curves."),
    "kl": Preset(
        "Mirror descent with many actions per state and the temperature tuned to a KL of 2 nats.",
        {"updates_per_step": 1.0},
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
            # In so few updates it takes longer than it saves.
            "compile": "off",
            "width": 64,
            "depth": 2,
            "policy_lr": 1e-3,
            "critic_lr": 1e-3,
            "tau": 0.05,
            "reward_scale": 0.1,
        },
    ),
}


def find_algorithm(name: str) -> type[Algorithm]:
    """The class of an algorithm: of `ALGORITHMS`, or of "module:Class", found in the working directory too.

    Raises:
        ConfigError: no such algorithm, or a module that cannot be imported.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"wanted an algorithm of {', '.join(ALGORITHMS)}, or module:Class of your own, got {name!r}"
        )
    found = import_attribute(module, attribute, f"--algo {name}")
    if not all(hasattr(found, part) for part in ("Config", "presets", "update")):
        raise ConfigError(
            f"wanted --algo {name} to name a class with Config, presets and update, got {found!r:.80}; "
            "python -m pydoc rsm_train.algorithms.common.Algorithm says what they are"
        )
    algorithm: type[Algorithm] = found
    return algorithm


def presets_of(algo: str) -> list[str]:
    """The presets that an algorithm has."""
    return list(find_algorithm(algo).presets)


def preset_settings(preset: str, algo: str) -> dict[str, Any]:
    """The settings of a preset for an algorithm that has it: of the run, shared, and the algorithm's own."""
    shared = PRESETS[preset].settings if preset in PRESETS else {}
    algorithm = find_algorithm(algo)
    known = {item.name for config in (RunConfig, algorithm.Config) for item in dataclasses.fields(config)}
    return {name: value for name, value in shared.items() if name in known} | dict(algorithm.presets[preset])


def resolve(
    given: Mapping[str, Any], *, file: SettingsFile | None = None, named: Named = option_name
) -> tuple[RunConfig, AlgorithmConfig]:
    """Combine the dataclasses' defaults, the preset, a file and what was given, later ones winning.

    Args:
        given: field names to values; None means not given.
        file: the settings of a file.
        named: how errors name a given setting.

    Raises:
        ConfigError: an unknown preset, a setting the algorithm does not have, a value of another type or out of
            range, or a setting that has no effect.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    run, algorithm = _combine(chosen, file, named)
    _refuse_ineffective(chosen, algorithm, named)
    if file is not None:
        _refuse_ineffective_in_file(chosen, file, named)
    return run, algorithm


def _combine(
    chosen: Mapping[str, Any], file: SettingsFile | None, named: Named
) -> tuple[RunConfig, AlgorithmConfig]:
    beneath = {} if file is None else file.settings
    named = named_in(file, chosen, named)
    own = checked({**beneath, **chosen}, RunConfig, named)
    preset, algo = own.get("preset", "paper"), own.get("algo", "dpmd")
    algorithm_type = find_algorithm(algo)
    own = checked(own, algorithm_type.Config, named)
    if preset not in algorithm_type.presets:
        having = [name for name in ALGORITHMS if preset in ALGORITHMS[name].presets]
        raise ConfigError(
            f"wanted an algorithm of {', '.join(having)} with preset {preset}, got {algo}"
            if having
            else f"wanted a preset of {', '.join(algorithm_type.presets)}, got {preset!r}"
        )
    settings = preset_settings(preset, algo) | own
    run_names = {item.name for item in dataclasses.fields(RunConfig)}
    algorithm_names = {item.name for item in dataclasses.fields(algorithm_type.Config)}
    unknown = sorted(set(settings) - run_names - algorithm_names)
    if unknown:
        meant = nearest(unknown[0], run_names | algorithm_names) if len(unknown) == 1 else None
        raise ConfigError(
            f"wanted settings that algorithm {algo} has, got {', '.join(map(named, unknown))}; "
            + ("leave them out" if meant is None else f"did you mean {meant}?")
        )
    if "env" not in settings:
        raise ConfigError(
            f"wanted an environment, got none; give one with {named('env')}, for example HalfCheetah-v5"
        )
    run = RunConfig(**{name: value for name, value in settings.items() if name in run_names})
    try:
        algorithm = algorithm_type.Config(
            **{name: value for name, value in settings.items() if name in algorithm_names}
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return run, algorithm


def run_directory(run: RunConfig) -> Path:
    """Where a run writes: as given, or named after what it is."""
    if run.out:
        return Path(run.out)
    made_by = factory_name(run.env)
    env = run.env if made_by is None else _as_file_name(made_by.partition(":")[2])
    return Path(f"runs/{env}-{run.algo}-{run.preset}-s{run.seed}".replace(":", "_"))


def _as_file_name(text: str) -> str:
    """ "make_env(size=3)" -> "make_env_size_3"."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_")


def _refuse_ineffective(given: Mapping[str, Any], algorithm: AlgorithmConfig, named: Named) -> None:
    """Refuse a given setting that has no effect beside the other settings."""
    for setting, needed in algorithm.ineffective().items():
        name, equals, value = setting.partition("=")
        if name in given and (not equals or str(given[name]) == value):
            said = named(name)
            raise ConfigError(f"wanted {needed} with {said}, which has no effect otherwise; leave {said} out")


def _refuse_ineffective_in_file(chosen: Mapping[str, Any], file: SettingsFile, named: Named) -> None:
    """The same of a file by itself.

    A setting of the file that has no effect only since another one was replaced beside the file is no mistake.
    """
    alone = {name: chosen[name] for name in ("env", "algo", "preset") if name in chosen}
    try:
        _, algorithm = _combine(alone, file, named)
    except ConfigError:
        return  # not by itself, but together they are in order
    left = {name: value for name, value in file.settings.items() if name not in chosen}
    _refuse_ineffective(left, algorithm, named_in(file, chosen, named))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
