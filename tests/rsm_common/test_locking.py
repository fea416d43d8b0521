"""Locks of files, also on file systems that have none."""

from __future__ import annotations

import errno
import fcntl
import logging

import pytest

from rsm_common.locking import lock_file


def refuse(monkeypatch, number):
    def flock(file, operation):
        raise OSError(number, "refused")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_second_holder_is_refused(tmp_path):
    path = tmp_path / "lock"
    with path.open("w") as first, path.open("w") as second:
        assert lock_file(first, path)
        with pytest.raises(BlockingIOError):
            lock_file(second, path)
    with path.open("w") as third:
        assert lock_file(third, path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_one_warning(tmp_path, monkeypatch, caplog, number):
    refuse(monkeypatch, number)
    path = tmp_path / "lock"
    with caplog.at_level(logging.WARNING), path.open("w") as file:
        assert not lock_file(file, path)
        assert not lock_file(file, path)
    (record,) = caplog.records
    assert f"cannot lock {path} (refused)" in record.getMessage()
    assert "start only one" in record.getMessage()


def test_another_error_is_raised(tmp_path, monkeypatch):
    refuse(monkeypatch, errno.EIO)
    with (tmp_path / "lock").open("w") as file, pytest.raises(OSError, match="refused"):
        lock_file(file, tmp_path / "lock")
