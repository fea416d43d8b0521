"""How versions come and go: loading off the event loop, swapping in one step of it, draining what was replaced.

    LOADING --(verified, every batch bucket warm, probe replayed)--> READY --(replaced)--> DRAINING --> closed
       └--(anything else)--> FAILED, and what was ready goes on

One load at a time: two would compete for the cores that robots wait for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rsm_common.errors import (
    BundleError,
    InvalidRequestError,
    NotReadyError,
    PolicyNotFoundError,
    RepositoryError,
    RsmError,
)
from rsm_serve.bundle.contract import check_policy_name
from rsm_serve.bundle.repository import Found, Stamp, Survey, Wishes, look_at, stamp, survey
from rsm_serve.engine.background import in_thread
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.registry import Registry, State

logger = logging.getLogger(__name__)

Loader = Callable[[str, int], Lane]
"""Loads, verifies, warms up and probes one version; slow, and called in a thread of its own."""

Changed = Callable[[str, bool], object]
"""Told the name of a policy when it becomes ready (True), or no version of it is any more (False)."""

INDEX_STATES = {
    State.READY: "READY",
    State.LOADING: "LOADING",
    State.DRAINING: "UNLOADING",
    State.FAILED: "UNAVAILABLE",
}


class IndexEntry(NamedTuple):
    """One version, as the Open Inference Protocol's repository index tells it."""

    name: str
    version: str
    """A number; empty for a policy of which nothing is loaded."""
    state: str
    """READY, LOADING, UNLOADING or UNAVAILABLE."""
    reason: str
    """Of UNAVAILABLE, one sentence; of READY, why its last reload failed. May name files of the server."""


class RepositoryControl(Protocol):
    """Loading and unloading while the server runs, for whoever has the right to."""

    async def load(self, name: str, version: int | None) -> None:
        """Load a version, or load it anew; returns when it takes requests. Cancelling only stops the waiting.

        Args:
            name: of the policy.
            version: None for the one that the repository says is current. A number keeps that version loaded
                for requests that name it, until `unload`; which one is current is the repository's to say.

        Raises:
            InvalidRequestError: not a policy name.
            PolicyNotFoundError: the repository has no such policy or version.
            RepositoryError: it does not load; what was loaded goes on.
            NotReadyError: the server is shutting down.
        """
        ...

    async def unload(self, name: str) -> None:
        """Take no more requests for a policy, answer what is queued, close its sessions; until `load`.

        Returns as soon as it takes no more requests.

        Raises:
            PolicyNotFoundError: no such policy is loaded.
            NotReadyError: the server is shutting down.
        """
        ...

    def index(self) -> Sequence[tuple[str, str, str, str]]:
        """What is loaded, loading, draining, has failed, or lies in the repository; see `IndexEntry`."""
        ...


