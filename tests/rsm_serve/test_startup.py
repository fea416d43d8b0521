"""Loading at the start: what a server begins with, and what it refuses to begin with."""

from __future__ import annotations

import shutil

import pytest
import tritonclient.grpc as triton

from rsm_common.errors import (
    BundleError,
    PolicyNotFoundError,
)
from rsm_serve.client import PolicyClient, check_health
from rsm_serve.engine.lane import Selection
from tests.rsm_serve.http.ask import get, http_of
from tests.rsm_serve.test_server import wait_until
from tests.rsm_serve.versions import acting_version, add_version, damage, point, serve


def test_a_start_in_the_midst_of_trouble(own_repo, caplog):
    """Unattended, a server begins as it would have gone on; otherwise it says what is wrong and ends."""
    damage(add_version(own_repo, 2))
    damage(add_version(own_repo, 1, "other"))
    (own_repo / "half" / "1").mkdir(parents=True)
    with pytest.raises(BundleError), serve(own_repo):
        pass
    with serve(own_repo, poll=100.0) as server:
        assert acting_version(server) == "1"
        assert "'tiny' version 2 did not load" in caplog.text
        assert "'other' is not served" in caplog.text
        assert "'half' is not served" in caplog.text
    for settings in ({"policies": (Selection("tiny", 2),)}, {"policies": (Selection("other"),)}):
        with pytest.raises(BundleError), serve(own_repo, poll=100.0, **settings):
            pass
    shutil.rmtree(own_repo / "tiny" / "1")
    with pytest.raises(BundleError, match="sha256"), serve(own_repo, poll=100.0):
        pass


def test_an_empty_repository_is_waited_for(own_repo, tmp_path, caplog):
    repo = tmp_path / "empty"
    repo.mkdir()
    with pytest.raises(BundleError, match="at least one policy"), serve(repo):
        pass
    with serve(repo, poll=0.02, http="127.0.0.1:0") as server:
        address = server.addresses[0]
        client = triton.InferenceServerClient(address)
        health = f"{http_of(server)}/healthz"
        assert "no policy yet" in caplog.text
        assert check_health(address) == "NOT_SERVING"
        assert client.is_server_live()
        assert not client.is_server_ready()
        assert get(health)[:2] == (503, "waiting\n")
        with pytest.raises(PolicyNotFoundError, match="none at present"):
            PolicyClient(address)
        shutil.copytree(own_repo / "tiny", tmp_path / "new")
        (tmp_path / "new").rename(repo / "tiny")
        wait_until(lambda: check_health(address) == check_health(address, "tiny") == "SERVING", "ready")
        assert acting_version(server) == "1"
        assert client.is_server_ready()
        assert get(health)[:2] == (200, "serving\n")
        shutil.rmtree(repo / "tiny")
        wait_until(lambda: check_health(address) == "NOT_SERVING", "waiting again")
        client.close()


def test_a_start_follows_the_pointer(own_repo):
    add_version(own_repo, 2)
    point(own_repo, 1)
    with serve(own_repo) as server:
        assert acting_version(server) == "1"
    point(own_repo, 7)
    with pytest.raises(BundleError, match="version 7.*got 1, 2"), serve(own_repo):
        pass
    point(own_repo, "x")
    with pytest.raises(BundleError, match="number of a version"), serve(own_repo):
        pass
