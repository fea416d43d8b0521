"""What a loadable bundle is: the contract between the exporter and everything that runs a policy.

    <repository>/<policy name>/
        config.pbtxt        for Triton and KServe; not read here
        <version>/          1, 2, ...
            model.onnx      the unrolled chain
            policy.json     PolicySpec
            probe.npz       observations, noise and expected actions, replayed at load
            manifest.json   sha256 and size of each of the three

Nothing is ever unpickled. A file is read once, and the bytes that were verified are the bytes that run.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsm_serve.errors import BundleError
from rsm_serve.policy import PolicySpec

MODEL_FILE = "model.onnx"
SPEC_FILE = "policy.json"
PROBE_FILE = "probe.npz"
MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "config.pbtxt"
PAYLOAD_FILES = (MODEL_FILE, SPEC_FILE, PROBE_FILE)
MANIFEST_SCHEMA_VERSION = 1

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Probe:
    """Recorded inputs and outputs that a loaded graph must reproduce; P rows, all float32."""

    obs: NDArray[np.float32]
    """[P, O]"""
    noise: NDArray[np.float32]
    """[P, T, N, A]"""
    action: NDArray[np.float32]
    """[P, A]"""

    def to_bytes(self) -> bytes:
        """The content of probe.npz."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, obs=self.obs, noise=self.noise, action=self.action)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, spec: PolicySpec) -> Probe:
        """Parse probe.npz and check it against the specification.

        Raises:
            BundleError: not an npz file of plain arrays, or shapes or dtypes that are not the policy's.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                probe = cls(**{key: arrays[key] for key in ("obs", "noise", "action")})
        except (ValueError, TypeError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise BundleError(
                f"{PROBE_FILE} must be an npz file of the plain arrays obs, noise and action ({error}); "
                "export the policy again"
            ) from None
        rows = len(probe.obs) if probe.obs.ndim else 0
        wanted = {
            "obs": (rows, spec.observation.size),
            "noise": (rows, *spec.noise_shape),
            "action": (rows, spec.action.size),
        }
        for key, shape in wanted.items():
            array = getattr(probe, key)
            if array.dtype != np.float32 or array.shape != shape or rows == 0:
                raise BundleError(
                    f"{PROBE_FILE}: wanted {key} as float32 {list(shape)}, "
                    f"got {array.dtype} {list(array.shape)}; export the policy again"
                )
        return probe


@dataclass(frozen=True)
class Bundle:
    """One verified version of one policy, in memory."""

    path: Path
    spec: PolicySpec
    model: bytes
    """The ONNX graph."""
    probe: Probe


def check_policy_name(name: str) -> str:
    """Return the name if it is safe as a directory name.

    Raises:
        BundleError: anything else, such as a path.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise BundleError(
            f"wanted a policy name of letters, digits, '.', '_' and '-' that starts with a letter or digit and "
            f"has no '..', got {name!r}; choose one, for example with rsm-export --name"
        )
    return name


def list_versions(policy_dir: Path) -> list[int]:
    """The version numbers below a policy directory, ascending; empty if there are none."""
    if not policy_dir.is_dir():
        return []
    found = (entry.name for entry in policy_dir.iterdir() if entry.is_dir())
    return sorted(int(name) for name in found if _VERSION.fullmatch(name))


def list_policies(repository: Path) -> list[str]:
    """The names of the policies in a repository that have at least one version, sorted.

    Raises:
        BundleError: the repository is not a directory.
    """
    if not repository.is_dir():
        raise BundleError(
            f"wanted a repository of bundles, got {str(repository)!r}, which is not a directory; "
            "create one with rsm-export --repo"
        )
    entries = (entry.name for entry in repository.iterdir() if _NAME.fullmatch(entry.name))
    return sorted(name for name in entries if list_versions(repository / name))


def find_bundle(path: Path) -> Path:
    """The version directory that a path means: itself, or the newest version below a policy directory.

    Raises:
        BundleError: there is no bundle at the path.
    """
    if (path / MANIFEST_FILE).is_file():
        return path
    versions = list_versions(path)
    if versions:
        return path / str(versions[-1])
    found = "no such directory" if not path.is_dir() else f"a directory without {MANIFEST_FILE} or versions"
    raise BundleError(
        f"wanted a bundle at {str(path)!r}, got {found}; create one with rsm-export RUN --repo DIR"
    )


def load_bundle(path: str | Path) -> Bundle:
    """Read and verify a bundle.

    Args:
        path: a version directory, or a policy directory, which means its newest version.

    Raises:
        BundleError: a file is missing, or its size or hash is not the manifest's, or its content is not
            what the contract says.
    """
    version_dir = find_bundle(Path(path))
    manifest = _read_manifest(version_dir)
    content = {name: _read_verified(version_dir / name, manifest[name]) for name in PAYLOAD_FILES}
    try:
        spec = PolicySpec.from_json(content[SPEC_FILE])
        probe = Probe.from_bytes(content[PROBE_FILE], spec)
    except BundleError as error:
        raise BundleError(f"bundle {version_dir}: {error}") from None
    return Bundle(version_dir, spec, content[MODEL_FILE], probe)


def file_record(content: bytes) -> dict[str, str | int]:
    """What the manifest records of a file."""
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def manifest_json(content: dict[str, bytes]) -> bytes:
    """The content of manifest.json for the given files."""
    files = {name: file_record(data) for name, data in content.items()}
    return (json.dumps({"schema_version": MANIFEST_SCHEMA_VERSION, "files": files}, indent=2) + "\n").encode()


def _read_manifest(version_dir: Path) -> dict[str, dict[str, str | int]]:
    path = version_dir / MANIFEST_FILE
    try:
        data = json.loads(path.read_bytes())
        files = dict(data["files"])
        version = data["schema_version"]
    except FileNotFoundError:
        raise BundleError(f"bundle {version_dir}: {MANIFEST_FILE} is missing; copy the whole bundle") from None
    except OSError as error:
        raise BundleError(
            f"bundle {version_dir}: cannot read {MANIFEST_FILE} ({error.strerror}); check its permissions"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"bundle {version_dir}: {MANIFEST_FILE} is damaged ({error}); copy or export the bundle again"
        ) from None
    if version != MANIFEST_SCHEMA_VERSION:
        raise BundleError(
            f"bundle {version_dir}: wanted manifest schema version {MANIFEST_SCHEMA_VERSION}, got {version}; "
            "export the policy again with this version of rsm-toolkit"
        )
    if set(files) != set(PAYLOAD_FILES) or not all(isinstance(record, dict) for record in files.values()):
        raise BundleError(
            f"bundle {version_dir}: {MANIFEST_FILE} must list size and sha256 of {', '.join(PAYLOAD_FILES)}, "
            f"got {', '.join(sorted(files)) or 'nothing'}; export the policy again"
        )
    return files


def _read_verified(path: Path, record: dict[str, str | int]) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"bundle {path.parent}: cannot read {path.name} ({error.strerror}); copy the whole bundle"
        ) from None
    if len(content) != record.get("size"):
        raise BundleError(
            f"bundle {path.parent}: wanted {path.name} of {record.get('size')} bytes, got {len(content)}; "
            "the file is truncated or changed, copy the bundle again"
        )
    if file_record(content) != record:
        raise BundleError(
            f"bundle {path.parent}: the sha256 of {path.name} is not the manifest's; "
            "the file is damaged or changed, copy the bundle again"
        )
    return content
