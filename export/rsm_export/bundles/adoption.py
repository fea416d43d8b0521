"""A graph that came alone becomes a bundle again: named, versioned, verified and probed from then on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx

from rsm_common.errors import BackendError, BundleError
from rsm_common.seeds import draw_noise, expand_seed
from rsm_common.spec import PolicySpec
from rsm_export.bundles.bundle_writer import next_version, write_bundle, write_time
from rsm_export.checks.static_rules import check_static_rules
from rsm_serve.bundle.contract import load_graph
from rsm_serve.bundle.probe import Probe
from rsm_serve.local import LocalPolicy
from rsm_serve.sessions.choice import open_session

PROBE_ROWS = 8
_PROBE_SEED = 0x41_444F_5054
_NUDGE = 1e-4
_AGAIN = "export the policy again from its checkpoint"
_ROW_TOLERANCE = 1e-3
"""Largest difference, as a fraction of the action range, that counts as rounding of another batch size."""


def adopt_graph(path: Path, repository: Path, name: str | None = None) -> Path:
    """Write a bare model.onnx of rsm-export as the next version of a policy; returns the version's directory.

    What it does cannot be compared with the checkpoint any more: the probe records what it does here and now.

    Args:
        path: the graph, with the specification in its metadata.
        repository: directory of bundles; created if needed.
        name: of the policy; by default as in the graph.

    Raises:
        BundleError: it is not a graph of rsm-export, it does not run, it is random or mixes rows, or the
            repository is not usable.
    """
    bare = load_graph(path)
    name = name or bare.spec.name
    spec = dataclasses.replace(
        bare.spec,
        name=name,
        version=str(next_version(repository, name)),
        provenance={**bare.spec.provenance, "adopted": write_time()},
    )
    policy = LocalPolicy(bare, open_session(bare, "onnxruntime"))
    try:
        check_static_rules(onnx.load_from_string(bare.model))
    except BundleError as error:
        raise BundleError(f"graph {path}: {error}; {_AGAIN}") from None
    try:
        probe = _probe(policy, bare.spec)
        _check_rows(policy, probe)
    except (BundleError, BackendError) as error:
        raise BundleError(f"graph {path}: {error}") from None
    return write_bundle(repository, spec, bare.model, probe)


def _check_rows(policy: LocalPolicy, probe: Probe) -> None:
    """Check that the action of a row depends on its own observation and noise only.

    Raises:
        BundleError: a row gives another action on its own than among other rows.
    """
    span = policy.spec.action_high - policy.spec.action_low
    allowed = max(policy.spec.tolerance, _ROW_TOLERANCE)
    for row in range(len(probe.obs)):
        alone = policy.act(probe.obs[row : row + 1], noise=probe.noise[row : row + 1]).action[0]
        error = float((np.abs(alone - probe.action[row]) / span).max())
        if not error <= allowed:
            raise BundleError(
                f"wanted rows that do not depend on each other, got an action of row {row} that is off by "
                f"{error:.2g} of the action range if the row is computed alone ({allowed:.2g} allowed); "
                f"{_AGAIN}"
            )


def _probe(policy: LocalPolicy, spec: PolicySpec) -> Probe:
    """The rows that move least with their observation: there no two particles nearly tie for the best.

    Where they do, another machine's rounding may choose the other one, which would be no fault.
    """
    rows = 8 * PROBE_ROWS
    obs = np.random.default_rng(_PROBE_SEED).normal(size=(rows, spec.observation.size)).astype(np.float32)
    noise = draw_noise(expand_seed(_PROBE_SEED, rows), spec.noise_shape)
    action = policy.act(obs, noise=noise).action
    moved = np.abs(policy.act(obs * np.float32(1 + _NUDGE), noise=noise).action - action)
    steady = np.argsort((moved / (spec.action_high - spec.action_low)).max(axis=1), kind="stable")[:PROBE_ROWS]
    return Probe(obs=obs[steady], noise=noise[steady], action=action[steady])
