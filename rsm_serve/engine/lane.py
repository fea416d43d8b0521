"""One loaded version of a policy, with the queue in front of it."""

from __future__ import annotations

import asyncio
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
from rsm_serve.observe.counts import LaneCounts
from rsm_serve.observe.settled import Answered


@dataclass(frozen=True)
class Selection:
    """A version of a policy to load; `version` None means the newest."""

    name: str
    version: int | None = None

    @classmethod
    def parse(cls, text: str) -> Selection:
        """Parse NAME or NAME:VERSION.

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
    """One loaded version of one policy, the queue in front of it, and its counts."""

    def __init__(
        self, policy: LocalPolicy, limits: BatchLimits, turns: AbstractContextManager[object] | None = None
    ) -> None:
        self.spec: PolicySpec = policy.spec
        self.runtime = policy.runtime
        self.spec_json = policy.spec.to_json()
        self._policy = policy
        self.limits = limits
        self.batcher: Batcher[ActRows, ActResult] = Batcher(
            policy.act_batch,
            limits,
            name=f"{policy.spec.name}:{policy.spec.version}",
            turns=turns,
            computed=self._computed,
        )
        self.counts = LaneCounts(
            self.spec.name, self.spec.version, self.runtime, lambda: self.batcher.queued_rows
        )

    def sample(
        self, rows: ActRows, timeout_s: float | None, *, priority: int = 0, client_id: str = ""
    ) -> asyncio.Future[Answered[ActResult]]:
        """Queue a validated request; return the future of its actions, as `Batcher.put`."""
        prepared = self._policy.prepare(rows)
        return self.batcher.put(prepared, len(rows.obs_BO), timeout_s, priority=priority, client_id=client_id)

    @property
    def probe_obs(self) -> NDArray[np.float32]:
        """The bundle's recorded observations [P, O]; without rows for a bare graph."""
        return self._policy.probe_obs

    def close(self) -> None:
        """Release the policy's session, once the batcher is drained; slow, may be called in any thread."""
        self._policy.close()

    def _computed(self, rows: int, seconds: float, answers: Sequence[ActResult | RequestError] | None) -> None:
        if answers is None:
            self.counts.execution_failed()
        else:
            unsound = sum(isinstance(answer, BackendError) for answer in answers)
            self.counts.executed(rows, seconds, unsound)


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
        BundleError: the bundle is missing or damaged, or its policy.json has another name or version.
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
        raise BundleError(f"wanted version {version} of policy {name!r}, got {found}; choose one of these")
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
        warm_up_all=True,
    )
    return Lane(policy, limits, turns)
