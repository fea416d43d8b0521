"""Policy sources: a bundle, a real server, and names that were mistyped."""

from __future__ import annotations

import numpy as np
import pytest

from rsm_common.errors import (
    BackendError,
    BundleError,
    CheckpointError,
    NotReadyError,
    PolicyNotFoundError,
    UsageError,
)
from rsm_eval.sources import open_policy, run_dir_of
from rsm_serve.config import ServerConfig
from rsm_serve.server import background_server

OBS = np.array([0.1, -0.2, 0.3, 0.4], np.float32)


def test_a_bundle_and_the_server_that_serves_it_act_alike(bundle_repo):
    with background_server(
        ServerConfig.from_options(repo=bundle_repo, addresses=("127.0.0.1:0",), max_batch_size=8)
    ) as server:
        address = server.addresses[0]
        with (
            open_policy(str(bundle_repo / "tiny")) as bundle,
            open_policy(f"grpc://{address}/tiny") as served,
            open_policy(f"grpc://{address}/tiny:1") as versioned,
        ):
            assert (bundle.kind, served.kind) == ("bundle", "server")
            assert (bundle.max_batch_rows, served.max_batch_rows) == (64, 8)
            expected = bundle.policy.act(OBS, seed=5).action
            for opened in (served, versioned):
                np.testing.assert_allclose(opened.policy.act(OBS, seed=5).action, expected, atol=1e-5)
        with pytest.raises(NotReadyError, match="closed"):
            served.policy.act(OBS)
        with pytest.raises(PolicyNotFoundError, match="other"):
            open_policy(f"grpc://{address}/other")


def test_a_unix_socket(bundle_repo, tmp_path):
    config = ServerConfig(repo=bundle_repo, addresses=(f"unix:{tmp_path}/s",))
    with background_server(config), open_policy(f"grpc:unix:{tmp_path}/s/tiny") as served:
        assert served.policy.spec.name == "tiny"


def test_a_version_directory_is_a_bundle(bundle_repo):
    with open_policy(str(bundle_repo / "tiny" / "1")) as opened:
        assert opened.policy.spec.version == "1"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_bundle_runs_where_it_was_told_to(bundle_repo, backend):
    pytest.importorskip(backend)
    with open_policy(str(bundle_repo / "tiny"), backend) as opened:
        assert (opened.runtime or "").startswith(f"{backend} ")
        opened.policy.act(OBS)
    with pytest.raises(BackendError, match="closed"):
        opened.policy.act(OBS)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no/such/place", "which is not there"),
        ("grpc://host", "host:port/name"),
        ("grpc://127.0.0.1:1/", "host:port/name"),
        ("grpc:/127.0.0.1:1/x", "host:port/name"),
        ("grpc:unix:socket", "host:port/name"),
    ],
)
def test_a_wrong_source_says_what_was_wanted(source, words):
    with pytest.raises(UsageError, match=words) as caught:
        open_policy(source)
    assert str(caught.value).startswith("wanted")
    assert source in str(caught.value)


def test_a_repository_names_one_of_its_bundles(bundle_repo):
    with pytest.raises(UsageError, match="repository of bundles") as caught:
        open_policy(str(bundle_repo))
    assert str(bundle_repo / "tiny") in str(caught.value)


def test_files_and_foreign_directories_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="a file"):
        open_policy(str(tmp_path / "file"))
    with pytest.raises(UsageError, match="neither"):
        open_policy(str(tmp_path))


def test_damage_is_the_owners_error(own_repo, tmp_path):
    (own_repo / "tiny" / "1" / "model.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match="truncated"):
        open_policy(str(own_repo / "tiny"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        open_policy(str(tmp_path))


def test_no_server_is_said_within_seconds():
    with pytest.raises(NotReadyError, match="127.0.0.1:9"):
        open_policy("grpc://127.0.0.1:9/tiny")


def test_the_run_of_a_checkpoint(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000000010"
    checkpoint.mkdir(parents=True)
    assert run_dir_of(tmp_path / "run") == run_dir_of(checkpoint) == (tmp_path / "run").resolve()
    assert run_dir_of(tmp_path) is None
