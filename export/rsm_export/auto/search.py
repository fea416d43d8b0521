"""The cheapest chain that still returns what the full policy returns: `rsm-export --auto`.

1. Every candidate is exported in memory and left out if it fails a check; its latency is measured, and it acts
   in a few episodes.
2. From the fastest up, candidates whose return was not clearly worse act in all episodes, new ones, beside the
   full policy. The first whose loss is within the tolerance, with 95 % confidence, is chosen.

The episodes of 2 are not those of 1, so that the return which is reported is not the one that was selected by.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsm_common.commandline import aligned
from rsm_common.errors import BundleError, ConfigError
from rsm_common.provenance import machine_facts, provenance
from rsm_common.seeds import draw_noise, expand_seed
from rsm_eval.envs import EnvPool
from rsm_export.auto.closed_loop import CONFIRMING_SEED, SCREENING_SEED, Arena, Loss
from rsm_export.build import Opened
from rsm_export.config import ExportConfig, SamplerName, SearchConfig
from rsm_export.graph.cost import GraphCost
from rsm_train.model.samplers.diffusion import DiffusionSampler

_LATENCY_ROUNDS, _LATENCY_CALLS = 12, 20


@dataclass(frozen=True)
class Measured:
    """A candidate after screening, and after confirmation if it came to that."""

    config: ExportConfig
    latency_ms: float
    """Median of one row in this process."""
    cost: GraphCost
    screened: Loss
    confirmed: Loss | None = None


@dataclass(frozen=True)
class SearchResult:
    """All candidates, fastest first, and which of them was chosen."""

    env_id: str
    episodes: int
    tolerance: float
    candidates: tuple[Measured, ...]
    chosen_index: int

    @property
    def chosen(self) -> Measured:
        """The fastest that was confirmed."""
        return self.candidates[self.chosen_index]

    def to_dict(self) -> dict[str, Any]:
        """The content of a JSON file: every candidate, and what is needed to judge the figures."""
        return {"machine": machine_facts(), "versions": provenance(), **dataclasses.asdict(self)}


def candidates(trained: DiffusionSampler, base: ExportConfig) -> list[ExportConfig]:
    """What is searched: steps, samplers and particles, except what `base` fixes.

    Steps and particles are the trained number halved again and again. With one step both samplers are one.
    """
    steps = [base.steps] if base.steps else _halvings(trained.steps)
    particles = [base.particles] if base.particles else _halvings(trained.particles)
    samplers: list[SamplerName] = [base.sampler] if base.sampler else ["ddpm", "ddim"]
    return [
        dataclasses.replace(base, steps=s, particles=n, sampler=name)
        for s, n, name in itertools.product(steps, particles, samplers)
        if s > 1 or name == samplers[0]
    ]


def as_trained(trained: DiffusionSampler, base: ExportConfig | None = None) -> ExportConfig:
    """The full policy, in float32; checked and run as `base` says, where that is of float32 too."""
    base = base or ExportConfig()
    backend = base.backend if base.precision == "fp32" else None
    return ExportConfig(trained.steps, "ddpm", None, trained.particles, backend=backend, verify=base.verify)


def _halvings(count: int) -> list[int]:
    found = [count]
    while found[-1] > 1:
        found.append(found[-1] // 2)
    return found


def search(
    trained: DiffusionSampler,
    base: ExportConfig,
    config: SearchConfig,
    env_id: str,
    open_candidate: Callable[[ExportConfig], Opened],
    progress: Callable[[str], None] = lambda message: None,
    *,
    env_args: Mapping[str, Any] | None = None,
) -> SearchResult:
    """Find the fastest chain whose return stays within the tolerance; see the module.

    Args:
        trained: the sampler of the checkpoint.
        base: what all candidates share; the steps, particles or sampler that it names are not searched.
        config: tolerance and episodes.
        env_id: environment to act in.
        open_candidate: exports a candidate in memory: policy, its session and the cost of its graph. One that
            it refuses with a BundleError is left out.
        progress: told what is being done.
        env_args: arguments of the environment's constructor.

    Raises:
        UnsupportedEnvError: the environment cannot be created or is not the policy's.
        EnvFaultError: the environment fails, or answers with what its spaces rule out.
        BackendError: a candidate gave an action that is not finite or out of bounds.
        BundleError: the full policy, or every other candidate, is refused.
        ConfigError: none of what `base` leaves open is within the tolerance.
    """
    asked, full = candidates(trained, base), as_trained(trained, base)
    opened: dict[ExportConfig, Opened] = {}
    with EnvPool(env_id, env_args) as pool:  # first, so that an unknown one is told at once
        try:
            configs = asked if full in asked else [*asked, full]
            _open_all(configs, full, open_candidate, opened, progress)
            policies = {name: item.policy for name, item in opened.items()}
            arena = Arena(policies, full, pool, config.tolerance)
            measured = _screen(arena, opened, max(2, config.episodes // 4), progress)
            chosen = _confirm(arena, measured, asked, config, progress)
        finally:
            for item in opened.values():
                item.session.close()
    return SearchResult(env_id, config.episodes, config.tolerance, tuple(measured), chosen)


def _screen(
    arena: Arena[ExportConfig],
    opened: dict[ExportConfig, Opened],
    episodes: int,
    progress: Callable[[str], None],
) -> list[Measured]:
    """Latency and return of every candidate, fastest first."""
    latency_ms = _measure_latency(opened)
    measured = []
    for number, candidate in enumerate(sorted(opened, key=latency_ms.__getitem__), start=1):
        progress(f"screening {number} of {len(opened)}: {describe(candidate)}")
        loss = arena.loss(candidate, SCREENING_SEED, episodes)
        measured.append(Measured(candidate, latency_ms[candidate], opened[candidate].cost, loss))
    return measured


def _confirm(
    arena: Arena[ExportConfig],
    measured: list[Measured],
    asked: list[ExportConfig],
    config: SearchConfig,
    progress: Callable[[str], None],
) -> int:
    """The index of the fastest of `asked` that is within the tolerance in new episodes; fills in `confirmed`.

    Where nothing is fixed this ends with the full policy, which loses nothing against itself.
    """
    for index, found in enumerate(measured):
        if found.screened.hopeless or found.config not in asked:
            continue
        progress(f"confirming {describe(found.config)} on {config.episodes} new episodes")
        loss = arena.loss(found.config, CONFIRMING_SEED, config.episodes)
        measured[index] = dataclasses.replace(found, confirmed=loss)
        if loss.within:
            return index
    raise ConfigError(
        f"wanted a chain within {config.tolerance:g} of the full policy's return of "
        f"{measured[0].screened.full_mean:,.1f}, got none with the options that are given; allow a larger "
        "--tolerance, or leave out some of --steps, --sampler, --particles, --prior-std and --precision"
    )


def _open_all(
    configs: list[ExportConfig],
    full: ExportConfig,
    open_candidate: Callable[[ExportConfig], Opened],
    opened: dict[ExportConfig, Opened],
    progress: Callable[[str], None],
) -> None:
    """Add to `opened` what can be exported: few steps can round too much for a low precision."""
    progress(f"building {len(configs)} candidates")
    refusal = None
    for config in configs:
        try:
            opened[config] = open_candidate(config)
        except BundleError as error:
            if config == full:
                raise
            refusal = error
            progress(f"left out {describe(config)}: {error}")
    if refusal is not None and set(opened) <= {full}:
        raise refusal


def _measure_latency(opened: dict[ExportConfig, Opened]) -> dict[ExportConfig, float]:
    """Median milliseconds of one row; the candidates take turns, so that all see the same machine."""
    times: dict[ExportConfig, list[float]] = {config: [] for config in opened}
    for _ in range(_LATENCY_ROUNDS):
        for config, item in opened.items():
            spec = item.policy.spec
            obs = np.zeros((1, spec.observation.size), dtype=np.float32)
            noise = draw_noise(expand_seed(0, 1), spec.noise_shape)
            for _ in range(_LATENCY_CALLS):
                started = time.perf_counter()
                item.session.run(obs, noise)
                times[config].append(1e3 * (time.perf_counter() - started))
    return {config: float(np.median(values)) for config, values in times.items()}


def describe(config: ExportConfig) -> str:
    """A candidate in a few words."""
    particles = "1 particle" if config.particles == 1 else f"{config.particles} particles"
    steps = "1 step" if config.steps == 1 else f"{config.steps} steps"
    return ", ".join(
        [str(config.sampler), steps, particles, *([config.precision] * (config.precision != "fp32"))]
    )


def table(result: SearchResult) -> str:
    """Latency against return, fastest first; the chosen one is marked with an arrow."""
    heading = [
        "",
        "sampler",
        "steps",
        "particles",
        "MFLOP",
        "ms",
        "return",
        "loss (95 %)",
        "confirmed loss (95 %)",
    ]
    rows = [heading]
    for index, found in enumerate(result.candidates):
        c = found.config
        rows.append(
            [
                "->" if index == result.chosen_index else "",
                *(str(c.sampler), str(c.steps), str(c.particles)),
                *(f"{found.cost.flops / 1e6:.3g}", f"{found.latency_ms:.3g}", f"{found.screened.mean:,.1f}"),
                found.screened.interval,
                found.confirmed.interval if found.confirmed else "-",
            ]
        )
    return aligned(rows, left=2)
