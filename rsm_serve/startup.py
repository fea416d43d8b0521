"""Loads the policies that a configuration asks for, before the server has an event loop."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Mapping
from pathlib import Path

from rsm_common.errors import BundleError
from rsm_common.manifest import MANIFEST_FILE
from rsm_serve.bundle.contract import list_policies, list_versions
from rsm_serve.bundle.repository import Found, Wishes, survey
from rsm_serve.config import ServerConfig
from rsm_serve.engine.lane import Lane, Selection, load_lane
from rsm_serve.engine.registry import Registry
from rsm_serve.engine.turns import Turns
from rsm_serve.engine.versions import Loader
from rsm_serve.observe.counts import ServerCounts

logger = logging.getLogger(__name__)

_RUN_FILE = "config.json"
"""The file of a training run by which it is known."""


def load_repository(config: ServerConfig, load: Loader, counts: ServerCounts) -> tuple[Registry, Wishes]:
    """Load the policies that the configuration asks for.

    Raises:
        BundleError: a policy that was asked for is missing or damaged, or there is no policy.
        MissingExtraError: the backend is not installed.
    """
    wishes = wishes_of(config)
    policies = survey(config.repo).policies if list_policies(config.repo) else {}
    mistaken = "" if policies else _mistaken_for_repository(config.repo)
    if mistaken:
        raise _nothing_to_serve(config.repo, mistaken)
    _check_canaries(config, policies)
    names = wishes.names() if wishes.follow is not None else wishes.names() | set(policies)
    lanes: list[Lane] = []
    currents: dict[str, int] = {}
    problem: BundleError | None = None
    for name in sorted(names):
        try:
            lanes += (loaded := _load_policy(name, policies.get(name, Found(())), wishes, load, config))
        except BundleError as error:
            if config.versions.poll is None or name in wishes.names():
                raise
            logger.error("policy %r is not served before its files change: %s", name, error)
            problem = error
            continue
        wanted = wishes.current(name, policies.get(name))
        if str(wanted) in [lane.spec.version for lane in loaded]:
            currents[name] = int(str(wanted))
    if not lanes and (problem is not None or config.versions.poll is None):
        raise problem or _nothing_to_serve(config.repo, "")
    if not lanes:
        logger.warning("%s has no policy yet; the server is ready when the first has come", config.repo)
    registry = Registry(lanes, counts, config.versions.canaries)
    for name, current in currents.items():
        registry.set_current(name, current)
    return registry, wishes


def _load_policy(name: str, found: Found, wishes: Wishes, load: Loader, config: ServerConfig) -> list[Lane]:
    """Load the versions of one policy that a server starts with.

    A server that polls runs unattended. If the newest version is broken, it starts with the version before, as
    a running server would have kept it.
    """
    if found.problem:
        raise BundleError(found.problem)
    current = wishes.current(name, found)
    fixed = wishes.fixed(name)
    lanes = []
    if wishes.follows(name) and current not in fixed:
        lanes.append(_load_current(name, current, found, load, fall_back=config.versions.poll is not None))
    return [*lanes, *(load(name, version) for version in sorted(fixed))]


def _load_current(name: str, current: int | None, found: Found, load: Loader, *, fall_back: bool) -> Lane:
    # Without a complete version (0) the newest directory is tried, and its error says what is wrong.
    candidates = [current or 0]
    if fall_back and found.pointer is None:
        candidates += sorted((version for version in found.versions if version < candidates[0]), reverse=True)
    for version in candidates:
        try:
            return load(name, version)
        except BundleError as error:
            if version == candidates[-1]:
                raise
            logger.error("policy %r version %d did not load, the one before is tried: %s", name, version, error)
    raise AssertionError("the last candidate raises")


def wishes_of(config: ServerConfig) -> Wishes:
    """Return the versions that a configuration asks for."""
    follow = {selection.name for selection in config.versions.policies if selection.version is None}
    wishes = Wishes(follow if config.versions.policies else None)
    for selection in config.versions.policies:
        if selection.version is not None:
            wishes.pinned.setdefault(selection.name, set()).add(selection.version)
    for canary in config.versions.canaries:
        wishes.canaries.setdefault(canary.name, set()).add(canary.version)
    return wishes


def make_loader(config: ServerConfig, counts: ServerCounts) -> Loader:
    """Make the loader of a server: it loads one version and counts how long that took."""
    turns = None if config.inference.workers is None else Turns(config.inference.workers)

    def load(name: str, version: int) -> Lane:
        started = time.perf_counter()
        with counts.loading(name):
            lane = load_lane(
                config.repo,
                Selection(name, version or None),
                limits=config.batching.limits,
                backend=config.inference.backend,
                threads=config.inference.threads,
                cache_dir=config.inference.engine_cache,
                turns=turns,
            )
        logger.info(
            "loaded %s version %s in %.2f s: %s",
            name,
            lane.spec.version,
            time.perf_counter() - started,
            lane.runtime,
            extra={"policy": name, "version": lane.spec.version},
        )
        return lane

    return load


def _nothing_to_serve(repository: Path, mistaken: str) -> BundleError:
    advice = mistaken or "which has none; create one with rsm-export RUN --repo DIR"
    return BundleError(f"wanted a repository with at least one policy, got {str(repository)!r}, {advice}")


def _mistaken_for_repository(path: Path) -> str:
    """What the directory is instead of a repository, and what to give; empty if it may become a repository."""
    here = path.absolute()
    if list_versions(here):
        return f"which is one policy; give --repo {_quoted(here.parent)} --policy {here.name}"
    if (here / MANIFEST_FILE).is_file():
        policy = here.parent
        return (
            f"which is one version of a policy; give --repo {_quoted(policy.parent)} "
            f"--policy {policy.name}:{here.name}"
        )
    if (here / _RUN_FILE).is_file():
        return f"which is a run of rsm-train; export it with rsm-export {_quoted(here)} --repo DIR"
    runs = sorted(run.parent for run in here.glob(f"*/{_RUN_FILE}"))
    if runs:
        command = f"rsm-export {_quoted(runs[0])} --repo DIR"
        return f"which holds runs of rsm-train; export one, for example with {command}"
    return ""


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _check_canaries(config: ServerConfig, policies: Mapping[str, Found]) -> None:
    """Make sure that the repository has the version of every canary.

    Raises:
        BundleError: a version is missing.
    """
    for canary in config.versions.canaries:
        versions = policies.get(canary.name, Found(())).versions
        if canary.version not in versions:
            found = f"versions {', '.join(map(str, versions))}" if versions else "no such policy"
            raise BundleError(
                f"wanted version {canary.version} of policy {canary.name!r} in {str(config.repo)!r} "
                f"for --canary, got {found}; export that version first, or give another --canary"
            )
