import errno
import os

import pytest

from rsm_common import atomic


def test_a_link_is_followed_and_the_old_content_replaced(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    atomic.write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_what_is_not_a_file_is_refused_and_untouched(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="not a regular file"):
        atomic.write_file(tmp_path / "pipe", b"new")
    assert (tmp_path / "pipe").is_fifo()


def test_a_directory_is_complete_or_absent(tmp_path):
    def fail_half_way():
        with atomic.new_directory(tmp_path / "made") as directory:
            (directory / "half").write_bytes(b"x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []
    with atomic.new_directory(tmp_path / "made") as directory:
        (directory / "whole").write_bytes(b"x")
    with pytest.raises(FileExistsError), atomic.new_directory(tmp_path / "made"):
        pass
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["whole"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_fsync_is_one_warning(tmp_path, monkeypatch, caplog, number):
    def fsync(descriptor):
        raise OSError(number, "refused")

    monkeypatch.setattr(os, "fsync", fsync)
    atomic._warn_fsync.cache_clear()
    atomic.write_file(tmp_path / "file", b"new")
    with atomic.new_directory(tmp_path / "made") as directory:
        (directory / "whole").write_bytes(b"x")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "made" / "whole").read_bytes() == b"x"
    assert len(caplog.records) == 1
    assert "does not support fsync (refused)" in caplog.text


def test_an_error_of_the_disk_is_raised(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="input/output"):
        atomic.write_file(tmp_path / "file", b"new")
    assert list(tmp_path.iterdir()) == []
