"""One export: checkpoint -> (search ->) build -> checks -> bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rsm_common.errors import BundleError
from rsm_common.spec import PolicySpec
from rsm_export.build import Built, build, diffusion_sampler, observations_of
from rsm_export.bundles.bundle_writer import next_version, write_bundle
from rsm_export.checks.verification import Verification, verify
from rsm_export.config import ExportConfig, SearchConfig
from rsm_export.graph.cost import GraphCost, graph_cost
from rsm_train.run.checkpoint import Checkpoint, load_checkpoint

if TYPE_CHECKING:
    from rsm_export.auto.closed_loop import Loss
    from rsm_export.auto.search import SearchResult


@dataclass(frozen=True)
class Export:
    """What an export made."""

    path: Path
    spec: PolicySpec
    verification: Verification | None
    """None if it was switched off."""
    cost: GraphCost
    model_bytes: int
    search: SearchResult | None = None
    """What `auto` found."""


def export_checkpoint(
    source: str | Path,
    repository: Path,
    name: str | None = None,
    config: ExportConfig | None = None,
    closed_loop: SearchConfig | None = None,
    *,
    auto: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> Export:
    """Export a checkpoint, or the best one of a run, as the next version of a policy.

    Args:
        source: a run or checkpoint directory of rsm-train.
        repository: directory of bundles; created if needed.
        name: of the policy; by default that of the run.
        config: how the exported chain samples; by default as it was trained, in float32.
        closed_loop: environment and tolerance of the return.
        auto: search for the fastest chain whose return is within the tolerance.
        progress: told what takes long.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or not of a diffusion policy.
        ConfigError: the settings do not fit the checkpoint.
        UnsupportedEnvError: the environment cannot be created or is not the policy's.
        EnvFaultError: the environment fails, or answers with what its spaces rule out.
        BundleError: the name or the repository is not usable, or the graph failed a check.
        ParityError: the graph does not act like the checkpoint; nothing was written.
    """
    config, closed_loop = config or ExportConfig(), closed_loop or SearchConfig()
    checkpoint = load_checkpoint(source)
    name = name or checkpoint.spec.name
    version = str(next_version(repository, name))
    checkpoint = dataclasses.replace(
        checkpoint, spec=dataclasses.replace(checkpoint.spec, name=name, version=version)
    )
    found = loss = None
    if auto:
        # Need what only rsm-eval needs otherwise.
        from rsm_eval.evaluation import choose_env_args
        from rsm_export.auto.search import search

        env_id = closed_loop.env or checkpoint.spec.env_id
        trained = diffusion_sampler(checkpoint)
        # A candidate that would not be exported must not be chosen.
        found = search(
            trained,
            config,
            closed_loop,
            env_id,
            lambda c: _check(checkpoint, c)[0].open(),
            progress,
            env_args=choose_env_args(env_id, closed_loop.env_arg, [checkpoint.spec]),
        )
        config, loss = found.chosen.config, found.chosen.confirmed
    try:
        built, verification = _check(checkpoint, config)
        if verification is not None and closed_loop.env and not auto:
            progress(f"acting in {closed_loop.episodes} episodes of {closed_loop.env}")
            loss = _compare_returns(checkpoint, built, closed_loop)
            verification = verification.with_check("return", loss.describe())
    except BundleError as error:
        raise type(error)(f"{error}; no bundle was written") from error
    spec = built.bundle.spec
    if loss is not None:
        spec = dataclasses.replace(spec, evaluation=loss.to_dict())
    path = write_bundle(repository, spec, built.bundle.model, built.bundle.probe)
    return Export(path, spec, verification, graph_cost(built.model), len(built.bundle.model), found)


def _check(checkpoint: Checkpoint, config: ExportConfig) -> tuple[Built, Verification | None]:
    """Build the graph and check it, unless that is switched off."""
    built = build(checkpoint, config)
    if not config.verify:
        return built, None
    pool = observations_of(checkpoint)
    verification = verify(
        built.model, built.policy, built.open_session, pool, config.precision, built.bundle.probe
    )
    return built.accepted(verification.accuracy), verification


def _compare_returns(checkpoint: Checkpoint, built: Built, config: SearchConfig) -> Loss:
    from rsm_export.auto.closed_loop import compare_returns  # needs what only rsm-eval needs otherwise

    full, export = build(checkpoint, ExportConfig()).open(), built.open()
    try:
        return compare_returns(full.policy, export.policy, config)
    finally:
        for opened in (full, export):
            opened.session.close()
