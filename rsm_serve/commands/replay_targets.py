"""Who answers recorded requests again: a server, or bundles in this process."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rsm_common.errors import BundleError, NotReadyError, PolicyNotFoundError, RequestError, UsageError
from rsm_common.policy import ActResult, Policy
from rsm_common.spec import PolicySpec
from rsm_serve.bundle.contract import SPEC_FILE, list_versions, parse_version
from rsm_serve.client import PolicyClient
from rsm_serve.client.target import Target
from rsm_serve.recording.format import Record


class Against(Protocol):
    """What answers this time."""

    @property
    def policy(self) -> str:
        """Whose records are asked; empty: everybody's."""
        ...

    def spec(self, record: Record) -> PolicySpec:
        """Of the policy that answers a record.

        Raises:
            PolicyNotFoundError, NotReadyError, BundleError: there is none.
        """
        ...

    def ask(self, record: Record) -> ActResult:
        """Answer a record that was answered then.

        Raises:
            RequestError: it cannot be answered now.
        """
        ...

    def close(self) -> None:
        """Release what is open."""
        ...


class Server:
    """A server; every record is asked of the version that answered it, unless the target names one.

    Args:
        target: whom to ask.
        connect: a client for (policy, version).
    """

    def __init__(self, target: Target, connect: Callable[[str, str], PolicyClient]) -> None:
        self.policy = target.policy
        self._version = target.version
        self._connect = connect
        self._clients: dict[tuple[str, str], PolicyClient | RequestError] = {}
        self._run, self._asked = secrets.token_hex(4), 0

    def spec(self, record: Record) -> PolicySpec:
        """See `Against`."""
        return self._client(record).spec

    def ask(self, record: Record) -> ActResult:
        """See `Against`."""
        assert record.obs is not None
        self._asked += 1
        client_id = f"replay-{self._run}-{self._asked}"
        client = self._client(record)
        return client.act(record.obs, seed=record.seeds, noise=record.noise, client_id=client_id)

    def close(self) -> None:
        """See `Against`."""
        for client in self._clients.values():
            if isinstance(client, PolicyClient):
                client.close()

    def _client(self, record: Record) -> PolicyClient:
        key = (self.policy or record.policy, self._version or record.version)
        if key not in self._clients:
            try:
                self._clients[key] = self._connect(*key)
            except (PolicyNotFoundError, NotReadyError) as error:
                self._clients[key] = error
        client = self._clients[key]
        if isinstance(client, RequestError):
            raise client
        return client


class Bundles:
    """Bundles in this process: one version, or of a policy's directory the version that answered.

    Args:
        path: a version directory, a policy directory, or a model.onnx.
        version: to take of a policy directory; empty: each record's own.
    """

    def __init__(self, path: Path, version: str = "") -> None:
        if version and parse_version(version) is None:
            raise UsageError(f"wanted the number of a version such as 3 as --version, got {version!r:.60}")
        self._path = path
        versions = list_versions(path)
        self._many = bool(versions)
        self._version = version
        self._opened: dict[str, Any] = {}
        self.policy = _name_of(path, versions) if versions else self._open("").spec.name
        if version and not self._many and self._open("").spec.version != version:
            raise UsageError(
                f"wanted version {version}, got the bundle {str(path)!r} of version "
                f"{self._open('').spec.version}; leave --version out, or name the policy's directory"
            )

    def spec(self, record: Record) -> PolicySpec:
        """See `Against`."""
        return self._find(record).spec

    def ask(self, record: Record) -> ActResult:
        """See `Against`."""
        assert record.obs is not None
        return self._find(record).act(record.obs, seed=record.seeds, noise=record.noise)

    def close(self) -> None:
        """See `Against`."""
        for policy in self._opened.values():
            if not isinstance(policy, BundleError):
                policy.close()

    def _find(self, record: Record) -> Policy:
        return self._open((self._version or record.version) if self._many else "")

    def _open(self, version: str) -> Policy:
        from rsm_serve.local import open_policy

        if version not in self._opened:
            if version and not (version.isascii() and version.isdecimal()):  # of a file: it must not be a path
                raise BundleError(f"wanted a number as version, got {version!r:.60}; the record is not ours")
            try:
                self._opened[version] = open_policy(self._path / version)
            except BundleError as error:
                if not version:
                    raise
                self._opened[version] = error
        if isinstance(self._opened[version], BundleError):
            raise self._opened[version]
        policy: Policy = self._opened[version]
        return policy


def _name_of(policy_dir: Path, versions: Sequence[int]) -> str:
    """A policy's name as any of its versions says it, which a link to its directory need not."""
    for number in versions:
        try:
            return PolicySpec.from_json((policy_dir / str(number) / SPEC_FILE).read_bytes()).name
        except (OSError, BundleError):  # told when it is asked
            continue
    return policy_dir.absolute().name
