"""The format of records: what comes back from whole, damaged and incomplete files."""

from __future__ import annotations

import numpy as np
import pytest

from rsm_common.errors import UsageError
from rsm_common.policy import Adjustment
from rsm_common.seeds import draw_noise, expand_seed
from rsm_serve.recording.format import MAGIC, Record, encode, read
from tests.rsm_serve.recording.records import OBS, make_record


def assert_same(one: Record, other: Record) -> None:
    for name in Record.__dataclass_fields__:
        mine, yours = getattr(one, name), getattr(other, name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == yours.dtype, name
            assert np.array_equal(mine, yours), name
        else:
            assert mine == yours, name


class TestFormat:
    @pytest.mark.parametrize(
        "record",
        [
            make_record(),
            make_record(q=None, client_id="ä"),
            make_record(seeds=None, noise=draw_noise(expand_seed(1, 2), (3, 2, 2))),
            make_record(adjusted=np.array([0, 1], np.int32), policy_action=OBS[:2, 2:]),
            make_record(adjusted=np.full(2, Adjustment.HELD, np.int32), policy_action=None),
            make_record(code="INTERNAL", reason="backend", action=None, q=None, policy_action=None),
            make_record(obs=None, seeds=None, action=None, q=None, policy_action=None, code="NOT_FOUND"),
        ],
    )
    def test_a_record_comes_back_as_it_was(self, record, tmp_path):
        path = tmp_path / "one.rsmrec"
        path.write_bytes(MAGIC + encode(record) * 2)
        reader = read(path)
        found = list(reader)
        assert (len(found), reader.unreadable) == (2, 0)
        assert_same(record, found[1])

    def test_whatever_is_cut_off_the_records_before_are_read(self, tmp_path):
        path, frame = tmp_path / "one.rsmrec", encode(make_record())
        whole = MAGIC + 3 * frame
        for length in (*range(len(whole) - len(frame) + 1, len(whole)), len(MAGIC) + 1):
            path.write_bytes(whole[:length])
            reader = read(path)
            complete = (length - len(MAGIC)) // len(frame)
            assert (len(list(reader)), reader.unreadable) == (complete, 1)

    def test_a_damaged_record_is_left_out_and_a_damaged_length_ends_the_file(self, tmp_path):
        path, frame = tmp_path / "one.rsmrec", encode(make_record())
        content = bytearray(MAGIC + 3 * frame)
        content[len(MAGIC) + len(frame) + 30] ^= 1
        path.write_bytes(content)
        reader = read(path)
        assert (len(list(reader)), reader.unreadable) == (2, 1)
        content[len(MAGIC) + len(frame) + 3] = 255
        path.write_bytes(content)
        reader = read(path)
        assert (len(list(reader)), reader.unreadable) == (1, 1)

    def test_what_is_no_recording(self, tmp_path):
        path = tmp_path / "one.rsmrec"
        path.write_bytes(b"something else")
        reader = read(path)
        assert (list(reader), reader.unreadable) == ([], 1)
        with pytest.raises(UsageError, match=r"wanted a directory of records, got .* without any"):
            read(tmp_path)
        with pytest.raises(UsageError, match="wanted files or directories of records"):
            read(tmp_path / "nothing")
        with pytest.raises(UsageError, match="wanted to read .*File name too long"):
            read(tmp_path / ("x" * 300))

    @pytest.mark.parametrize("named", ["directory", "file"])
    def test_what_is_recorded_meanwhile_is_not_read(self, tmp_path, named):
        """A replay against the server that records there would read its own requests, for ever."""
        path, frame = tmp_path / "00000001.rsmrec", encode(make_record())
        path.write_bytes(MAGIC + 3 * frame)
        reader = read(tmp_path if named == "directory" else path)
        count = 0
        for _ in reader:
            count += 1
            assert count <= 3, "what the loop itself has written"
            with path.open("ab") as file:
                file.write(frame)
            (tmp_path / f"{count + 1:08d}.rsmrec").write_bytes(MAGIC + frame)
        assert (count, reader.unreadable, reader.vanished) == (3, 0, 0)
        assert len(list(read(tmp_path))) == 9, "by another reader"

    def test_files_that_make_room_meanwhile_are_left_out(self, tmp_path):
        paths = [tmp_path / f"{number:08d}.rsmrec" for number in (1, 2, 3)]
        for path in paths:
            path.write_bytes(MAGIC + encode(make_record()))
        reader = read(tmp_path)
        paths[0].unlink()
        found = [next(iter(reader))]
        paths[2].unlink()
        assert (len(found), reader.unreadable, reader.vanished) == (1, 0, 1)
        again = read(tmp_path)
        assert (len(list(again)), again.vanished) == (1, 0)

    def test_a_directory_of_processes_has_theirs(self, tmp_path):
        for place in ("0", "1", "10", "other"):
            (tmp_path / place).mkdir()
            record = make_record(version=place if place.isdecimal() else "99")
            (tmp_path / place / "00000001.rsmrec").write_bytes(MAGIC + encode(record))
        assert [record.version for record in read(tmp_path)] == ["0", "1", "10"]
        (tmp_path / "00000007.rsmrec").write_bytes(MAGIC + encode(make_record(version="7")))
        assert [record.version for record in read(tmp_path)] == ["7", "0", "1", "10"]
