"""The content of a repository at one moment, and the versions of it that a server should load.

The current version of a policy is the one that its CURRENT file names. Without the file it is the newest
complete version. A version is complete when its manifest is there: rsm-export publishes by renaming a finished
directory. CURRENT must be replaced atomically (write a file beside it, rename it over).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rsm_common.errors import BundleError
from rsm_common.file_stamp import FileStamp, file_stamp
from rsm_common.manifest import MANIFEST_FILE
from rsm_serve.bundle.contract import PAYLOAD_FILES, check_policy_name, list_versions, read_current

Stamp = tuple[FileStamp, ...]
"""Stamps of the files of a version; they change when a file changes."""


@dataclass(frozen=True)
class Found:
    """One policy of a repository."""

    versions: tuple[int, ...]
    """The complete versions, ascending."""
    pointer: int | None = None
    """The version that CURRENT names, which may be missing; None without the file."""
    problem: str = ""
    """Why CURRENT cannot be followed; then `pointer` is None."""


@dataclass(frozen=True)
class Survey:
    """The content of a whole repository."""

    policies: Mapping[str, Found]
    stamps: Mapping[tuple[str, int], Stamp]
    """Of the versions that were asked for."""


@dataclass
class Wishes:
    """The versions that the operator wants loaded, by options and by requests."""

    follow: set[str] | None = None
    """Policies whose current version is loaded; None: all in the repository."""
    pinned: dict[str, set[int]] = field(default_factory=dict)
    """Versions that stay loaded for requests that name them, by policy."""
    canaries: dict[str, set[int]] = field(default_factory=dict)
    unloaded: set[str] = field(default_factory=set)
    """Policies that are not to be loaded, although the repository has them."""

    def follows(self, name: str) -> bool:
        """Whether the repository decides which version of the policy is loaded."""
        return name not in self.unloaded and (self.follow is None or name in self.follow)

    def fixed(self, name: str) -> set[int]:
        """Return the versions of the policy that stay loaded independent of the repository."""
        return set() if name in self.unloaded else self.pinned.get(name, set()) | self.canaries.get(name, set())

    def names(self) -> set[str]:
        """Return the policies that the operator named."""
        return {*(self.follow or ()), *self.pinned, *self.canaries}

    def current(self, name: str, found: Found | None) -> int | None:
        """Return the version that should answer requests without a version; None if it cannot be decided.

        A canary becomes current only if CURRENT names it or there is no other version. Otherwise each new
        canary would become current, because it is the newest version.
        """
        if found is None or found.problem or name in self.unloaded:
            return None
        versions = set(found.versions) if self.follows(name) else self.fixed(name)
        if found.pointer is not None and (self.follows(name) or found.pointer in versions):
            return found.pointer
        return max(versions - self.canaries.get(name, set()) or versions, default=None)


def survey(repository: Path, asked: Iterable[tuple[str, int]] = ()) -> Survey:
    """Read names, versions and pointers; and the stamps of the versions asked for.

    Raises:
        BundleError: the repository cannot be read.
    """
    try:
        names = sorted(entry.name for entry in repository.iterdir() if _is_name(entry.name))
    except OSError as error:
        raise BundleError(
            f"wanted to read the repository {str(repository)!r}, got: {error}; check its permissions"
        ) from None
    looks = {name: look_at(repository / name) for name in names}
    policies = {name: found for name, found in looks.items() if found is not None}
    return Survey(policies, {(name, number): stamp(repository / name / str(number)) for name, number in asked})


def look_at(policy_dir: Path) -> Found | None:
    """Read the versions of one policy; None if there is no version, not even an incomplete one."""
    try:
        numbers = list_versions(policy_dir)
        versions = tuple(number for number in numbers if (policy_dir / str(number) / MANIFEST_FILE).is_file())
    except BundleError as error:
        return Found((), problem=str(error))
    except OSError as error:
        return Found((), problem=f"cannot read {policy_dir}: {error.strerror}; check its permissions")
    if not numbers:
        return None
    try:
        return Found(versions, read_current(policy_dir))
    except BundleError as error:
        return Found(versions, problem=str(error))


def _is_name(text: str) -> bool:
    try:
        check_policy_name(text)
    except BundleError:
        return False
    return True


def stamp(version_dir: Path) -> Stamp:
    """Return the stamps of a version's files."""
    return tuple(file_stamp(version_dir / name) for name in (MANIFEST_FILE, *PAYLOAD_FILES))
