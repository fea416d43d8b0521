"""Probes: files that are damaged, malicious or of another policy."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rsm_common.errors import BundleError
from rsm_serve.bundle.contract import (
    load_bundle,
)
from rsm_serve.bundle.probe import PROBE_FILE, Probe
from tests.bundles import make_spec, rewrite


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_inside_the_probe_is_never_opened(own_repo, tmp_path):
    buffer = io.BytesIO()
    bomb = np.array([Bomb(tmp_path / "exploded")], dtype=object)
    np.savez(buffer, obs=bomb, noise=bomb, action=bomb)
    rewrite(own_repo / "tiny" / "1", PROBE_FILE, buffer.getvalue())
    with pytest.raises(BundleError, match="plain arrays"):
        load_bundle(own_repo / "tiny")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x05\x06" + bytes(18), b"PK\x03\x04garbage"])
def test_a_probe_that_is_no_archive(own_repo, content):
    rewrite(own_repo / "tiny" / "1", PROBE_FILE, content)
    with pytest.raises(BundleError, match=PROBE_FILE):
        load_bundle(own_repo / "tiny")


@pytest.mark.parametrize(
    "header",
    [
        "-" * 9500 + "1",
        "(" * 9000,
        "[" * 150 + "]" * 150,
        "{'descr': '<f4', 'fortran_order': False, 'shape': " + "-" * 9000 + "4}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 5000 + ", 4)}",
        "{'descr': '<f4\\x00', 'fortran_order': False, 'shape': (1, 4)}",
        "{'descr': [('a', '<f4', (2**31,))], 'fortran_order': False, 'shape': (1, 4)}",
        "{'descr': '|V9999999999999', 'fortran_order': False, 'shape': (1, 4)}",
        "{[]: 1}",
    ],
)
def test_a_probe_with_an_unreadable_header(own_repo, header):
    text = header.encode() + b"\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for key in ("obs", "noise", "action"):
            archive.writestr(f"{key}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
    rewrite(own_repo / "tiny" / "1", PROBE_FILE, buffer.getvalue())
    with pytest.raises(BundleError, match=rf"{PROBE_FILE}.*\S.*export the policy again"):
        load_bundle(own_repo / "tiny")


def test_a_bare_array_as_probe(own_repo):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    rewrite(own_repo / "tiny" / "1", PROBE_FILE, buffer.getvalue())
    with pytest.raises(BundleError, match=PROBE_FILE):
        load_bundle(own_repo / "tiny")


@pytest.mark.parametrize(
    ("obs", "noise", "action"),
    [
        (np.zeros((2, 5)), np.zeros((2, 3, 2, 2)), np.zeros((2, 2))),
        (np.zeros((2, 4)), np.zeros((1, 3, 2, 2)), np.zeros((2, 2))),
        (np.zeros((2, 4)), np.zeros((2, 3, 2, 2)), np.zeros((2, 1))),
        (np.zeros((0, 4)), np.zeros((0, 3, 2, 2)), np.zeros((0, 2))),
        (np.float32(0), np.zeros((2, 3, 2, 2)), np.zeros((2, 2))),
    ],
)
def test_a_probe_of_another_shape(obs, noise, action):
    probe = Probe(*(np.asarray(array, np.float32) for array in (obs, noise, action)))
    with pytest.raises(BundleError, match="wanted (obs|noise|action) as float32"):
        Probe.from_bytes(probe.to_bytes(), make_spec())
