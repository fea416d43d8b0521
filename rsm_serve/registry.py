"""The policies that a server has loaded: one lane (policy, batcher, worker thread) per version."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsm_serve.batcher import Answered, Batcher, BatchLimits
from rsm_serve.bundle import check_policy_name, list_policies, list_versions, load_bundle
from rsm_serve.errors import BackendError, BundleError, PolicyNotFoundError, RequestError
from rsm_serve.local import LocalPolicy, run_bundle
from rsm_serve.observer import LaneObserver, Observer
from rsm_serve.policy import ActResult, ActRows, PolicySpec
from rsm_serve.statistics import LaneStatistics


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


class Lane:
    """One loaded version of one policy, and the queue in front of it."""

    def __init__(self, policy: LocalPolicy, limits: BatchLimits) -> None:
        self.spec: PolicySpec = policy.spec
        self.runtime = policy.runtime
        self.spec_json = policy.spec.to_json()
        self._policy = policy
        self.limits = limits
        self.statistics = LaneStatistics()
        self.observer: LaneObserver | None = None
        self.batcher: Batcher[ActRows, ActResult] = Batcher(
            self._act_batch, limits, name=f"{policy.spec.name}:{policy.spec.version}"
        )

    def submit(self, rows: ActRows, timeout_s: float | None) -> asyncio.Future[Answered[ActResult]]:
        """Queue a validated request; see `Batcher.submit`."""
        arrived_s = time.perf_counter()
        try:
            future = self.batcher.submit(rows, len(rows.obs_BO), timeout_s)
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
        """Release the policy's session, once the batcher is drained."""
        self._policy.close()
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


class Registry:
    """Finds lanes by name and version."""

    def __init__(self, lanes: Iterable[Lane], observer: Observer | None = None) -> None:
        self._lanes: dict[str, dict[str, Lane]] = {}
        for lane in lanes:
            if observer is not None:
                lane.observe(observer)
            self._lanes.setdefault(lane.spec.name, {})[lane.spec.version] = lane

    @property
    def lanes(self) -> list[Lane]:
        """All lanes, by name and version."""
        return [
            versions[version]
            for _, versions in sorted(self._lanes.items())
            for version in sorted(versions, key=int)
        ]

    @property
    def names(self) -> list[str]:
        """Names of the loaded policies."""
        return sorted(self._lanes)

    def find(self, name: str, version: str) -> Lane:
        """The lane of a policy.

        Args:
            name: may be empty if exactly one policy is loaded.
            version: a number, or empty for the newest that is loaded.

        Raises:
            PolicyNotFoundError: no such policy or version, or an empty name with several policies.
        """
        if not name and len(self._lanes) == 1:
            versions: Mapping[str, Lane] = next(iter(self._lanes.values()))
        elif name in self._lanes:
            versions = self._lanes[name]
        else:
            wanted = f"policy {name!r}" if name else "a policy name, because several are loaded"
            raise PolicyNotFoundError(
                f"wanted {wanted}, this server has {', '.join(self.names)}; name one of them"
            )
        lane = versions.get(version or max(versions, key=int))
        if lane is None:
            raise PolicyNotFoundError(
                f"wanted version {version!r} of policy {name or self.names[0]!r}, this server has "
                f"{', '.join(sorted(versions, key=int))}; leave the version out for the newest"
            )
        return lane


def select_all(repository: Path) -> list[Selection]:
    """The newest version of every policy in the repository.

    Raises:
        BundleError: there is none.
    """
    names = list_policies(repository)
    if not names:
        raise BundleError(
            f"wanted a repository with at least one policy, got {str(repository)!r} without any; "
            "create one with rsm-export RUN --repo DIR"
        )
    return [Selection(name) for name in names]


def load_lane(
    repository: Path,
    selection: Selection,
    *,
    limits: BatchLimits,
    backend: str = "auto",
    threads: int = 1,
    cache_dir: Path | None = None,
) -> Lane:
    """Load, verify, warm up and probe one policy.

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
    return Lane(policy, limits)


def warm_up_sizes(max_batch_size: int) -> list[int]:
    """The powers of two below a batch size, and itself.

    A runtime with graphs for fixed batch sizes then has made them all before the first request.
    """
    return [*(1 << power for power in range((max_batch_size - 1).bit_length())), max_batch_size]
