"""Loading and unloading by request while a server runs."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rsm_common.errors import (
    InvalidRequestError,
    NotReadyError,
    PolicyNotFoundError,
    RepositoryError,
)
from rsm_serve.client import check_health
from rsm_serve.engine.lane import Lane, Selection
from tests.hang import HANG_S
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


def test_a_signal_while_a_version_loads_drains_and_ends_the_process(own_repo):
    code = (
        "import sys, time; from rsm_serve.commands import serve_cli as cli\n"
        "from rsm_serve import startup\n"
        "really = startup.load_lane\n"
        "def load(repo, selection, **options):\n"
        "    if selection.version == 2: print('loading', flush=True); time.sleep(1e6)\n"
        "    return really(repo, selection, **options)\n"
        "startup.load_lane = load\n"
        f"sys.exit(cli.main(['--repo', {str(own_repo)!r}, '--address', '127.0.0.1:0', '--poll', '0.05']))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "ready" in process.stdout.readline()
            add_version(own_repo, 2)
            assert process.stdout.readline() == "loading\n"
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=HANG_S)
        finally:
            process.kill()
    assert process.returncode == 0, log
    assert log.endswith("drained\n")


class TestControl:
    def test_loading_and_unloading(self, own_repo):
        add_version(own_repo, 1, "other")
        add_version(own_repo, 2)
        with serve(own_repo) as server:
            control, address = server.lifecycle, server.addresses[0]
            run(server, control.load("tiny", 1))
            assert (acting_version(server), acting_version(server, version=1)) == ("2", "1")
            run(server, control.unload("tiny"))
            assert settled(server) == [("other", "1", "READY", ""), ("tiny", "", "UNAVAILABLE", "unloaded")]
            assert check_health(address, "tiny", timeout_s=HANG_S) == "NOT_SERVING"
            with pytest.raises(PolicyNotFoundError, match="'tiny', this server has other"):
                acting_version(server)
            run(server, control.refresh())
            assert server.registry.names == ["other"], "unloaded until it is loaded again"
            add_version(own_repo, 3)
            run(server, control.load("tiny"))
            assert acting_version(server) == "3"
            assert check_health(address, "tiny", timeout_s=HANG_S) == "SERVING"
            assert settled(server) == [("other", "1", "READY", ""), ("tiny", "3", "READY", "")]
            run(server, control.unload("other"))
            run(server, control.unload("tiny"))
            with pytest.raises(PolicyNotFoundError, match="none at present"):
                acting_version(server)

    @pytest.mark.parametrize(
        ("name", "version", "kind", "message"),
        [
            ("nope", None, PolicyNotFoundError, "'nope', the repository has none"),
            ("tiny", 9, PolicyNotFoundError, "version 9 of policy 'tiny', the repository has 1"),
            ("../tiny", None, InvalidRequestError, "policy name"),
            ("half", None, RepositoryError, "no complete version"),
            ("broken", None, RepositoryError, "sha256"),
            ("pointed", None, RepositoryError, "number of a version"),
        ],
    )
    def test_what_cannot_be_loaded_is_refused_in_one_sentence(self, own_repo, name, version, kind, message):
        with serve(own_repo) as server:
            (own_repo / "half" / "1").mkdir(parents=True)
            damage(add_version(own_repo, 1, "broken"))
            add_version(own_repo, 1, "pointed")
            point(own_repo, "x", "pointed")
            with pytest.raises(kind, match=message) as caught:
                run(server, server.lifecycle.load(name, version))
            assert "\n" not in str(caught.value)
            with pytest.raises(PolicyNotFoundError, match="this server has tiny"):
                run(server, server.lifecycle.unload("nope"))
            assert acting_version(server) == "1"

    def test_a_policy_beyond_the_selection_may_be_loaded(self, own_repo):
        add_version(own_repo, 1, "other")
        with serve(own_repo, policies=(Selection("tiny"),)) as server:
            run(server, server.lifecycle.load("other"))
            add_version(own_repo, 2, "other")
            run(server, server.lifecycle.refresh())
            assert acting_version(server, "other") == "2"

    def test_while_it_loads_the_index_says_so_and_others_are_served(self, own_repo, monkeypatch):
        with serve(own_repo) as server:
            load, gate, entered = server.lifecycle.versions.load, threading.Event(), threading.Event()

            def slow(name: str, version: int) -> Lane:
                entered.set()
                assert gate.wait(HANG_S)
                return load(name, version)

            monkeypatch.setattr(server.lifecycle.versions, "load", slow)
            add_version(own_repo, 1, "other")
            pool = ThreadPoolExecutor(1)
            loading = pool.submit(run, server, server.lifecycle.refresh())
            assert entered.wait(HANG_S)
            assert server.lifecycle.index()[0] == ("other", "1", "LOADING", "")
            with pytest.raises(NotReadyError, match="'other' is being loaded"):
                acting_version(server, "other")
            assert acting_version(server) == "1"
            gate.set()
            loading.result(HANG_S)
            pool.shutdown()
            assert acting_version(server, "other") == "1"

    def test_a_caller_that_gives_up_leaves_the_load_to_its_end(self, own_repo, monkeypatch):
        with serve(own_repo) as server:
            load, gate, entered = server.lifecycle.versions.load, threading.Event(), threading.Event()

            def slow(name: str, version: int) -> Lane:
                entered.set()
                assert gate.wait(HANG_S)
                return load(name, version)

            async def impatient() -> None:
                task = asyncio.create_task(server.lifecycle.load("tiny"))
                await asyncio.to_thread(entered.wait, HANG_S)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

            monkeypatch.setattr(server.lifecycle.versions, "load", slow)
            add_version(own_repo, 2)
            run(server, impatient())
            gate.set()
            wait_for_version(server, "2")

    def test_a_load_that_outlives_the_server_is_closed(self, own_repo, monkeypatch):
        gate, entered = threading.Event(), threading.Event()
        closed: list[str] = []
        with serve(own_repo, poll=0.02) as server, ThreadPoolExecutor(1) as pool:
            load = server.lifecycle.versions.load

            def slow(name: str, version: int) -> Lane:
                lane = load(name, version)
                monkeypatch.setattr(lane, "close", lambda: closed.append(lane.spec.version))
                entered.set()
                assert gate.wait(HANG_S)
                return lane

            monkeypatch.setattr(server.lifecycle.versions, "load", slow)
            add_version(own_repo, 2)
            assert entered.wait(HANG_S)
            drain = pool.submit(run, server, server.drain())
            assert drain.result(HANG_S) is True
            for refused in (server.lifecycle.load("tiny"), server.lifecycle.unload("tiny")):
                with pytest.raises(NotReadyError, match="shutting down"):
                    run(server, refused)
            gate.set()
            wait_until(lambda: closed == ["2"], "the late lane to be closed")
