"""Following the repository: what comes, changes, breaks and vanishes."""

from __future__ import annotations

import logging
import shutil
import signal

import numpy as np
import pytest

from rsm_common.errors import (
    NotReadyError,
    PolicyNotFoundError,
    RepositoryError,
)
from rsm_serve.bundle.contract import CURRENT_FILE
from rsm_serve.client import PolicyClient, check_health
from rsm_serve.engine.lane import Selection
from tests.bundles import make_spec, write_bundle
from tests.hang import HANG_S
from tests.rsm_serve.commands.test_serve_cli import serving
from tests.rsm_serve.test_server import wait_until
from tests.rsm_serve.versions import (
    acting_version,
    add_version,
    damage,
    point,
    run,
    serve,
    settled,
    wait_for_version,
)


class TestFailures:
    def test_a_policy_of_which_nothing_loads_is_not_ready_rather_than_unknown(self, own_repo):
        add_version(own_repo, 1, "other")
        damage(own_repo / "tiny" / "1")
        with serve(own_repo, poll=30) as server:
            run(server, server.lifecycle.refresh())
            with pytest.raises(NotReadyError, match="policy 'tiny' failed to load"):
                acting_version(server)
            with pytest.raises(PolicyNotFoundError, match="wanted policy 'nope'"):
                server.registry.find("nope", "")

    def test_a_broken_version_is_tried_once_per_change_and_the_old_one_goes_on(self, own_repo, caplog):
        with serve(own_repo) as server:
            broken = damage(add_version(own_repo, 2))
            for _ in range(3):
                run(server, server.lifecycle.refresh())
            lines = [record for record in caplog.records if record.levelno >= logging.ERROR]
            assert len(lines) == 1
            sentence = lines[0].getMessage()
            assert "'tiny' version 2 did not load, version 1 goes on: " in sentence
            assert "sha256 of model.onnx differs from that in the manifest" in sentence
            assert "\n" not in sentence
            assert lines[0].exc_info in (None, False, (None, None, None))
            (one, two) = server.lifecycle.index()
            assert one == ("tiny", "1", "READY", "")
            assert two[:3] == ("tiny", "2", "UNAVAILABLE")
            assert "sha256" in two.reason
            assert acting_version(server) == "1"
            with pytest.raises(NotReadyError, match="version '2'.*failed to load"):
                acting_version(server, version=2)
            damage(broken)  # changed, though no better
            run(server, server.lifecycle.refresh())
            assert sum(record.levelno >= logging.ERROR for record in caplog.records) == 2
            shutil.rmtree(broken)
            add_version(own_repo, 2)
            run(server, server.lifecycle.refresh())
            assert settled(server) == [("tiny", "2", "READY", "")]
            assert acting_version(server) == "2"

    def test_a_broken_version_that_is_deleted_is_forgotten(self, own_repo):
        with serve(own_repo) as server:
            broken = damage(add_version(own_repo, 2))
            run(server, server.lifecycle.refresh())
            shutil.rmtree(broken)
            run(server, server.lifecycle.refresh())
            assert server.lifecycle.index() == [("tiny", "1", "READY", "")]

    def test_a_failed_reload_of_what_is_ready_says_so_and_goes_on(self, own_repo):
        with serve(own_repo) as server:
            damage(own_repo / "tiny" / "1")
            with pytest.raises(RepositoryError, match="sha256"):
                run(server, server.lifecycle.load("tiny"))
            (entry,) = server.lifecycle.index()
            assert entry[:3] == ("tiny", "1", "READY")
            assert "sha256" in entry.reason
            assert acting_version(server) == "1"

    @pytest.mark.parametrize("text", ["9", "nonsense", ""])
    def test_a_wrong_pointer_changes_nothing_and_is_told_once(self, own_repo, caplog, text):
        add_version(own_repo, 2)
        with serve(own_repo) as server:
            add_version(own_repo, 3)
            point(own_repo, text)
            for _ in range(3):
                run(server, server.lifecycle.refresh())
            assert acting_version(server) == "2"
            assert sum(record.levelno >= logging.ERROR for record in caplog.records) == 1
            point(own_repo, 3)
            run(server, server.lifecycle.refresh())
            assert acting_version(server) == "3"

    def test_a_repository_that_is_gone_for_a_moment_empties_nothing(self, own_repo, caplog):
        with serve(own_repo) as server:
            own_repo.rename(own_repo.with_name("away"))
            for _ in range(3):
                run(server, server.lifecycle.refresh())
            assert acting_version(server) == "1"
            assert sum("what is loaded goes on" in record.getMessage() for record in caplog.records) == 1
            own_repo.with_name("away").rename(own_repo)
            add_version(own_repo, 2)
            run(server, server.lifecycle.refresh())
            assert acting_version(server) == "2"

    def test_an_unexpected_fault_of_a_backend_is_a_failure_like_any_other(self, own_repo, monkeypatch, caplog):
        with serve(own_repo) as server:
            monkeypatch.setattr(server.lifecycle.versions, "load", lambda name, version: 1 / 0)
            with pytest.raises(RepositoryError, match="ZeroDivisionError"):
                run(server, server.lifecycle.load("tiny"))
            assert acting_version(server) == "1"
            assert "Traceback" in caplog.text  # a fault of ours

    def test_another_interface_is_warned_of(self, own_repo, caplog):
        with serve(own_repo) as server:
            write_bundle(own_repo, make_spec("tiny", "2", obs_size=5))
            run(server, server.lifecycle.refresh())
            assert "version 2 takes or gives something else than version 1" in caplog.text
            with PolicyClient(server.addresses[0], policy="tiny", timeout_s=HANG_S) as client:
                assert client.act(np.zeros(5)).version == "2"


