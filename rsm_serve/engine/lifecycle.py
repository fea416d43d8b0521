"""Loading and unloading while the server runs: by request, and by following the repository.

One load runs at a time: two would compete for the cores that robots wait for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rsm_common.errors import (
    BundleError,
    InvalidRequestError,
    NotReadyError,
    PolicyNotFoundError,
    RepositoryError,
)
from rsm_serve.bundle.contract import check_policy_name
from rsm_serve.bundle.repository import Found, Wishes, look_at
from rsm_serve.engine.background import in_thread
from rsm_serve.engine.follow import Follower
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.registry import Registry, State
from rsm_serve.engine.versions import Changed, Loader, Versions

logger = logging.getLogger(__name__)

INDEX_STATES = {
    State.READY: "READY",
    State.LOADING: "LOADING",
    State.DRAINING: "UNLOADING",
    State.FAILED: "UNAVAILABLE",
}


class IndexEntry(NamedTuple):
    """One version, as the repository index of the Open Inference Protocol shows it."""

    name: str
    version: str
    """A number; empty for a policy without a loaded version."""
    state: str
    """READY, LOADING, UNLOADING or UNAVAILABLE."""
    reason: str
    """Of UNAVAILABLE, one sentence; of READY, why its last reload failed. May name files of the server."""


class RepositoryControl(Protocol):
    """Loads and unloads policies while the server runs; the caller has checked who may."""

    async def load(self, name: str, version: int | None) -> None:
        """Load a version, or load it again; return when it takes requests. Cancelling only stops the waiting.

        Args:
            name: of the policy.
            version: None for the version that the repository says is current. A number keeps that version
                loaded for requests that name it, until `unload`; the repository decides which one is current.

        Raises:
            InvalidRequestError: not a policy name.
            PolicyNotFoundError: the repository has no such policy or version.
            RepositoryError: it does not load; the versions that were loaded stay loaded.
            NotReadyError: the server is shutting down.
        """
        ...

    async def unload(self, name: str) -> None:
        """Take no more requests for a policy, answer what is queued and close its sessions, until `load`.

        Returns as soon as it takes no more requests.

        Raises:
            PolicyNotFoundError: no such policy is loaded.
            NotReadyError: the server is shutting down.
        """
        ...

    def index(self) -> Sequence[tuple[str, str, str, str]]:
        """List the versions that are loaded, loading or draining, have failed, or lie in the repository.

        Each is an `IndexEntry`.
        """
        ...


class LifeCycle:
    """`RepositoryControl` over a registry, and the watch on the repository; belongs to one event loop.

    Args:
        registry: what is loaded; changed here only.
        repository: the directory of bundles.
        load: see `Loader`.
        wishes: what the operator wants loaded; changed here only.
        poll_s: seconds between two looks at the repository; None: no looks.
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
        self.versions = Versions(registry, repository, load, wishes, keep_versions)
        self._follower = Follower(self.versions)
        self._poll_s = poll_s
        self._one_at_a_time = asyncio.Lock()
        self.loop: asyncio.AbstractEventLoop | None = None
        """The event loop that it belongs to; None before `start`."""

    def start(self, changed: Changed) -> None:
        """Start the lanes, and the watch."""
        self.loop = asyncio.get_running_loop()
        self.versions.start(changed)
        if self._poll_s is not None:
            self.versions.tasks.spawn(self._watch(self._poll_s))

    async def stop(self) -> list[Lane]:
        """Stop loading and draining; return the lanes that are open, to be drained and closed."""
        self.versions.stopping = True
        await self.versions.tasks.cancel()
        return [*self.versions.registry.lanes, *self.versions.registry.draining]

    async def load(self, name: str, version: int | None = None) -> None:
        """See `RepositoryControl.load`."""
        try:
            check_policy_name(name)
        except BundleError as error:
            raise InvalidRequestError(str(error)) from None
        await self._to_the_end(self._load(name, version))

    async def unload(self, name: str) -> None:
        """See `RepositoryControl.unload`."""
        await self._to_the_end(self._unload(name))

    def index(self) -> Sequence[IndexEntry]:
        """See `RepositoryControl.index`."""
        versions = self.versions
        rows = [
            IndexEntry(status.name, str(status.version), INDEX_STATES[status.state], status.reason)
            for status in versions.registry.index()
        ]
        found = {name for name, memory in versions.memory.items() if memory.found is not None}
        idle = (found | versions.wishes.unloaded) - {row.name for row in rows}
        return sorted(
            [*rows, *(IndexEntry(name, "", "UNAVAILABLE", "unloaded") for name in idle)], key=_numeric
        )

    async def refresh(self) -> None:
        """Look at the repository once, and load and unload what it says; failures are logged."""
        async with self._one_at_a_time:
            await self._follower.look()

    async def _watch(self, poll_s: float) -> None:
        while True:
            await asyncio.sleep(poll_s)
            try:
                await self.refresh()
            except Exception:
                logger.exception("the repository could not be followed; the next try is in %g s", poll_s)

    async def _to_the_end(self, work: Coroutine[Any, Any, None]) -> None:
        """Await work that goes on if its caller is cancelled.

        Otherwise a load whose caller gives up would leave a thread at work and a second load beside it, and an
        unload would leave a policy that health still calls ready.
        """
        if not await self.versions.tasks.finish(work):
            self._refuse_when_stopping()

    async def _load(self, name: str, version: int | None) -> None:
        versions = self.versions
        async with self._one_at_a_time:
            self._refuse_when_stopping()
            found = await in_thread(lambda: look_at(versions.repository / name))
            wanted = _with(versions.wishes, name, version)
            number = version or wanted.current(name, found)
            if found is None or (version is not None and version not in found.versions):
                raise _not_there(name, version, found)
            if number is None:
                raise RepositoryError(
                    found.problem or f"policy {name!r} has no complete version; export it again"
                )
            current = wanted.current(name, found)
            failure = await versions.bring(name, number, make_current=number == current)
            self._refuse_when_stopping()
            if failure:
                raise RepositoryError(failure)
            # Canaries and pinned versions left with an unload. A failure of one is in the log and the index.
            for other in sorted(wanted.fixed(name) - versions.registry.ready(name)):
                await versions.bring(name, other, make_current=other == current)
                self._refuse_when_stopping()
            versions.wishes = wanted
            versions.memory[name].found = found
            versions.settle(name, current)

    async def _unload(self, name: str) -> None:
        versions = self.versions
        async with self._one_at_a_time:
            self._refuse_when_stopping()
            if not versions.registry.ready(name):
                names = ", ".join(versions.registry.names) or "no policies"
                raise PolicyNotFoundError(f"wanted to unload policy {name!r:.90}, this server has {names}")
            versions.wishes.unloaded.add(name)
            versions.wishes.pinned.pop(name, None)
            versions.forget_failures(name, keep=set())
            versions.drop(name, "it was unloaded by request")

    def _refuse_when_stopping(self) -> None:
        if self.versions.stopping:
            raise NotReadyError("the server is shutting down and cannot load a policy; use another server")


def _with(old: Wishes, name: str, version: int | None) -> Wishes:
    """Return the wishes as they will be when a load has succeeded."""
    follow, pinned = old.follow, {key: set(numbers) for key, numbers in old.pinned.items()}
    if version is not None:
        pinned.setdefault(name, set()).add(version)
    elif follow is not None:
        follow = follow | {name}
    return replace(old, follow=follow, pinned=pinned, unloaded=old.unloaded - {name})


def _not_there(name: str, version: int | None, found: Found | None) -> PolicyNotFoundError:
    if found is None:
        return PolicyNotFoundError(
            f"wanted policy {name!r}, the repository has none of that name; export it first"
        )
    has = ", ".join(map(str, found.versions)) or "no complete one"
    return PolicyNotFoundError(f"wanted version {version} of policy {name!r}, the repository has {has}")


def _numeric(entry: IndexEntry) -> tuple[str, int]:
    return entry.name, int(entry.version or 0)
