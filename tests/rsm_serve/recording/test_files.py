"""Files of records: rotation, restarts, full disks."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap

from rsm_serve.recording.files import RotatingFiles
from rsm_serve.recording.format import encode, numbered_files, read
from tests.hang import HANG_S
from tests.rsm_serve.recording.records import make_record


class TestFiles:
    def test_they_rotate_within_the_bound_and_the_oldest_go(self, tmp_path):
        limit, frame = 64_000, encode(make_record())
        files = RotatingFiles(tmp_path, limit)
        for _ in range(4 * limit // len(frame)):
            assert files.append(frame)
            sizes = [path.stat().st_size for path in numbered_files(tmp_path)]
            assert sum(sizes) <= limit
            assert max(sizes) <= limit // 8
        assert len(sizes) == 8
        assert numbered_files(tmp_path)[0].name > "00000010"
        assert not files.append(bytes(limit // 8))
        files.close()

    def test_a_restart_keeps_within_the_bound_too(self, tmp_path):
        frame = encode(make_record())
        for _ in range(20):
            files = RotatingFiles(tmp_path, 16_000)
            assert files.append(frame)
            files.close()
        found = numbered_files(tmp_path)
        assert found[-1].name == "00000020.rsmrec"
        assert sum(path.stat().st_size for path in found) <= 16_000
        assert (tmp_path / ".lock").exists()

    def test_a_full_disk_leaves_whole_records_and_writing_goes_on_when_there_is_room(self, tmp_path):
        # A limit on file sizes fails as a full disk does: the last write is cut short, the next one fails.
        script = textwrap.dedent(
            """
            import resource, sys
            from pathlib import Path
            from rsm_serve.recording.files import RotatingFiles
            files = RotatingFiles(Path(sys.argv[1]), 2**20)
            frame = open(sys.argv[2], "rb").read()
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (8 + 5 * len(frame) // 2, hard))
            failures = 0
            for _ in range(5):
                try:
                    files.append(frame)
                except OSError:
                    failures += 1
            assert failures == 3, failures
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            assert files.append(frame)
            """
        )
        (tmp_path / "frame").write_bytes(encode(make_record()))
        arguments = [sys.executable, "-c", script, str(tmp_path / "records"), str(tmp_path / "frame")]
        subprocess.run(arguments, check=True, timeout=HANG_S, env=os.environ)
        reader = read(tmp_path / "records")
        assert (len(list(reader)), reader.unreadable) == (3, 0)
        assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