class LifeCycle:
    """`RepositoryControl` over a registry, and the watch on the repository; belongs to one event loop.

    Args:
        registry: what is loaded; changed here only.
        repository: where bundles are.
        load: see `Loader`.
        wishes: what is to be loaded beside what the repository says; changed here only.
        poll_s: how often to look at the repository; None: never.
        keep_versions: how many replaced versions of a policy stay loaded.
    """

    def __init__(
        self,
        registry: Registry,
        repository: Path,
        load: Loader,
        wishes: Wishes,
        *,
        poll_s: float | None = None,
        keep_versions: int = 0,
    ) -> None:
        self._registry = registry
        self._repository = repository
        self._load = load
        self._wishes = wishes
        self._poll_s = poll_s
        self._keep_versions = keep_versions
        self._changed: Changed = _nobody
        self._one_at_a_time = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self.loop: asyncio.AbstractEventLoop | None = None
        """To which it belongs; None before `start`."""
        self._failed_stamps: dict[tuple[str, int], Stamp] = {}
        self._replaced: dict[str, list[int]] = {}
        self._found: dict[str, Found] = {}
        self._told: dict[str, str] = {}
        self._missed: set[str] = set()
        self._told_ready: dict[str, bool] = {}

    def start(self, changed: Changed) -> None:
        """Start the lanes, and the watch."""
        self.loop = asyncio.get_running_loop()
        self._changed = changed
        for lane in self._registry.lanes:
            lane.batcher.start()
            self._told_ready[lane.spec.name] = True
        if self._poll_s is not None:
            self._spawn(self._watch(self._poll_s))

    async def stop(self) -> list[Lane]:
        """Load and drain nothing any more; returns the lanes that are open, to be drained and closed."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        return [*self._registry.lanes, *self._registry.draining]

    async def load(self, name: str, version: int | None = None) -> None:
        """See `RepositoryControl.load`."""
        try:
            check_policy_name(name)
        except BundleError as error:
            raise InvalidRequestError(str(error)) from None
        await self._to_the_end(self._load_one(name, version))

    async def unload(self, name: str) -> None:
        """See `RepositoryControl.unload`."""
        await self._to_the_end(self._unload_one(name))

    async def _to_the_end(self, work: Coroutine[Any, Any, None]) -> None:
        """Await what is not cancelled with its caller.

        A load whose caller gives up would leave a thread at work, and a second load beside it; an unload, a
        policy that health still calls ready.
        """
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._settled)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                self._refuse_when_stopping()
            raise

    async def _load_one(self, name: str, version: int | None) -> None:
        async with self._one_at_a_time:
            self._refuse_when_stopping()
            found = await in_thread(lambda: look_at(self._repository / name))
            wanted = self._with(name, version)
            number = version or wanted.current(name, found)
            if found is None or (version is not None and version not in found.versions):
                raise _not_there(name, version, found)
            if number is None:
                raise RepositoryError(
                    found.problem or f"policy {name!r} has no complete version; export it again"
                )
            current = wanted.current(name, found)
            failure = await self._bring(name, number, make_current=number == current)
            self._refuse_when_stopping()
            if failure:
                raise RepositoryError(failure)
            # Canaries and pinned versions went with an unload. One that fails is told in the log and the index.
            for other in sorted(wanted.fixed(name) - self._registry.ready(name)):
                await self._bring(name, other, make_current=other == current)
                self._refuse_when_stopping()
            self._wishes = wanted
            self._found[name] = found
            self._settle(name, current)

    async def _unload_one(self, name: str) -> None:
        async with self._one_at_a_time:
            self._refuse_when_stopping()
            if not self._registry.ready(name):
                names = ", ".join(self._registry.names) or "no policies"
                raise PolicyNotFoundError(f"wanted to unload policy {name!r:.90}, this server has {names}")
            self._wishes.unloaded.add(name)
            self._wishes.pinned.pop(name, None)
            for key in [key for key in self._failed_stamps if key[0] == name]:  # nobody waits for it any more
                del self._failed_stamps[key]
                self._registry.forget(*key)
            self._drop(name, "it was unloaded by request")

    def index(self) -> Sequence[IndexEntry]:
        """See `RepositoryControl.index`."""
        rows = [
            IndexEntry(status.name, str(status.version), INDEX_STATES[status.state], status.reason)
            for status in self._registry.index()
        ]
        known = {row.name for row in rows}
        idle = {*self._found, *self._wishes.unloaded} - known
        return sorted(
            [*rows, *(IndexEntry(name, "", "UNAVAILABLE", "unloaded") for name in idle)], key=_numeric
        )

    async def refresh(self) -> None:
        """Look at the repository once, and do what it says. What does not load is told in the log."""
        async with self._one_at_a_time:
            asked = list(self._failed_stamps)
            try:
                found = await in_thread(lambda: survey(self._repository, asked))
            except BundleError as error:  # a volume that is gone for a moment must not empty the server
                self._tell_once("", f"{error}; what is loaded goes on")
                return
            self._told.pop("", None)
            self._found = dict(found.policies)
            for name in sorted({*found.policies, *self._registry.names, *(name for name, _ in asked)}):
                if self._stopping:
                    return
                await self._follow(name, found)

    async def _watch(self, poll_s: float) -> None:
        while True:
            await asyncio.sleep(poll_s)
            try:
                await self.refresh()
            except Exception:
                logger.exception("the repository could not be followed; it is tried again in %g s", poll_s)

    async def _follow(self, name: str, survey: Survey) -> None:
        """Bring one policy to where the repository wants it."""
        found, wishes = survey.policies.get(name), self._wishes
        self._forget_failures(name, found)
        if found is None:
            self._follow_vanished(name)
            return
        self._missed.discard(name)
        if found.problem:
            self._tell_once(name, f"policy {name!r} stays as it is: {found.problem}")
            return
        self._told.pop(name, None)
        if not wishes.follows(name) and not wishes.fixed(name):
            return
        current = wishes.current(name, found)
        missing = ({current} | wishes.fixed(name)) - {None} - self._registry.ready(name)
        # The current one first: requests wait for it.
        for version in sorted(filter(None, missing), key=lambda number: (number != current, number)):
            if self._worth_trying(name, version, survey):
                await self._bring(name, version, make_current=version == current)
        self._settle(name, current)

    def _follow_vanished(self, name: str) -> None:
        if not self._wishes.follows(name) or name in self._wishes.names():
            if self._registry.ready(name):
                self._tell_once(name, f"policy {name!r} is no longer in the repository; what is loaded goes on")
        elif name not in self._missed:  # a directory that is being moved or remounted will be back
            self._missed.add(name)
        else:
            self._missed.discard(name)
            self._told.pop(name, None)
            self._drop(name, "it is no longer in the repository")

    def _worth_trying(self, name: str, version: int, survey: Survey) -> bool:
        """A version that failed is tried again when its files have changed, not before."""
        key = (name, version)
        return key not in self._failed_stamps or self._failed_stamps[key] != survey.stamps.get(key)

    async def _bring(self, name: str, version: int, *, make_current: bool) -> str:
        """Load one version and let it take requests; returns why it failed, empty if it did not."""
        registry, path = self._registry, self._repository / name / str(version)

        def attempt() -> tuple[Stamp, Lane | Exception]:
            before = stamp(path)  # what changes while it is read will have changed afterwards
            try:
                return before, self._load(name, version)
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
            self._failed_stamps[name, version] = before
            registry.failed(name, version, reason)
            self._tell_failure(name, version, lane)
            return reason
        if self._stopping:
            lane.close()
            registry.forget(name, version)
            return ""
        self._failed_stamps.pop((name, version), None)
        self._swap(lane, make_current=make_current)
        return ""

    def _swap(self, lane: Lane, *, make_current: bool) -> None:
        """One step of the event loop: a request before it meets the old lane, one after it the new."""
        name, version = lane.spec.name, int(lane.spec.version)
        before = self._registry.current_lane(name)
        same = self._registry.publish(lane)
        lane.batcher.start()
        if make_current:
            self._make_current(name, version)
        if same is not None:
            self._spawn(self._close(same))
        if before is not None and not _same_interface(before, lane):
            logger.warning(
                "policy %r version %d takes or gives something else than version %s: observation, action or "
                "control period differ; clients that fetched the older specification must connect again",
                name,
                version,
                before.spec.version,
            )

    def _make_current(self, name: str, version: int) -> None:
        old = self._registry.current(name)
        self._registry.set_current(name, version)
        replaced = self._replaced.setdefault(name, [])
        if version in replaced:
            replaced.remove(version)
        if old is not None and old != version:
            replaced.insert(0, old)
            logger.info("policy %r: version %d is current, after version %d", name, version, old)

    def _settle(self, name: str, current: int | None) -> None:
        """Make the wanted version current if it is ready, and let go what nobody needs any more."""
        registry = self._registry
        ready = registry.ready(name)
        if current in ready and current is not None and current != registry.current(name):
            self._make_current(name, current)
        kept = self._replaced.get(name, [])[: self._keep_versions]
        self._replaced[name] = kept
        surplus = ready - {registry.current(name)} - self._wishes.fixed(name) - set(kept)
        for version in sorted(surplus):
            self._spawn(self._close(registry.withdraw(name, version)))
        self._tell_change(name)

    def _drop(self, name: str, why: str) -> None:
        """Unload every version of a policy."""
        ready = self._registry.ready(name)
        if not ready:
            return
        current = self._registry.current(name)
        for version in sorted(ready, key=lambda number: number == current):
            self._spawn(self._close(self._registry.withdraw(name, version)))
        self._replaced.pop(name, None)
        logger.info("policy %r is unloaded: %s", name, why)
        self._tell_change(name)

    async def _close(self, lane: Lane) -> None:
        """Answer what a withdrawn lane has, then release its session."""
        await lane.batcher.drained()
        await in_thread(lane.close)
        self._registry.drained(lane)
        logger.info("unloaded %s version %s", lane.spec.name, lane.spec.version)

    def _with(self, name: str, version: int | None) -> Wishes:
        """The wishes as they will be when a load has succeeded."""
        old = self._wishes
        follow, pinned = old.follow, {key: set(numbers) for key, numbers in old.pinned.items()}
        if version is not None:
            pinned.setdefault(name, set()).add(version)
        elif follow is not None:
            follow = follow | {name}
        return replace(old, follow=follow, pinned=pinned, unloaded=old.unloaded - {name})

    def _forget_failures(self, name: str, found: Found | None) -> None:
        """Of versions that are no longer there; what is asked for and never was stays told."""
        wanted = self._wishes.current(name, found)
        there = {*(found.versions if found else ()), wanted, *self._wishes.fixed(name)}
        for key in [key for key in self._failed_stamps if key[0] == name and key[1] not in there]:
            del self._failed_stamps[key]
            self._registry.forget(*key)

    def _tell_change(self, name: str) -> None:
        ready = bool(self._registry.ready(name))
        if self._told_ready.get(name) != ready:
            self._told_ready[name] = ready
            self._changed(name, ready)

    def _tell_failure(self, name: str, version: int, error: Exception) -> None:
        current = self._registry.current(name)
        rest = "none is ready" if current is None else f"version {current} goes on"
        # What is not one of ours is a fault whose place somebody will want to know.
        trace = None if isinstance(error, RsmError) else error
        fields = {"policy": name, "version": str(version)}
        logger.error(
            "policy %r version %d did not load, %s: %s",
            name,
            version,
            rest,
            error,
            exc_info=trace,
            extra=fields,
        )

    def _tell_once(self, about: str, sentence: str) -> None:
        if self._told.get(about) != sentence:
            self._told[about] = sentence
            logger.error("%s", sentence)

    def _refuse_when_stopping(self) -> None:
        if self._stopping:
            raise NotReadyError("the server is shutting down and loads nothing any more; use another")

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _settled(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever still waits hears of it, and the log has it already

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("following the repository failed", exc_info=task.exception())


def _close_abandoned(outcome: tuple[Stamp, Lane | Exception]) -> None:
    if isinstance(outcome[1], Lane):
        outcome[1].close()


def _nobody(name: str, ready: bool) -> None:
    """Whom changes are told before `LifeCycle.start`."""


def _same_interface(one: Lane, other: Lane) -> bool:
    """Whether a client of one can act by the other."""
    return (one.spec.observation, one.spec.action, one.spec.control_dt_s) == (
        other.spec.observation,
        other.spec.action,
        other.spec.control_dt_s,
    )


def _not_there(name: str, version: int | None, found: Found | None) -> PolicyNotFoundError:
    if found is None:
        return PolicyNotFoundError(
            f"wanted policy {name!r}, the repository has none of that name; export it first"
        )
    has = ", ".join(map(str, found.versions)) or "no complete one"
    return PolicyNotFoundError(f"wanted version {version} of policy {name!r}, the repository has {has}")


def _numeric(entry: IndexEntry) -> tuple[str, int]:
    return entry.name, int(entry.version or 0)
