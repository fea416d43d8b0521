"""Writing bundles: the layout that `rsm_serve.bundle` reads, complete or absent."""

from __future__ import annotations

import errno
import shutil
import tempfile
import time
from pathlib import Path

from rsm_common import atomic
from rsm_common.errors import BundleError
from rsm_common.manifest import MANIFEST_FILE, manifest_json
from rsm_common.spec import PolicySpec
from rsm_export.bundles.triton_config import triton_config
from rsm_serve.bundle.contract import CONFIG_FILE, MODEL_FILE, SPEC_FILE, check_policy_name, list_versions
from rsm_serve.bundle.probe import PROBE_FILE, Probe


def next_version(repository: Path, name: str) -> int:
    """The version number that the next bundle of a policy gets, from 1.

    Raises:
        BundleError: the name is not safe as a directory name.
    """
    versions = list_versions(repository / check_policy_name(name))
    return versions[-1] + 1 if versions else 1


def write_bundle(repository: Path, spec: PolicySpec, model: bytes, probe: Probe) -> Path:
    """Write one version of a policy and return its directory: all of it, or nothing.

    Raises:
        BundleError: the version exists already, or the repository cannot be written.
    """
    policy_dir = repository / check_policy_name(spec.name)
    payload = {MODEL_FILE: model, SPEC_FILE: spec.to_json().encode(), PROBE_FILE: probe.to_bytes()}
    version_dir = policy_dir / spec.version
    try:
        with atomic.new_directory(version_dir) as directory:
            for name, content in (payload | {MANIFEST_FILE: manifest_json(payload)}).items():
                (directory / name).write_bytes(content)
                (directory / name).chmod(0o644)  # the server may be another user
    except FileExistsError:
        raise BundleError(
            f"version {spec.version} of policy {spec.name!r} exists already in {str(repository)!r}; "
            "another export is running, try again"
        ) from None
    except OSError as error:
        raise _unwritable(repository, error) from None
    try:
        _publish_config(policy_dir, spec)
    except OSError as error:
        raise _unwritable(repository, error) from None
    return version_dir


def _unwritable(repository: Path, error: OSError) -> BundleError:
    remedy = {
        errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
        errno.ENOSPC: "make room, or choose a --repo on another disk",
    }.get(error.errno or 0, "choose another --repo")
    return BundleError(f"cannot write a bundle to {str(repository)!r}: {error.strerror}; {remedy}")


def _publish_config(policy_dir: Path, spec: PolicySpec) -> None:
    """Let Triton see a version that is complete.

    The order matters: config.pbtxt names the version that it describes, so a process that is killed before
    this leaves the previous version and its description, which agree. If it fails, the version, which nobody
    was told of, goes again.
    """
    if list_versions(policy_dir)[-1] != int(spec.version):
        return  # a newer export was faster, and its config.pbtxt must not be turned back
    path, text = policy_dir / CONFIG_FILE, triton_config(spec).encode()
    try:
        atomic.write_file(path, text)
    except BaseException:
        if not path.is_file() or path.read_bytes() != text:
            _withdraw(policy_dir / spec.version)
        raise


def _withdraw(version_dir: Path) -> None:
    # Out of sight first: half a version must not look like one.
    hidden = tempfile.mkdtemp(dir=version_dir.parent, prefix=f".{version_dir.name}.")
    shutil.rmtree(version_dir.rename(hidden), ignore_errors=True)


def write_time() -> str:
    """The present time in UTC, as provenance records it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
