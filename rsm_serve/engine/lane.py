"""One loaded version of a policy, with the queue in front of it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import BackendError, BundleError, RequestError
from rsm_common.policy import ActResult, ActRows
from rsm_common.spec import PolicySpec
from rsm_serve.bundle.contract import check_policy_name, list_policies, list_versions, load_bundle
from rsm_serve.engine.batcher import Batcher
from rsm_serve.engine.queue import BatchLimits
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
