"""Bundles: what loads, and every way in which one does not."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsm_common.errors import BundleError
from rsm_common.manifest import MANIFEST_FILE
from rsm_serve.bundle.contract import (
    CURRENT_FILE,
    MODEL_FILE,
    PAYLOAD_FILES,
    SPEC_FILE,
    check_policy_name,
    find_bundle,
    list_policies,
    list_versions,
    load_bundle,
)
from rsm_serve.bundle.repository import survey
from tests.bundles import make_spec, rewrite, write_bundle


def test_a_bundle_loads_by_its_version_and_by_its_policy_directory(own_repo):
    write_bundle(own_repo, make_spec("tiny", "10"))
    write_bundle(own_repo, make_spec("tiny", "9"))
    assert load_bundle(own_repo / "tiny" / "1").spec == make_spec("tiny", "1")
    assert load_bundle(own_repo / "tiny").spec.version == "10"
    assert list_versions(own_repo / "tiny") == [1, 9, 10]
    assert list_policies(own_repo) == ["tiny"]


def test_a_policy_directory_means_the_version_that_a_server_of_it_serves(own_repo):
    write_bundle(own_repo, make_spec("tiny", "2"))
    pointer = own_repo / "tiny" / CURRENT_FILE
    pointer.write_text("1\n")
    assert load_bundle(own_repo / "tiny").spec.version == "1"
    assert load_bundle(own_repo / "tiny" / "2").spec.version == "2", "what is named is not asked for"
    pointer.write_text("7\n")
    with pytest.raises(BundleError, match=r"wanted version 7 of .*tiny', which CURRENT names, got 1, 2; name"):
        load_bundle(own_repo / "tiny")
    pointer.write_text("latest")
    with pytest.raises(BundleError, match="wanted the number of a version in .*CURRENT, got 'latest'"):
        load_bundle(own_repo / "tiny")


@pytest.mark.parametrize("name", PAYLOAD_FILES)
def test_a_flipped_byte_is_found(own_repo, name):
    path = own_repo / "tiny" / "1" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=f"sha256 of {name}"):
        load_bundle(own_repo / "tiny")


@pytest.mark.parametrize("name", PAYLOAD_FILES)
def test_a_truncated_file_is_found(own_repo, name):
    path = own_repo / "tiny" / "1" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=f"{name} of .* bytes"):
        load_bundle(own_repo / "tiny")


@pytest.mark.parametrize("name", [*PAYLOAD_FILES, MANIFEST_FILE])
def test_a_missing_file_is_named(own_repo, name):
    (own_repo / "tiny" / "1" / name).unlink()
    with pytest.raises(BundleError, match=name):
        load_bundle(own_repo / "tiny" / "1" if name != MANIFEST_FILE else own_repo / "tiny")


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]",
        b"{}",
        b'{"schema_version": 1, "files": 3}',
        b'{"schema_version": 2, "files": {}}',
        b'{"schema_version": 1, "files": {"model.onnx": {}}}',
        b'{"schema_version": 1, "files": {"model.onnx": 1, "policy.json": 2, "probe.npz": 3}}',
        b'{"schema_version": 1, "files": {"../../secret": {}}}',
    ],
)
def test_a_damaged_manifest_is_a_clear_error(own_repo, manifest):
    (own_repo / "tiny" / "1" / MANIFEST_FILE).write_bytes(manifest)
    with pytest.raises(BundleError, match=MANIFEST_FILE + "|manifest"):
        load_bundle(own_repo / "tiny")


def test_another_schema_is_refused_even_with_right_hashes(own_repo):
    version_dir = own_repo / "tiny" / "1"
    data = json.loads((version_dir / SPEC_FILE).read_bytes()) | {"schema_version": 99}
    rewrite(version_dir, SPEC_FILE, json.dumps(data).encode())
    with pytest.raises(BundleError, match="schema version 1, 2 or 3, got 99"):
        load_bundle(version_dir)


@pytest.mark.parametrize(
    "name", ["", "..", "a/b", "../x", "/etc", "a..b", ".hidden", "a\0b", "a" * 200, "a b", "x\n"]
)
def test_names_that_could_leave_the_repository_are_refused(name):
    with pytest.raises(BundleError, match="policy name"):
        check_policy_name(name)


def test_a_missing_repository_and_an_empty_directory(tmp_path):
    with pytest.raises(BundleError, match="not a directory"):
        list_policies(tmp_path / "nothing")
    with pytest.raises(BundleError, match="no such directory"):
        load_bundle(tmp_path / "nothing")
    with pytest.raises(BundleError, match="without manifest.json"):
        load_bundle(tmp_path)


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """As a user whom permissions stop, which they do not root."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(65534)
    except PermissionError:
        pytest.skip("this root user may not change its user id")
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_repo() -> Iterator[Path]:
    """A repository at a place that everybody reaches, which pytest's own directories are not."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        write_bundle(path / "repo", make_spec())
        try:
            yield path / "repo"
        finally:
            for directory in (path / "repo", path / "repo" / "tiny"):
                directory.chmod(0o755)


class TestPermissions:
    @pytest.mark.parametrize("mode", [0o000, 0o444])
    def test_a_repository_that_may_not_be_read(self, open_repo, mode):
        open_repo.chmod(mode)
        with without_privileges():
            for path in (open_repo, open_repo / "nothing"):
                with pytest.raises(BundleError, match=f"cannot read {open_repo}.*check its permissions"):
                    list_versions(path / "tiny")
                with pytest.raises(BundleError, match=f"cannot read {open_repo}.*check its permissions"):
                    load_bundle(path / "tiny")
            with pytest.raises(BundleError, match=rf"{open_repo}.*: Permission denied; check its permissions"):
                list_policies(open_repo if mode == 0 else open_repo / "nothing")

    def test_a_policy_that_may_not_be_read_hides_no_other(self, open_repo):
        write_bundle(open_repo, make_spec("other"))
        (open_repo / "tiny").chmod(0o000)
        with without_privileges():
            assert list_policies(open_repo) == ["other", "tiny"]
            with pytest.raises(BundleError, match=r"tiny: Permission denied; check its permissions"):
                find_bundle(open_repo / "tiny")
            found = survey(open_repo).policies
        assert found["tiny"].problem.endswith("tiny: Permission denied; check its permissions")
        assert found["other"].versions == (1,)


def test_a_half_copied_bundle_never_loads(own_repo, tmp_path):
    source = own_repo / "tiny" / "1"
    for count in range(len(PAYLOAD_FILES)):
        target = tmp_path / f"copy{count}" / "1"
        target.mkdir(parents=True)
        for name in [MANIFEST_FILE, *PAYLOAD_FILES[:count]]:
            shutil.copy(source / name, target / name)
        with pytest.raises(BundleError):
            load_bundle(target)
    assert MODEL_FILE in PAYLOAD_FILES
