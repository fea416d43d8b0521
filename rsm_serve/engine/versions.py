"""Loads versions of policies, lets one take the place of another, and drains those that are no longer needed.

    LOADING --(verified, every batch bucket warm, probe replayed)--> READY --(replaced)--> DRAINING --> closed
       └--(any error)--> FAILED, and the versions that were ready stay ready

A load runs in a thread. The change from one version to the next is one step of the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rsm_common.errors import RsmError
from rsm_serve.bundle.repository import Found, Stamp, Wishes, stamp
from rsm_serve.engine.background import Tasks, in_thread
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.registry import Registry

logger = logging.getLogger(__name__)

Loader = Callable[[str, int], Lane]
"""Loads, verifies, warms up and probes one version; slow, and called in a thread of its own."""

Changed = Callable[[str, bool], object]
"""Called with the name of a policy when it becomes ready (True), or when its last version leaves (False)."""


@dataclass
class Memory:
    """What is remembered of one policy between two changes."""

    found: Found | None = None
    """What the repository held at the last look; None for nothing."""
    replaced: list[int] = field(default_factory=list)
    """Versions that were current before, the latest first, as many as stay loaded."""
    failed: dict[int, Stamp] = field(default_factory=dict)
    """Versions that did not load, with the stamps of their files at that time."""
    missing: bool = False
    """The last look did not find the policy in the repository."""
    problem: str = ""
    """The last problem that was logged; it is logged again only when it changes."""
    ready: bool = False
    """Whether `Changed` was told that the policy is ready."""


class Versions:
    """The versions of all policies of one server; belongs to one event loop.

    Args:
        registry: what is loaded; changed here only.
        repository: the directory of bundles.
        load: see `Loader`.
        wishes: what the operator wants loaded.
        keep_versions: how many replaced versions of a policy stay loaded.
    """

    def __init__(
        self, registry: Registry, repository: Path, load: Loader, wishes: Wishes, keep_versions: int
    ) -> None:
        self.registry = registry
        self.repository = repository
        self.load = load
        self.wishes = wishes
        self.memory: defaultdict[str, Memory] = defaultdict(Memory)
        """By name of the policy."""
        self.tasks = Tasks()
        self.stopping = False
        self._keep_versions = keep_versions
        self._changed: Changed | None = None

    def start(self, changed: Changed) -> None:
        """Start the lanes that are loaded already."""
        self._changed = changed
        for lane in self.registry.lanes:
            lane.batcher.start()
            self.memory[lane.spec.name].ready = True

    async def bring(self, name: str, version: int, *, make_current: bool) -> str:
        """Load one version and let it take requests; return why it failed, empty if it did not."""
        registry, path = self.registry, self.repository / name / str(version)

        def attempt() -> tuple[Stamp, Lane | Exception]:
            before = stamp(path)  # taken first, so that files that change while they are read are tried again
            try:
                return before, self.load(name, version)
            except Exception as error:
                return before, error

        registry.loading(name, version)
        try:
            before, lane = await in_thread(attempt, abandon=_close_abandoned)
        except asyncio.CancelledError:
            registry.forget(name, version)
            raise
        if isinstance(lane, Exception):
            reason = str(lane) if isinstance(lane, RsmError) else f"{type(lane).__name__}: {lane}"
            self.memory[name].failed[version] = before
            registry.failed(name, version, reason)
            self._log_failure(name, version, lane)
            return reason
        if self.stopping:
            lane.close()
            registry.forget(name, version)
            return ""
        self.memory[name].failed.pop(version, None)
        self._swap(lane, make_current=make_current)
        return ""

    def settle(self, name: str, current: int | None) -> None:
        """Make the wanted version current if it is ready, and drain the versions that are not needed."""
        registry, memory = self.registry, self.memory[name]
        ready = registry.ready(name)
        if current in ready and current is not None and current != registry.current(name):
            self._make_current(name, current)
        memory.replaced = memory.replaced[: self._keep_versions]
        needed = {registry.current(name), *self.wishes.fixed(name), *memory.replaced}
        for version in sorted(ready - needed):
            self.tasks.spawn(self._close(registry.withdraw(name, version)))
        self._tell_change(name)

    def drop(self, name: str, why: str) -> None:
        """Unload every version of a policy."""
        ready, current = self.registry.ready(name), self.registry.current(name)
        if not ready:
            return
        for version in sorted(ready, key=lambda number: number == current):
            self.tasks.spawn(self._close(self.registry.withdraw(name, version)))
        self.memory[name].replaced.clear()
        logger.info("policy %r is unloaded: %s", name, why)
        self._tell_change(name)

    def forget_failures(self, name: str, keep: set[int]) -> None:
        """Forget that versions of a policy failed to load, except those to keep."""
        failed = self.memory[name].failed
        for version in set(failed) - keep:
            del failed[version]
            self.registry.forget(name, version)

    def _swap(self, lane: Lane, *, make_current: bool) -> None:
        """Publish a lane in one step of the event loop: a request goes to the old lane or to the new one."""
        name, version = lane.spec.name, int(lane.spec.version)
        before = self.registry.current_lane(name)
        same = self.registry.publish(lane)
        lane.batcher.start()
        if make_current:
            self._make_current(name, version)
        if same is not None:
            self.tasks.spawn(self._close(same))
        if before is not None and not _same_interface(before, lane):
            logger.warning(
                "policy %r version %d takes or gives something else than version %s: observation, action or "
                "control period differ; clients that fetched the older specification must connect again",
                name,
                version,
                before.spec.version,
            )

    def _make_current(self, name: str, version: int) -> None:
        old = self.registry.current(name)
        self.registry.set_current(name, version)
        replaced = self.memory[name].replaced
        if version in replaced:
            replaced.remove(version)
        if old is not None and old != version:
            replaced.insert(0, old)
            logger.info("policy %r: version %d is current, after version %d", name, version, old)

    async def _close(self, lane: Lane) -> None:
        """Answer the requests that a withdrawn lane has, then release its session."""
        await lane.batcher.drained()
        await in_thread(lane.close)
        self.registry.drained(lane)
        logger.info("unloaded %s version %s", lane.spec.name, lane.spec.version)

    def _tell_change(self, name: str) -> None:
        ready = bool(self.registry.ready(name))
        if self.memory[name].ready != ready:
            self.memory[name].ready = ready
            if self._changed is not None:
                self._changed(name, ready)

    def _log_failure(self, name: str, version: int, error: Exception) -> None:
        current = self.registry.current(name)
        logger.error(
            "policy %r version %d did not load, %s: %s",
            name,
            version,
            "none is ready" if current is None else f"version {current} goes on",
            error,
            # An error of another type is a fault of the program or the runtime; its traceback says where.
            exc_info=None if isinstance(error, RsmError) else error,
            extra={"policy": name, "version": str(version)},
        )


def _close_abandoned(attempt: tuple[Stamp, Lane | Exception]) -> None:
    if isinstance(attempt[1], Lane):
        attempt[1].close()


def _same_interface(one: Lane, other: Lane) -> bool:
    """Whether a client that fetched the specification of one can use the other."""
    return (one.spec.observation, one.spec.action, one.spec.control_dt_s) == (
        other.spec.observation,
        other.spec.action,
        other.spec.control_dt_s,
    )
