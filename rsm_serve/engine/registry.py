"""The versions that a server has loaded, the state of each, and which of them a request goes to."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from rsm_common.errors import NotReadyError, PolicyNotFoundError, RequestError
from rsm_serve.engine.canary import Canary, choose, lot
from rsm_serve.engine.lane import Lane
from rsm_serve.observe.counts import ServerCounts


class State(enum.Enum):
    """The state of a version."""

    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    """Takes no more requests, and answers those that it has."""
    FAILED = "FAILED"


@dataclass(frozen=True)
class VersionStatus:
    """The state of one version that is loaded, is being loaded or unloaded, or did not load."""

    name: str
    version: int
    state: State
    reason: str = ""
    """Why it did not load, one sentence; may name files of the server."""


@dataclass
class _Loaded:
    """The ready versions of one policy, one of which is current."""

    ready: dict[str, Lane]
    current: Lane


class Registry:
    """Holds the lanes by name and version, and the state of every version; belongs to one event loop.

    Every change is one step of the event loop, so a request finds the old lane or the new one. `find` and
    `Lane.sample` belong into one step too: after an `await` in between, the lane may be draining.

    Args:
        lanes: loaded already.
        counts: of the server; shows the counts of its lanes.
        canaries: versions that get a share of the requests without a version.
    """

    def __init__(
        self,
        lanes: Iterable[Lane] = (),
        counts: ServerCounts | None = None,
        canaries: Iterable[Canary] = (),
    ) -> None:
        self._counts = counts or ServerCounts()
        self._policies: dict[str, _Loaded] = {}
        self._draining: list[Lane] = []
        self._troubles: dict[tuple[str, int], VersionStatus] = {}
        self._canaries: dict[str, list[Canary]] = {}
        for canary in canaries:
            self._canaries.setdefault(canary.name, []).append(canary)
        for lane in lanes:
            self.publish(lane)
        for name, loaded in self._policies.items():
            others = set(loaded.ready) - {str(canary.version) for canary in self._canaries.get(name, ())}
            self.set_current(name, max(map(int, others or loaded.ready)))

    @property
    def lanes(self) -> list[Lane]:
        """The lanes that take requests, by name and version."""
        return [
            loaded.ready[version]
            for _, loaded in sorted(self._policies.items())
            for version in sorted(loaded.ready, key=int)
        ]

    @property
    def draining(self) -> list[Lane]:
        """The lanes that take no more requests and have requests to answer."""
        return list(self._draining)

    @property
    def names(self) -> list[str]:
        """Names of the policies with a version that is ready."""
        return sorted(self._policies)

    def ready(self, name: str) -> set[int]:
        """Return the versions of a policy that take requests."""
        return set(map(int, self._policies[name].ready)) if name in self._policies else set()

    def current(self, name: str) -> int | None:
        """Return the version that answers requests without a version; None if none is ready."""
        lane = self.current_lane(name)
        return None if lane is None else int(lane.spec.version)

    def current_lane(self, name: str) -> Lane | None:
        """Return the lane of the current version."""
        return self._policies[name].current if name in self._policies else None

    def failure(self, name: str, version: int) -> str:
        """Return why the last load of a version failed; empty if it succeeded or there was none."""
        trouble = self._troubles.get((name, version))
        return trouble.reason if trouble and trouble.state is State.FAILED else ""

    def index(self) -> list[VersionStatus]:
        """List the state of every version, by name and version.

        A ready version whose reload failed has the failure as its reason. A version that drains may be ready or
        loading again; the list then has it twice.
        """
        found = [VersionStatus(*_key(lane), State.READY, self.failure(*_key(lane))) for lane in self.lanes]
        ready = {(status.name, status.version) for status in found}
        found += [VersionStatus(*_key(lane), State.DRAINING) for lane in self._draining]
        found += [status for key, status in self._troubles.items() if key not in ready]
        return sorted(found, key=lambda status: (status.name, status.version))

    def find(
        self, name: str, version: str, *, client_id: str = "", seed: int | None = None, fixed: bool = False
    ) -> Lane:
        """Return the lane that a request goes to.

        Args:
            name: may be empty if exactly one policy is loaded.
            version: a number, or empty for the current version or a canary.
            client_id: of the caller; decides between the current version and the canaries.
            seed: the first seed of the request; decides if there is no client_id.
            fixed: the request asks for a fixed result (deterministic, or with its own noise). Without a
                client_id it goes to the current version.

        Raises:
            PolicyNotFoundError: no such policy or version, or an empty name with several policies.
            NotReadyError: the version is loading or draining, or failed to load.
        """
        loaded = self._policies.get(name) if name else self._only()
        if loaded is None:
            raise self._unknown(name)
        if version:
            lane = loaded.ready.get(version)
            if lane is None:
                raise self._unready(loaded.current.spec.name, version)
            return lane
        if self._canaries and (client_id or not fixed):
            return self._drawn(loaded, client_id, seed)
        return loaded.current

    def publish(self, lane: Lane) -> Lane | None:
        """Let a lane take requests; return the lane of the same version that it replaces, which then drains.

        The caller starts the lane's batcher in the same step. The first version of a policy becomes current.
        """
        name, version = lane.spec.name, lane.spec.version
        self._counts.add(lane.counts)
        loaded = self._policies.setdefault(name, _Loaded({}, lane))
        replaced = loaded.ready.get(version)
        loaded.ready[version] = lane
        if loaded.current is replaced:
            loaded.current = lane
        if replaced is not None:
            self._drain(replaced)
        self._troubles.pop((name, int(version)), None)
        return replaced

    def set_current(self, name: str, version: int) -> None:
        """Let a version that is ready answer the requests without a version."""
        loaded = self._policies[name]
        loaded.current = loaded.ready[str(version)]

    def withdraw(self, name: str, version: int) -> Lane:
        """Let a version drain, and return its lane; the current version only if it is the last."""
        loaded = self._policies[name]
        lane = loaded.ready.pop(str(version))
        if not loaded.ready:
            del self._policies[name]
        else:
            assert loaded.current is not lane, "another version is made current first"
        self._drain(lane)
        return lane

    def drained(self, lane: Lane) -> None:
        """Forget a lane that has answered all of its requests."""
        self._draining.remove(lane)
        self._counts.remove(lane.counts)

    def loading(self, name: str, version: int) -> None:
        """Note that a version is being loaded."""
        self._troubles[name, version] = VersionStatus(name, version, State.LOADING)

    def failed(self, name: str, version: int, reason: str) -> None:
        """Note that a version did not load."""
        self._troubles[name, version] = VersionStatus(name, version, State.FAILED, reason)

    def forget(self, name: str, version: int) -> None:
        """Forget that a version is loading or has failed."""
        self._troubles.pop((name, version), None)

    def _drain(self, lane: Lane) -> None:
        lane.batcher.close()
        self._draining.append(lane)

    def _only(self) -> _Loaded | None:
        return next(iter(self._policies.values())) if len(self._policies) == 1 else None

    def _drawn(self, loaded: _Loaded, client_id: str, seed: int | None) -> Lane:
        name = loaded.current.spec.name
        canaries = self._canaries.get(name)
        if not canaries:
            return loaded.current
        version = choose(canaries, lot(name, client_id, seed))
        return loaded.ready.get(str(version), loaded.current)

    def _unknown(self, name: str) -> RequestError:
        # A request without a name means the only policy, loaded or not.
        troubles = [status for status in self._troubles.values() if name in (status.name, "")]
        if name or not self._policies:
            if any(status.state is State.LOADING for status in troubles):
                return NotReadyError(f"{_called(name)} is being loaded; try again in a moment")
            if troubles:
                return NotReadyError(
                    f"{_called(name)} failed to load (the server's log says why); try again later"
                )
        if not self._policies:
            return PolicyNotFoundError("wanted a policy, this server has none at present; try again later")
        wanted = f"policy {name!r:.90}" if name else "a policy name, because several are loaded"
        return PolicyNotFoundError(
            f"wanted {wanted}, this server has {', '.join(self.names)}; name one of them"
        )

    def _unready(self, name: str, version: str) -> RequestError:
        wanted = f"wanted version {version!r:.30} of policy {name!r}"
        states = {
            status.state for status in self.index() if (status.name, str(status.version)) == (name, version)
        }
        has = f"this server has {', '.join(sorted(self._policies[name].ready, key=int))}"
        for state, what in (
            (State.LOADING, "which is being loaded; try again in a moment"),
            (State.DRAINING, f"which was replaced, {has}; leave the version out for the current one"),
            (State.FAILED, f"which failed to load (its log says why), {has}; leave the version out"),
        ):
            if state in states:
                return NotReadyError(f"{wanted}, {what}")
        return PolicyNotFoundError(f"{wanted}, {has}; leave the version out for the current one")


def _called(name: str) -> str:
    return f"policy {name!r:.90}" if name else "this server's policy"


def _key(lane: Lane) -> tuple[str, int]:
    return lane.spec.name, int(lane.spec.version)
