"""Stamps of files."""

from __future__ import annotations

import os

from rsm_common.file_stamp import file_stamp


def test_a_stamp_changes_with_content_time_and_identity(tmp_path):
    path = tmp_path / "file"
    assert file_stamp(path) is None
    path.write_text("one")
    stamps = [file_stamp(path)]
    assert file_stamp(path) == stamps[0]
    path.write_text("three")
    stamps.append(file_stamp(path))
    os.utime(path, ns=(1, 1))
    stamps.append(file_stamp(path))
    other = tmp_path / "other"
    other.write_text("three")
    os.utime(other, ns=(1, 1))
    other.replace(path)
    stamps.append(file_stamp(path))
    assert len(set(stamps)) == 4
