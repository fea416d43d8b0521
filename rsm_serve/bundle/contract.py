"""The format of a bundle: the contract between the exporter and the programs that run a policy.

    <repository>/<policy name>/
        config.pbtxt        for Triton and KServe; not read here
        CURRENT             may be absent: the number of the version to serve, as text; see `repository`
        <version>/          1, 2, ...
            model.onnx      the unrolled chain
            policy.json     PolicySpec
            probe.npz       observations, noise and expected actions, replayed at load
            manifest.json   sha256 and size of each of the three

No file is unpickled. Each file is read once, and the verified bytes are the bytes that run. Links to files are
followed, because volumes are mounted through links; the file behind a link must have the manifest's hash.

The graph repeats policy.json in its metadata, so that a model.onnx without the other files can be run.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shlex
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from rsm_common.errors import BundleError
from rsm_common.manifest import MANIFEST_FILE, MANIFEST_SCHEMA_VERSION, FileRecord, file_record
from rsm_common.spec import PolicySpec
from rsm_serve.bundle.onnx_file import POLICY_KEY, check_self_contained, read_metadata
from rsm_serve.bundle.probe import PROBE_FILE, Probe

logger = logging.getLogger(__name__)

MODEL_FILE = "model.onnx"
SPEC_FILE = "policy.json"
CONFIG_FILE = "config.pbtxt"
CURRENT_FILE = "CURRENT"
MAX_POINTER_BYTES = 64
PAYLOAD_FILES = (MODEL_FILE, SPEC_FILE, PROBE_FILE)
MODEL_SUFFIX = ".onnx"

MAX_JSON_BYTES = 2**24
"""Of policy.json and of manifest.json."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Bundle:
    """One verified version of one policy, in memory."""

    path: Path
    spec: PolicySpec
    model: bytes
    """The ONNX graph."""
    probe: Probe
    """Without rows for a graph without a bundle."""


def check_policy_name(name: str) -> str:
    """Return the name if it is safe as a directory name.

    Raises:
        BundleError: it is not, for example because it is a path.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise BundleError(
            f"wanted a policy name of letters, digits, '.', '_' and '-' that starts with a letter or digit and "
            f"has no '..', got {name!r:.80}; choose one, for example with rsm-export --name"
        )
    return name


def parse_version(text: str) -> int | None:
    """Return the number of a version's directory; None if the text is not one."""
    return int(text) if _VERSION.fullmatch(text) else None


def list_versions(policy_dir: Path) -> list[int]:
    """Return the version numbers below a policy directory, ascending; empty if there are none.

    Raises:
        BundleError: it may not be read.
    """
    try:
        if not policy_dir.is_dir():
            return []
        found = [entry.name for entry in policy_dir.iterdir() if entry.is_dir()]
    except OSError as error:
        raise _unreadable(policy_dir, error) from None
    return sorted(int(name) for name in found if _VERSION.fullmatch(name))


def list_policies(repository: Path) -> list[str]:
    """Return the names of the policies that have at least one version or cannot be read; sorted.

    Raises:
        BundleError: the repository is not a directory, or may not be read.
    """
    try:
        if not repository.is_dir():
            raise BundleError(
                f"wanted a repository of bundles, got {str(repository)!r}, which is not a directory; "
                "create one with rsm-export --repo"
            )
        names = [entry.name for entry in repository.iterdir() if _NAME.fullmatch(entry.name)]
    except OSError as error:
        raise _unreadable(repository, error) from None
    return sorted(name for name in names if _may_have_versions(repository / name))


def _may_have_versions(policy_dir: Path) -> bool:
    try:
        return bool(list_versions(policy_dir))
    except BundleError:  # one policy must not hide the others; loading it gives the reason
        return True


def _unreadable(path: Path, error: OSError) -> BundleError:
    return BundleError(f"cannot read {path}: {error.strerror or error}; check its permissions")


