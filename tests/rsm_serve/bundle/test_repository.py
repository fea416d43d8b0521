"""What a repository holds, and which of it is current: CURRENT, complete versions, canaries, pins."""

from __future__ import annotations

import os

import pytest

from rsm_common.errors import BundleError
from rsm_common.manifest import MANIFEST_FILE
from rsm_serve.bundle.contract import CURRENT_FILE
from rsm_serve.bundle.repository import Found, Wishes, look_at, stamp, survey
from tests.bundles import make_spec, write_bundle

ALL = Wishes()
THREE = Found((1, 2, 3))


class TestReading:
    def test_versions_are_complete_with_their_manifest(self, own_repo):
        write_bundle(own_repo, make_spec("tiny", "10"))
        (own_repo / "tiny" / "11").mkdir()
        (own_repo / "tiny" / ".12.tmp").mkdir()
        (own_repo / "half" / "1").mkdir(parents=True)
        (own_repo / "empty").mkdir()
        assert survey(own_repo).policies == {"tiny": Found((1, 10)), "half": Found(())}

    @pytest.mark.parametrize(("text", "number"), [("1", 1), (" 7\n", 7), ("123456789", 123456789)])
    def test_a_pointer(self, own_repo, text, number):
        (own_repo / "tiny" / CURRENT_FILE).write_text(text)
        assert look_at(own_repo / "tiny") == Found((1,), number)

    @pytest.mark.parametrize("text", ["", "0", "v1", "1 2", "²", "-1", "1" * 10, "1" * 10_000, "\0"])
    def test_a_damaged_pointer_is_a_problem_and_never_a_version(self, own_repo, text):
        (own_repo / "tiny" / CURRENT_FILE).write_text(text)
        found = look_at(own_repo / "tiny")
        assert found is not None
        assert found.pointer is None
        assert "wanted the number of a version" in found.problem
        assert len(found.problem) < 300 + len(str(own_repo))

    def problem(self, repo):
        found = look_at(repo / "tiny")
        assert found is not None
        return found.problem

    def test_a_pointer_that_is_no_file(self, own_repo):
        path = own_repo / "tiny" / CURRENT_FILE
        os.mkfifo(path)
        assert "wanted a file" in self.problem(own_repo)
        path.unlink()
        path.symlink_to("nowhere")
        assert "cannot read" in self.problem(own_repo)
        path.unlink()
        (own_repo / "target").write_text("1")
        path.symlink_to(own_repo / "target")
        assert look_at(own_repo / "tiny") == Found((1,), 1)

    def test_a_repository_that_is_gone(self, tmp_path):
        with pytest.raises(BundleError, match="wanted to read the repository"):
            survey(tmp_path / "gone")

    def test_a_stamp_changes_with_any_file(self, own_repo):
        version_dir = own_repo / "tiny" / "1"
        seen = {stamp(version_dir)}
        for path in sorted(version_dir.iterdir()):
            path.write_bytes(path.read_bytes() + b" ")
            seen.add(stamp(version_dir))
        (version_dir / MANIFEST_FILE).unlink()
        seen.add(stamp(version_dir))
        assert len(seen) == 6
        assert survey(own_repo, [("tiny", 1), ("x", 9)]).stamps == {
            ("tiny", 1): stamp(version_dir),
            ("x", 9): (None,) * 4,
        }


@pytest.mark.parametrize(
    ("wishes", "found", "current"),
    [
        (ALL, THREE, 3),
        (ALL, Found((1, 2, 3), pointer=1), 1),
        (ALL, Found((1,), pointer=9), 9),  # asked for, so an error when it does not load
        (ALL, Found((), problem="x"), None),
        (ALL, Found(()), None),
        (ALL, None, None),
        (Wishes(unloaded={"p"}), THREE, None),
        (Wishes(follow={"p"}), THREE, 3),
        # Pinned: the pointer chooses among what is loaded, otherwise the newest of it.
        (Wishes(follow=set(), pinned={"p": {1, 2}}), THREE, 2),
        (Wishes(follow=set(), pinned={"p": {1, 2}}), Found((1, 2, 3), pointer=1), 1),
        (Wishes(follow=set(), pinned={"p": {1, 2}}), Found((1, 2, 3), pointer=3), 2),
        (Wishes(follow=set()), THREE, None),
        # A canary is not current for being new.
        (Wishes(canaries={"p": {3}}), THREE, 2),
        (Wishes(canaries={"p": {3}}), Found((1, 2, 3), pointer=3), 3),
        (Wishes(canaries={"p": {3}}), Found((3,)), 3),
        (Wishes(follow=set(), pinned={"p": {1}}, canaries={"p": {2}}), THREE, 1),
    ],
)
def test_which_version_is_current(wishes, found, current):
    assert wishes.current("p", found) == current
