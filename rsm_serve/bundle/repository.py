"""What a repository holds at one moment, and which of it a server is to serve: reading, and pure decisions.

The current version of a policy is the one that its CURRENT file names, or, without the file, its newest
complete one. A version is complete when its manifest is there: rsm-export publishes by renaming a finished
directory. CURRENT must be replaced atomically (write a file beside it, rename it over).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rsm_common.errors import BundleError
from rsm_common.file_stamp import FileStamp, file_stamp
from rsm_serve.bundle.contract import (
    MANIFEST_FILE,
    PAYLOAD_FILES,
    check_policy_name,
    list_versions,
    read_pointer,
)

Stamp = tuple[FileStamp, ...]
"""What changes when a version's files do."""


@dataclass(frozen=True)
class Found:
    """One policy of a repository."""

    versions: tuple[int, ...]
    """The complete ones, ascending."""
    pointer: int | None = None
    """What CURRENT names, whether it is there or not; None without the file."""
    problem: str = ""
    """Why CURRENT cannot be followed; then `pointer` is None."""


@dataclass(frozen=True)
class Survey:
    """A whole repository."""

    policies: Mapping[str, Found]
    stamps: Mapping[tuple[str, int], Stamp]
    """Of the versions that were asked for."""


@dataclass
class Wishes:
    """What the operator wants loaded, beside what the repository says."""

    follow: set[str] | None = None
    """Policies whose current version is loaded; None: of all in the repository."""
    pinned: dict[str, set[int]] = field(default_factory=dict)
    """Versions that stay loaded for requests that name them, by policy."""
    canaries: dict[str, set[int]] = field(default_factory=dict)
    unloaded: set[str] = field(default_factory=set)
    """Policies that are not to be loaded, although the repository has them."""

    def follows(self, name: str) -> bool:
        """Whether the repository decides which version of the policy is loaded."""
        return name not in self.unloaded and (self.follow is None or name in self.follow)

    def fixed(self, name: str) -> set[int]:
        """Versions of the policy that stay loaded whatever the repository says."""
        return set() if name in self.unloaded else self.pinned.get(name, set()) | self.canaries.get(name, set())

    def names(self) -> set[str]:
        """Policies that the operator named."""
        return {*(self.follow or ()), *self.pinned, *self.canaries}

    def current(self, name: str, found: Found | None) -> int | None:
        """The version that is to answer requests without one; None if nobody can say.

        A canary becomes current only by CURRENT, or where there is nothing else: it would be the newest as soon
        as it appears.
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
    """What a repository holds of one policy; None if it has no version, not even half of one."""
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
        return Found(versions, read_pointer(policy_dir))
    except BundleError as error:
        return Found(versions, problem=str(error))


def _is_name(text: str) -> bool:
    try:
        check_policy_name(text)
    except BundleError:
        return False
    return True


def stamp(version_dir: Path) -> Stamp:
    """See `Stamp`."""
    return tuple(file_stamp(version_dir / name) for name in (MANIFEST_FILE, *PAYLOAD_FILES))
