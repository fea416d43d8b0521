"""Manifests: a JSON file that lists the size and the sha256 of the files beside it.

That of a bundle is manifest.json; the checkpoints and the replay files of a run have sha256.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

MANIFEST_FILE = "manifest.json"
MANIFEST_SCHEMA_VERSION = 1

FileRecord = dict[str, str | int]
"""{"sha256": hexadecimal digits, "size": bytes} of one file."""


def file_record(content: bytes) -> FileRecord:
    """Return the record of a file with this content."""
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def manifest_json(content: Mapping[str, bytes]) -> bytes:
    """Return the content of a manifest for files, given as name -> content."""
    return records_json({name: file_record(data) for name, data in content.items()})


def records_json(records: Mapping[str, FileRecord]) -> bytes:
    """Return the content of a manifest for file records, given as name -> record."""
    data = {"schema_version": MANIFEST_SCHEMA_VERSION, "files": dict(records)}
    return (json.dumps(data, indent=2) + "\n").encode()


def read_records(path: Path) -> dict[str, FileRecord] | None:
    """Read the file records of a manifest, name -> record; None if there is no such file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged or of another version.
    """
    try:
        data = json.loads(path.read_bytes())
        version, files = data["schema_version"], dict(data["files"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path.name} is damaged ({error})") from None
    if type(version) is not int or version != MANIFEST_SCHEMA_VERSION:
        raise ValueError(f"{path.name} has schema version {version!r:.60}, not {MANIFEST_SCHEMA_VERSION}")
    if not all(isinstance(record, dict) for record in files.values()):
        raise ValueError(f"{path.name} is damaged (a record is not an object)")
    return files


def check_record(name: str, content: bytes, record: FileRecord) -> None:
    """Compare the content of a file with its record.

    Raises:
        ValueError: the size or the sha256 differs.
    """
    if len(content) != record.get("size"):
        raise ValueError(
            f"{name} is truncated or changed (it has {len(content)} bytes, not {record.get('size')!r:.30})"
        )
    if file_record(content) != record:
        raise ValueError(f"{name} is damaged or changed (its sha256 differs from the recorded one)")
