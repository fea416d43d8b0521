"""What a server has loaded: one lane (policy, batcher, worker thread) per version, and each version's state."""

from __future__ import annotations

import asyncio
import enum
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import BackendError, BundleError, NotReadyError, PolicyNotFoundError, RequestError
from rsm_common.policy import ActResult, ActRows
from rsm_common.spec import PolicySpec
from rsm_serve.bundle.contract import check_policy_name, list_policies, list_versions, load_bundle
from rsm_serve.engine.batcher import Batcher, BatchLimits
from rsm_serve.engine.canary import Canary, choose, lot
from rsm_serve.local import LocalPolicy, run_bundle
from rsm_serve.observe.counts import LaneStatistics
from rsm_serve.observe.observer import LaneObserver, Observer
from rsm_serve.observe.settled import Answered


@dataclass(frozen=True)
class Selection:
    """Which version of which policy to load; `version` None means the newest."""

    name: str
    version: int | None = None

    @classmethod
    def parse(cls, text: str) -> Selection:
        """From NAME or NAME:VERSION.

        Raises:
            BundleError: not a policy name, or the version is not a positive number.
        """
        name, colon, version = text.partition(":")
        check_policy_name(name)
        if not colon:
            return cls(name)
        if not (version.isdecimal() and version.isascii() and int(version) > 0):
            raise BundleError(f"wanted NAME or NAME:VERSION with a version such as 1, got {text!r}")
        return cls(name, int(version))


MAX_NOISE_IN_LOOP = 4096
"""Random numbers that are drawn in the event loop, when a request comes; the worker draws more. numpy lets go
of the interpreter for every row, and under load the worker then waits for the event loop to give it back, which
took a tenth of the throughput of 64 clients. The event loop waits for a few lines of the worker at most."""


class Lane:
    """One loaded version of one policy, and the queue in front of it."""

    def __init__(
        self, policy: LocalPolicy, limits: BatchLimits, turns: AbstractContextManager[object] | None = None
    ) -> None:
        self.spec: PolicySpec = policy.spec
        self.runtime = policy.runtime
        self.spec_json = policy.spec.to_json()
        self._policy = policy
        self._row_noise = math.prod(policy.spec.noise_shape)
        self.limits = limits
        self.statistics = LaneStatistics()
        self.observer: LaneObserver | None = None
        self.batcher: Batcher[ActRows, ActResult] = Batcher(
            self._act_batch, limits, name=f"{policy.spec.name}:{policy.spec.version}", turns=turns
        )

    def submit(
        self, rows: ActRows, timeout_s: float | None, *, priority: int = 0, client_id: str = ""
    ) -> asyncio.Future[Answered[ActResult]]:
        """Queue a validated request; see `Batcher.submit`."""
        arrived_s = time.perf_counter()
        if rows.noise_BTNA is None and len(rows.obs_BO) * self._row_noise <= MAX_NOISE_IN_LOOP:
            rows = ActRows(rows.obs_BO, rows.seeds_B, rows.drawn_noise(self.spec), rows.single)
        try:
            future = self.batcher.submit(
                rows, len(rows.obs_BO), timeout_s, priority=priority, client_id=client_id
            )
        except RequestError:
            self.statistics.refused()
            raise
        self.statistics.follow(future, arrived_s)
        return future

    @property
    def probe_obs(self) -> NDArray[np.float32]:
        """[P, O]: the bundle's recorded observations; none for a bare graph."""
        return self._policy.probe_obs

    def observe(self, observer: Observer) -> None:
        """Tell an observer of this lane from now on; to be called before the batcher starts."""
        self.observer = observer.lane(
            self.spec.name, self.spec.version, self.runtime, lambda: self.batcher.queued_rows
        )

    def close(self) -> None:
        """Release the policy's session, once the batcher is drained; in the event loop."""
        self.release()
        self.leave()

    def release(self) -> None:
        """The part of `close` that takes its time; in any thread."""
        self._policy.close()

    def leave(self) -> None:
        """The rest of `close`: observers forget the lane."""
        if self.observer is not None:
            self.observer.closed()

    def _act_batch(self, requests: Sequence[ActRows]) -> Sequence[ActResult | BackendError]:
        observer = self.observer
        if observer is None:
            return self._policy.act_batch(requests)
        started_s = time.perf_counter()
        try:
            answers = self._policy.act_batch(requests)
        except Exception:
            observer.execution_failed()
            raise
        seconds = time.perf_counter() - started_s
        unsound = sum(isinstance(answer, BackendError) for answer in answers)
        observer.executed(sum(len(request.obs_BO) for request in requests), seconds, unsound)
        return answers


class State(enum.Enum):
    """Where a version is in its life."""

    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    """Takes no more requests; what it has is answered."""
    FAILED = "FAILED"


@dataclass(frozen=True)
class VersionStatus:
    """One version that is, was to be, or will soon no longer be loaded."""

    name: str
    version: int
    state: State
    reason: str = ""
    """Why it failed, one sentence; may name files of the server."""


@dataclass
class _Loaded:
    """The ready versions of one policy; there is always a current one."""

    ready: dict[str, Lane]
    current: Lane