class TestPolling:
    def test_versions_and_policies_come_and_go(self, own_repo):
        address = []
        with serve(own_repo, poll=0.02) as server:
            address.append(server.addresses[0])
            add_version(own_repo, 2)
            wait_for_version(server, "2")
            point(own_repo, 1)
            wait_for_version(server, "1")
            add_version(own_repo, 3)
            point(own_repo, 2)
            wait_for_version(server, "2")
            (own_repo / "tiny" / CURRENT_FILE).unlink()
            wait_for_version(server, "3")
            add_version(own_repo, 1, "other")
            wait_for_version(server, "1", "other")
            assert check_health(address[0], "other", timeout_s=HANG_S) == "SERVING"
            shutil.rmtree(own_repo / "other")
            wait_until(lambda: server.registry.names == ["tiny"], "other to go")
            wait_until(
                lambda: check_health(address[0], "other", timeout_s=HANG_S) == "NOT_SERVING", "its health"
            )
            assert check_health(address[0], timeout_s=HANG_S) == "SERVING"
            assert acting_version(server) == "3"
            assert settled(server) == [("tiny", "3", "READY", "")]

    def test_a_policy_is_missed_twice_before_it_is_unloaded(self, own_repo):
        add_version(own_repo, 1, "other")
        with serve(own_repo) as server:
            away = own_repo / ".other"
            (own_repo / "other").rename(away)
            run(server, server.lifecycle.refresh())
            away.rename(own_repo / "other")
            run(server, server.lifecycle.refresh())
            (own_repo / "other").rename(away)
            run(server, server.lifecycle.refresh())
            assert acting_version(server, "other") == "1"
            run(server, server.lifecycle.refresh())
            assert server.registry.names == ["tiny"]

    def test_a_selection_is_kept_to(self, own_repo):
        add_version(own_repo, 1, "other")
        selection = (Selection("tiny", 1), Selection("other"))
        with serve(own_repo, policies=selection) as server:
            for name in ("tiny", "other", "third"):
                add_version(own_repo, 2, name)
            run(server, server.lifecycle.refresh())
            assert [entry[:2] for entry in settled(server) if entry.state == "READY"] == [
                ("other", "2"),
                ("tiny", "1"),
            ]
            shutil.rmtree(own_repo / "other")
            shutil.rmtree(own_repo / "tiny")
            run(server, server.lifecycle.refresh())
            assert (acting_version(server), acting_version(server, "other")) == ("1", "2")

    def test_replaced_versions_may_stay_for_those_who_name_them(self, own_repo):
        with serve(own_repo, keep_versions=1) as server:
            for version in (2, 3):
                add_version(own_repo, version)
                run(server, server.lifecycle.refresh())
            assert settled(server) == [("tiny", "2", "READY", ""), ("tiny", "3", "READY", "")]
            assert (acting_version(server), acting_version(server, version=2)) == ("3", "2")
            point(own_repo, 2)
            run(server, server.lifecycle.refresh())
            assert acting_version(server) == "2"
            assert settled(server) == [("tiny", "2", "READY", ""), ("tiny", "3", "READY", "")]

    def test_the_command_polls(self, own_repo):
        arguments = ["--repo", str(own_repo), "--address", "127.0.0.1:0", "--backend", "onnxruntime"]
        with (
            serving([*arguments, "--poll", "0.05"]) as (process, address, policies),
            PolicyClient(address, policy="tiny", timeout_s=HANG_S) as client,
        ):
            assert policies == "tiny:1"
            add_version(own_repo, 2)
            wait_until(lambda: client.act(np.zeros(4)).version == "2", "version 2")
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=HANG_S)
            assert process.returncode == 0, log
            assert "'tiny': version 2 is current, after version 1" in log
