"""The seams that make the tests' own work fast or slow."""

from __future__ import annotations

import time

import pytest

from tests import matrix, pacing


@pytest.mark.parametrize(("scale", "expected"), [(None, 0.5), ("0", 0.0), ("20", 10.0)])
def test_work_takes_the_time_that_the_environment_says(monkeypatch, scale, expected):
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.delenv(pacing.SCALE, raising=False)
    if scale is not None:
        monkeypatch.setenv(pacing.SCALE, scale)
    pacing.work(0.5)
    assert slept == [expected]


def test_the_load_ends_with_its_block():
    with matrix.load(2) as spinning:
        assert [process.poll() for process in spinning] == [None, None]
    assert all(process.returncode is not None for process in spinning)


def test_a_run_is_one_line(tmp_path, capsys):
    file = tmp_path / "test_it.py"
    file.write_text("import os\ndef test_it(): assert os.environ['RSM_TEST_WORK_SCALE'] == '20'\n")
    arguments = ["-c", str(tmp_path / "none.toml"), "--rootdir", str(tmp_path), str(file)]
    (tmp_path / "none.toml").write_text("")
    assert matrix.run("slow", "20", busy=False, arguments=arguments)
    assert capsys.readouterr().out.startswith("slow: 1 passed in ")
    assert not matrix.run("fast", "0", busy=False, arguments=arguments)
    assert capsys.readouterr().out.startswith("fast: 1 failed in ")