def _is_file(path: Path) -> bool:
    """True for a regular file; False if stat fails, because a later read reports the error."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_current(policy_dir: Path) -> int | None:
    """Return the version that CURRENT names, which may be missing; None without the file.

    Raises:
        BundleError: it cannot be read, or names none.
    """
    path = policy_dir / CURRENT_FILE
    try:
        if not (path.is_symlink() or path.exists()):
            return None
        if path.exists() and not path.is_file():  # reading a pipe would wait
            raise BundleError(f"wanted a file at {path}, got something else; make it one")
        with path.open("rb") as file:
            text = file.read(MAX_POINTER_BYTES + 1).decode("utf-8", "replace").strip()
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}; check what it is") from None
    number = parse_version(text)
    if number is None:
        raise BundleError(
            f"wanted the number of a version in {path}, got {text!r:.40}; "
            "write it to a file beside it and rename that over it"
        )
    return number


def find_bundle(path: Path) -> Path:
    """Return the version directory of a path: the path itself, or the current version below a policy directory.

    The current version is the one that a server serves: the one that CURRENT names, or the newest without
    CURRENT.

    Raises:
        BundleError: there is no bundle at the path, it cannot be read, or CURRENT names a missing version.
    """
    if _is_file(path / MANIFEST_FILE):
        return path
    versions = list_versions(path)
    if versions:
        current = read_current(path) or versions[-1]
        if current not in versions:
            raise BundleError(
                f"wanted version {current} of {str(path)!r}, which {CURRENT_FILE} names, "
                f"got {', '.join(map(str, versions))}; name a version's directory, or correct {CURRENT_FILE}"
            )
        return path / str(current)
    found = "no such directory" if not path.is_dir() else f"a directory without {MANIFEST_FILE} or versions"
    raise BundleError(f"wanted a bundle at {str(path)!r}, got {found}; {_instead_of(path)}")


def _instead_of(path: Path) -> str:
    """What to do about a path that is no bundle."""
    policies = list_policies(path) if path.is_dir() else []
    if policies:
        return f"name a policy of this repository, such as {path / policies[0]}"
    versions = list_versions(path.parent) if _VERSION.fullmatch(path.name) else []
    if versions:
        return f"name one of the versions {', '.join(map(str, versions))}"
    return "create one with rsm-export RUN --repo DIR"


def load_bundle(path: str | Path) -> Bundle:
    """Read and verify a bundle.

    Args:
        path: a version directory; or a policy directory, which means its current version (see `find_bundle`);
            or a model.onnx without a bundle, which is used without verification, with a warning.

    Raises:
        BundleError: a file is missing, or its size or hash differs from the manifest, or its content is not
            what the contract says.
    """
    if _is_file(Path(path)):
        logger.warning(
            "%s is a bare graph: there is no manifest to verify it by and no probe to replay; "
            "make a bundle of it with rsm-export %s --repo DIR",
            path,
            shlex.quote(str(path)),
        )
        return load_graph(Path(path))
    version_dir = find_bundle(Path(path))
    manifest = read_manifest(version_dir)
    content = {name: _read_verified(version_dir / name, manifest[name]) for name in PAYLOAD_FILES}
    try:
        spec = PolicySpec.from_json(content[SPEC_FILE])
        check_policy_name(spec.name)
        if not _VERSION.fullmatch(spec.version):
            raise BundleError(
                f"wanted a version such as 1 in {SPEC_FILE}, got {spec.version!r:.60}; export the policy again"
            )
        check_self_contained(content[MODEL_FILE])
        probe = Probe.from_bytes(content[PROBE_FILE], spec)
    except BundleError as error:
        raise BundleError(f"bundle {version_dir}: {error}") from None
    return Bundle(version_dir, spec, content[MODEL_FILE], probe)


def load_graph(path: Path) -> Bundle:
    """Read a graph without a bundle, with the specification in its metadata; it has no probe.

    Raises:
        BundleError: it cannot be read, or is not a graph of rsm-export.
    """
    try:
        model = path.read_bytes()
        text = read_metadata(model).get(POLICY_KEY)
        if text is None:
            raise BundleError(
                f"wanted a graph of rsm-export, with {POLICY_KEY} in its metadata, got one without; "
                "export the policy again"
            )
        spec = PolicySpec.from_json(text)
        check_self_contained(model)
    except OSError as error:
        raise BundleError(f"cannot read {str(path)!r}: {error.strerror}; check its permissions") from None
    except BundleError as error:
        raise BundleError(f"graph {path}: {error}") from None
    return Bundle(path, spec, model, Probe.none(spec))


def read_manifest(version_dir: Path) -> dict[str, FileRecord]:
    """Return size and sha256 of the files of a bundle, by name, from its manifest.

    Raises:
        BundleError: the manifest is missing, damaged, or lists other files than a bundle has.
    """
    path = version_dir / MANIFEST_FILE
    try:
        data = json.loads(_read_file(path, MAX_JSON_BYTES))
        files = dict(data["files"])
        version = data["schema_version"]
    except FileNotFoundError:
        raise BundleError(f"bundle {version_dir}: {MANIFEST_FILE} is missing; copy the whole bundle") from None
    except OSError as error:
        raise BundleError(
            f"bundle {version_dir}: cannot read {MANIFEST_FILE} ({error.strerror}); check its permissions"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(
            f"bundle {version_dir}: {MANIFEST_FILE} is damaged ({error}); copy or export the bundle again"
        ) from None
    if type(version) is not int or version != MANIFEST_SCHEMA_VERSION:
        raise BundleError(
            f"bundle {version_dir}: wanted manifest schema version {MANIFEST_SCHEMA_VERSION}, "
            f"got {version!r:.60}; export the policy again with this version of rsm-toolkit"
        )
    if set(files) != set(PAYLOAD_FILES) or not all(isinstance(record, dict) for record in files.values()):
        raise BundleError(
            f"bundle {version_dir}: {MANIFEST_FILE} must list size and sha256 of {', '.join(PAYLOAD_FILES)}, "
            f"got {', '.join(sorted(files)) or 'nothing':.200}; export the policy again"
        )
    return files


def _regular_size(path: Path) -> int:
    """Return the size of a regular file.

    Raises:
        OSError: it is missing, or is not a regular file: a pipe could block for ever.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return found.st_size


def _read_file(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        OSError: see `_regular_size`.
        ValueError: it is larger.
    """
    _regular_size(path)
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"more than {limit} bytes")
    return content


def _read_verified(path: Path, record: FileRecord) -> bytes:
    where, size = f"bundle {path.parent}", record.get("size")
    limit = MAX_JSON_BYTES if path.name == SPEC_FILE else sys.maxsize
    try:
        if not isinstance(size, int) or size > limit:
            raise BundleError(
                f"{where}: wanted a size of at most {limit} bytes of {path.name} in {MANIFEST_FILE}, "
                f"got {size!r:.60}; export the policy again"
            )
        found = _regular_size(path)
        content = _read_file(path, found) if found == size else b""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"{where}: cannot read {path.name} ({reason}); copy the whole bundle") from None
    if found != size or len(content) != size:
        raise BundleError(
            f"{where}: wanted {path.name} of {size} bytes, got {found}; "
            "the file is truncated or changed, copy the bundle again"
        )
    if file_record(content) != record:
        raise BundleError(
            f"{where}: the sha256 of {path.name} differs from that in the manifest; "
            "the file is damaged or changed, copy the bundle again"
        )
    return content
