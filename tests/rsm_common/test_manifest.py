"""Records of files: size and sha256."""

from __future__ import annotations

import json

import pytest

from rsm_common.manifest import check_record, file_record, manifest_json, read_records


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "manifest.json"
    assert read_records(path) is None
    path.write_bytes(manifest_json({"a": b"abc", "b": b""}))
    records = read_records(path)
    assert records == {"a": file_record(b"abc"), "b": file_record(b"")}
    check_record("a", b"abc", records["a"])


@pytest.mark.parametrize(
    ("content", "words"), [(b"abd", "a is damaged or changed"), (b"ab", "a is truncated or changed")]
)
def test_a_changed_file_is_named(content, words):
    with pytest.raises(ValueError, match=words):
        check_record("a", content, file_record(b"abc"))


NOT_A_RECORD = json.dumps({"schema_version": 1, "files": {"a": "b"}}).encode()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"files": {}}', b'{"schema_version": 2, "files": {}}', b"\xff", NOT_A_RECORD],
)
def test_a_damaged_manifest_is_refused(tmp_path, content):
    (tmp_path / "sha256.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"sha256\.json (is damaged|has schema)"):
        read_records(tmp_path / "sha256.json")