class Registry:
    """The one owner of what is loaded: every version's state, and the lanes by name and version.

    Belongs to one event loop. Every change is one step of it, so a request sees the old or the new, never
    neither. `find` and `Lane.submit` belong into one step too: after an `await` in between, the lane may be
    draining.
    """

    def __init__(
        self,
        lanes: Iterable[Lane] = (),
        observer: Observer | None = None,
        canaries: Iterable[Canary] = (),
    ) -> None:
        self._observer = observer
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
        """The lanes that take no more requests and still have some to answer."""
        return list(self._draining)

    @property
    def names(self) -> list[str]:
        """Names of the policies with a version that is ready."""
        return sorted(self._policies)

    def ready(self, name: str) -> set[int]:
        """The versions of a policy that take requests."""
        return set(map(int, self._policies[name].ready)) if name in self._policies else set()

    def current(self, name: str) -> int | None:
        """The version that answers requests without one; None if none is ready."""
        lane = self.current_lane(name)
        return None if lane is None else int(lane.spec.version)

    def current_lane(self, name: str) -> Lane | None:
        """The lane of that version."""
        return self._policies[name].current if name in self._policies else None

    def failure(self, name: str, version: int) -> str:
        """Why a version did not load, when it was last tried; empty if it was not, or did."""
        trouble = self._troubles.get((name, version))
        return trouble.reason if trouble and trouble.state is State.FAILED else ""

    def index(self) -> list[VersionStatus]:
        """Every version that there is something to say about, by name and version.

        A ready version whose reload failed says so as its reason. A version that drains may be ready or loading
        again, and is then there twice.
        """
        found = [VersionStatus(*_key(lane), State.READY, self.failure(*_key(lane))) for lane in self.lanes]
        ready = {(status.name, status.version) for status in found}
        found += [VersionStatus(*_key(lane), State.DRAINING) for lane in self._draining]
        found += [status for key, status in self._troubles.items() if key not in ready]
        return sorted(found, key=lambda status: (status.name, status.version))

    def find(
        self, name: str, version: str, *, client_id: str = "", seed: int | None = None, fixed: bool = False
    ) -> Lane:
        """The lane that a request goes to.

        Args:
            name: may be empty if exactly one policy is loaded.
            version: a number, or empty for the current one or, by lot, a canary.
            client_id: who asks; decides the lot.
            seed: the first seed of the request; decides the lot where nobody in particular asks.
            fixed: the request wants a fixed result (deterministic, or noise of its own): without a client_id it
                goes to the current version.

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
        """Let a lane take requests; returns the one whose place it takes, which is draining then.

        Its batcher is started after this, before any request. A policy's first version becomes current.
        """
        name, version = lane.spec.name, lane.spec.version
        if self._observer is not None:
            lane.observe(self._observer)
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
        """Let a version that is ready answer the requests without one."""
        loaded = self._policies[name]
        loaded.current = loaded.ready[str(version)]

    def withdraw(self, name: str, version: int) -> Lane:
        """Let a version take no more requests; not the current one, unless it is the last."""
        loaded = self._policies[name]
        lane = loaded.ready.pop(str(version))
        if not loaded.ready:
            del self._policies[name]
        else:
            assert loaded.current is not lane, "another version is made current first"
        self._drain(lane)
        return lane

    def drained(self, lane: Lane) -> None:
        """Forget a lane that has answered all it had."""
        self._draining.remove(lane)

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
        # Without a name there is one policy at most, which is the one that is meant.
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


def load_lane(
    repository: Path,
    selection: Selection,
    *,
    limits: BatchLimits,
    backend: str = "auto",
    threads: int = 1,
    cache_dir: Path | None = None,
    turns: AbstractContextManager[object] | None = None,
) -> Lane:
    """Load, verify, warm up and probe one version of a policy.

    Raises:
        MissingExtraError: the backend is not installed.
        BundleError: missing, damaged, or a bundle that belongs at another place of the repository.
    """
    name = selection.name
    versions = list_versions(repository / name)
    if not versions:
        found = ", ".join(list_policies(repository)) or "no policies"
        raise BundleError(
            f"wanted policy {name!r} in {str(repository)!r}, got {found}; check --policy and --repo"
        )
    version = selection.version or versions[-1]
    if version not in versions:
        found = ", ".join(map(str, versions))
        raise BundleError(f"wanted version {version} of policy {name!r}, got {found}; check --policy")
    bundle = load_bundle(repository / name / str(version))
    if (bundle.spec.name, bundle.spec.version) != (name, str(version)):
        raise BundleError(
            f"wanted policy {name!r} version {version} at {bundle.path}, got policy.json of "
            f"{bundle.spec.name!r} version {bundle.spec.version}; "
            "move the bundle to its own place or export it again"
        )
    policy = run_bundle(
        bundle,
        backend,
        threads=threads,
        max_batch_size=limits.max_batch_size,
        cache_dir=cache_dir,
        warm_up_rows=warm_up_sizes(limits.max_batch_size),
    )
    return Lane(policy, limits, turns)


def warm_up_sizes(max_batch_size: int) -> list[int]:
    """The powers of two below a batch size, and itself.

    A runtime with graphs for fixed batch sizes then has made them all before the first request.
    """
    return [*(1 << power for power in range((max_batch_size - 1).bit_length())), max_batch_size]
