"""Versions that come and go under a real server: reload under load, polling, rollback, canaries, failures."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tritonclient.grpc as triton

from rsm_common.atomic import write_file
from rsm_common.errors import (
    BundleError,
    InvalidRequestError,
    NotReadyError,
    PolicyNotFoundError,
    RepositoryError,
)
from rsm_serve.bundle.contract import CURRENT_FILE, MODEL_FILE, load_bundle
from rsm_serve.client import PolicyClient, check_health
from rsm_serve.config import ServerConfig
from rsm_serve.engine.background import in_thread
from rsm_serve.engine.canary import Canary, lot
from rsm_serve.engine.lane import Lane, Selection
from rsm_serve.engine.lifecycle import IndexEntry
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.engine.registry import Registry, State
from rsm_serve.local import LocalPolicy, open_policy
from rsm_serve.server import PolicyServer, background_server
from rsm_serve.sessions.choice import open_session
from tests.bundles import make_model, make_spec, write_bundle
from tests.rsm_serve.commands.test_serve_cli import serving
from tests.rsm_serve.http.ask import get, http_of
from tests.rsm_serve.test_server import ANY_PORT, Gated, wait_until

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's accounts of processes")


def add_version(repo: Path, version: int, name: str = "tiny") -> Path:
    """A version that acts unlike the others (its noise has another shape), and appears complete."""
    path = write_bundle(repo / ".new", make_spec(name, str(version), steps=1 + version))
    (repo / name).mkdir(exist_ok=True)
    return path.rename(repo / name / str(version))


def damage(version_dir: Path) -> Path:
    with (version_dir / MODEL_FILE).open("r+b") as file:
        file.write(b"damaged")
    return version_dir


def point(repo: Path, version: object, name: str = "tiny") -> None:
    write_file(repo / name / CURRENT_FILE, f"{version}\n".encode())


class Fleet:
    """Control loops that check every answer by its seed against the version that it names."""

    def __init__(self, repo: Path, address: str, clients: int = 3) -> None:
        self.references: dict[str, LocalPolicy] = {}
        self.repo, self.address = repo, address
        self.answers: list[tuple[str, float]] = []  # version, latency
        self.failures: list[BaseException] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._loop, args=(number, number % 2 == 0)) for number in range(clients)
        ]

    def __enter__(self) -> Fleet:
        for thread in self._threads:
            thread.start()
        self.wait_for_answers()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def wait_for_answers(self, count: int = 30) -> None:
        before = len(self.answers)
        wait_until(lambda: bool(self.failures) or len(self.answers) >= before + count, "answers")
        assert not self.failures, self.failures

    def _loop(self, number: int, streams: bool) -> None:
        generator = np.random.default_rng(number)
        try:
            with PolicyClient(self.address, policy="tiny", timeout_s=30) as client, client.stream() as stream:
                act = stream.act if streams else client.act
                while not self._stop.is_set():
                    obs = generator.normal(size=(int(generator.integers(1, 4)), 4)).astype(np.float32)
                    seed = int(generator.integers(2**63))
                    answer = act(obs, seed=seed)
                    self._check(answer, obs, seed)
        except BaseException as error:
            self.failures.append(error)

    def _check(self, answer: Any, obs: Any, seed: int) -> None:
        with self._lock:  # a local policy is for one thread
            if answer.version not in self.references:
                path = self.repo / "tiny" / answer.version
                self.references[answer.version] = open_policy(path, "onnxruntime")
            wanted = self.references[answer.version].act(obs, seed=seed)
            assert np.allclose(answer.action, wanted.action, atol=1e-6)
            assert int(np.asarray(answer.seed).reshape(-1)[0]) == seed
            self.answers.append((answer.version, answer.timing.total_us))


@contextlib.contextmanager
def serve(repo: Path, **settings: Any) -> Iterator[PolicyServer]:
    config = ServerConfig.from_options(
        repo=repo, addresses=ANY_PORT, backend="onnxruntime", max_batch_size=8, drain_seconds=30, **settings
    )
    with background_server(config) as server:
        yield server


def run(server: PolicyServer, work: Any) -> Any:
    """A coroutine in the server's event loop."""
    loop = server.lifecycle.loop
    assert loop is not None
    return asyncio.run_coroutine_threadsafe(work, loop).result(60)


def acting_version(server: PolicyServer, policy: str = "tiny", **arguments: Any) -> str:
    with PolicyClient(server.addresses[0], policy=policy, timeout_s=30, **arguments) as client:
        return client.act(np.zeros(4)).version


def wait_for_version(server: PolicyServer, version: str, policy: str = "tiny") -> None:
    def acts() -> bool:
        with contextlib.suppress(PolicyNotFoundError, NotReadyError):
            return acting_version(server, policy) == version
        return False

    wait_until(acts, f"version {version}")


def settled(server: PolicyServer) -> list[IndexEntry]:
    """The index when nothing drains any more."""
    wait_until(lambda: not server.registry.draining, "drained lanes")
    return list(server.lifecycle.index())


def test_reloads_under_load_lose_and_corrupt_nothing(own_repo, caplog):
    """New versions, the same version anew, rollbacks and a broken one, while robots act."""
    caplog.set_level(logging.INFO)
    with serve(own_repo) as server, Fleet(own_repo, server.addresses[0]) as fleet:
        for version in (2, 3, 4):
            add_version(own_repo, version)
            run(server, server.lifecycle.refresh())
            fleet.wait_for_answers()
        for _ in range(3):
            run(server, server.lifecycle.load("tiny"))
        damage(add_version(own_repo, 5))
        run(server, server.lifecycle.refresh())
        fleet.wait_for_answers()
        for version in (2, 3, 4, 2):
            point(own_repo, version)
            run(server, server.lifecycle.refresh())
            fleet.wait_for_answers()
        assert acting_version(server) == "2"
        assert settled(server)[0] == ("tiny", "2", "READY", "")
        assert len(settled(server)) == 2, "2, and 5 that is broken"
    assert fleet.failures == []
    order = [version for version, _ in fleet.answers]
    assert set(order) == {"1", "2", "3", "4"}
    assert "Traceback" not in caplog.text
    assert caplog.text.count("unloaded tiny version") >= 9


def test_an_answer_under_way_comes_from_the_version_that_was_asked(own_repo):
    """The old lane drains: what it has is answered, new requests meet the new version, its session closes."""
    bundle = load_bundle(own_repo / "tiny")
    session = Gated(open_session(bundle, "onnxruntime"))
    lane = Lane(LocalPolicy(bundle, session), BatchLimits(4, 8))
    config = ServerConfig.from_options(
        repo=own_repo, addresses=ANY_PORT, backend="onnxruntime", drain_seconds=30
    )
    with background_server(config, [lane]) as server:
        old = PolicyClient(server.addresses[0], timeout_s=60)
        pinned = PolicyClient(server.addresses[0], version=1, timeout_s=60)
        session.open.clear()
        while session.entered.acquire(blocking=False):
            pass
        results: list[str] = []
        threads = [
            threading.Thread(target=lambda: results.append(old.act(np.zeros(4)).version)) for _ in range(3)
        ]
        threads[0].start()
        assert session.entered.acquire(timeout=30)
        for thread in threads[1:]:
            thread.start()
        wait_until(lambda: lane.batcher.queued_rows == 2, "two in the queue")
        add_version(own_repo, 2)
        run(server, server.lifecycle.refresh())
        assert old.act(np.zeros(4)).version == "2"
        assert results == []
        assert server.lifecycle.index() == [("tiny", "1", "UNLOADING", ""), ("tiny", "2", "READY", "")]
        with pytest.raises(NotReadyError, match="version '1'.*was replaced, this server has 2"):
            pinned.act(np.zeros(4))
        closed = [session.closed]
        session.open.set()
        for thread in threads:
            thread.join(30)
        assert results == ["1", "1", "1"]
        assert settled(server) == [("tiny", "2", "READY", "")]
        closed.append(session.closed)
        assert closed == [False, True]
        with pytest.raises(PolicyNotFoundError, match="version '1'.*has 2"):
            pinned.act(np.zeros(4))
        old.close()
        pinned.close()


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
            assert "sha256 of model.onnx is not the manifest's" in sentence
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
            with PolicyClient(server.addresses[0], policy="tiny", timeout_s=30) as client:
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
            assert check_health(address[0], "other", timeout_s=30) == "SERVING"
            shutil.rmtree(own_repo / "other")
            wait_until(lambda: server.registry.names == ["tiny"], "other to go")
            wait_until(lambda: check_health(address[0], "other", timeout_s=30) == "NOT_SERVING", "its health")
            assert check_health(address[0], timeout_s=30) == "SERVING"
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
            PolicyClient(address, policy="tiny", timeout_s=30) as client,
        ):
            assert policies == "tiny:1"
            add_version(own_repo, 2)
            wait_until(lambda: client.act(np.zeros(4)).version == "2", "version 2")
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=60)
            assert process.returncode == 0, log
            assert "'tiny': version 2 is current, after version 1" in log

    def test_a_start_in_the_midst_of_trouble(self, own_repo, caplog):
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

    def test_an_empty_repository_is_waited_for(self, own_repo, tmp_path, caplog):
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

    def test_a_start_follows_the_pointer(self, own_repo):
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


def test_a_signal_while_a_version_loads_drains_and_ends_the_process(own_repo):
    code = (
        "import sys, time; from rsm_serve.commands import serve_cli as cli\n"
        "from rsm_serve import startup\n"
        "really = startup.load_lane\n"
        "def load(repo, selection, **options):\n"
        "    if selection.version == 2: print('loading', flush=True); time.sleep(100)\n"
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
            _, log = process.communicate(timeout=30)
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
            assert check_health(address, "tiny", timeout_s=30) == "NOT_SERVING"
            with pytest.raises(PolicyNotFoundError, match="'tiny', this server has other"):
                acting_version(server)
            run(server, control.refresh())
            assert server.registry.names == ["other"], "unloaded until it is loaded again"
            add_version(own_repo, 3)
            run(server, control.load("tiny"))
            assert acting_version(server) == "3"
            assert check_health(address, "tiny", timeout_s=30) == "SERVING"
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
                assert gate.wait(30)
                return load(name, version)

            monkeypatch.setattr(server.lifecycle.versions, "load", slow)
            add_version(own_repo, 1, "other")
            pool = ThreadPoolExecutor(1)
            loading = pool.submit(run, server, server.lifecycle.refresh())
            assert entered.wait(30)
            assert server.lifecycle.index()[0] == ("other", "1", "LOADING", "")
            with pytest.raises(NotReadyError, match="'other' is being loaded"):
                acting_version(server, "other")
            assert acting_version(server) == "1"
            gate.set()
            loading.result(30)
            pool.shutdown()
            assert acting_version(server, "other") == "1"

    def test_a_caller_that_gives_up_leaves_the_load_to_its_end(self, own_repo, monkeypatch):
        with serve(own_repo) as server:
            load, gate, entered = server.lifecycle.versions.load, threading.Event(), threading.Event()

            def slow(name: str, version: int) -> Lane:
                entered.set()
                assert gate.wait(30)
                return load(name, version)

            async def impatient() -> None:
                task = asyncio.create_task(server.lifecycle.load("tiny"))
                await asyncio.to_thread(entered.wait, 30)
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
                assert gate.wait(30)
                return lane

            monkeypatch.setattr(server.lifecycle.versions, "load", slow)
            add_version(own_repo, 2)
            assert entered.wait(30)
            drain = pool.submit(run, server, server.drain())
            assert drain.result(30) is True
            for refused in (server.lifecycle.load("tiny"), server.lifecycle.unload("tiny")):
                with pytest.raises(NotReadyError, match="shutting down"):
                    run(server, refused)
            gate.set()
            wait_until(lambda: closed == ["2"], "the late lane to be closed")


def test_what_is_observed_follows_the_versions(own_repo):
    with serve(own_repo, http="127.0.0.1:0") as server:
        assert server.monitor is not None
        counts = server.monitor.counts
        add_version(own_repo, 2)
        run(server, server.lifecycle.refresh())
        damage(add_version(own_repo, 3))
        run(server, server.lifecycle.refresh())
        run(server, server.lifecycle.load("tiny", 2))  # its numbers begin anew
        acting_version(server)
        settled(server)
        assert [(lane.policy, lane.version, lane.rows) for lane in counts.lanes] == [("tiny", "2", 1)]
        assert counts.loads == {("tiny", "ok"): 3, ("tiny", "failed"): 1}


@ON_LINUX
def test_memory_returns_to_its_baseline_after_50_reloads(own_repo):
    """A session of this graph takes 1 MB and more: fifty that leak would be seen."""
    shutil.rmtree(own_repo / "tiny")
    spec = make_spec("tiny", steps=20, particles=32)
    padding = np.random.default_rng(0).bytes(2 * 2**20)
    write_bundle(own_repo, spec, model=make_model(spec, work=20) + _padding(padding))
    # In a process of its own: what other tests left in the allocator moves by more than what is looked for.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        opened, closed, threads, grown_mb = process.submit(reload_60_times, own_repo).result(120)
    assert (opened, closed, threads) == (60, 60, 0)
    assert grown_mb < 20, "fifty models of 2 MB and their sessions would be more than 150 MB"


def reload_60_times(repo: Path) -> tuple[int, int, int, float]:
    """Loads, closed policies, and by how many threads and megabytes the last 50 loads made the process grow."""
    opened: list[int] = []
    closed: list[int] = []
    really_close = LocalPolicy.close

    def close(policy: LocalPolicy) -> None:
        closed.append(1)
        really_close(policy)

    with (
        mock.patch.object(LocalPolicy, "close", close),
        serve(repo) as server,
        PolicyClient(server.addresses[0], timeout_s=30) as client,
    ):

        def reload() -> float:
            run(server, server.lifecycle.load("tiny"))
            opened.append(1)
            client.act(np.zeros(4))
            wait_until(lambda: not server.registry.draining, "the old lane to close")
            return resident_mb()

        # Loads overlap with what the last ones give back; the least of ten is what stays.
        before_mb = min([reload() for _ in range(10)][5:])
        threads = threading.active_count()
        grown_mb = min([reload() for _ in range(50)][40:]) - before_mb
        return len(opened), len(closed), max(0, threading.active_count() - threads), grown_mb


def _padding(content: bytes) -> bytes:
    """An unknown field of the ONNX file (protobuf field 500, bytes): carried along, and read by nobody."""
    size, digits = len(content), b""
    while size > 0x7F:
        digits += bytes([size & 0x7F | 0x80])
        size >>= 7
    key = 500 << 3 | 2
    return bytes([key & 0x7F | 0x80, key >> 7]) + digits + bytes([size]) + content


def resident_mb() -> float:
    """What is in use; freed memory that the allocator keeps is given back first."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc's
        trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class TestCanaries:
    def test_the_specification_is_the_current_versions(self, own_repo):
        """By lot, a client that always meets the current version would send what the canary takes."""
        write_bundle(own_repo, make_spec("tiny", "2", obs_size=6))
        name = next(name for name in map(str, range(99)) if lot("tiny", name, None) >= 0.9)
        with serve(own_repo, canaries=(Canary("tiny", 2, 0.9),)) as server:
            for _ in range(5):
                with PolicyClient(server.addresses[0], policy="tiny", client_id=name, timeout_s=30) as client:
                    assert client.act(np.zeros(4)).version == "1"

    def test_a_canary_comes_back_with_its_policy(self, own_repo):
        add_version(own_repo, 2)
        with serve(own_repo, canaries=(Canary("tiny", 2, 1.0),)) as server:
            assert acting_version(server) == "2"
            run(server, server.lifecycle.unload("tiny"))
            run(server, server.lifecycle.load("tiny"))
            assert acting_version(server) == "2"
            assert server.registry.current("tiny") == 1

    def test_clients_stick_to_their_version_and_the_answer_names_it(self, own_repo):
        add_version(own_repo, 2)
        share = 0.4
        with serve(own_repo, canaries=(Canary("tiny", 2, share),)) as server:
            assert settled(server) == [("tiny", "1", "READY", ""), ("tiny", "2", "READY", "")]
            for number in range(12):
                name = f"robot-{number}"
                with (
                    PolicyClient(server.addresses[0], timeout_s=30, client_id=name) as client,
                    client.stream() as s,
                ):
                    versions = {
                        act(np.zeros(4), seed=seed).version for act in (client.act, s.act) for seed in (1, 2)
                    }
                    versions.add(client.act(np.zeros(4), deterministic=True).version)
                assert versions == {"2" if lot("tiny", name, None) < share else "1"}
            assert acting_version(server, client_id="robot-0", version=1) == "1"
            assert acting_version(server, client_id="robot-0", version=2) == "2"

    def test_requests_without_a_client_are_drawn_one_by_one_and_again_by_their_seed(self, own_repo):
        add_version(own_repo, 2)
        with (
            serve(own_repo, canaries=(Canary("tiny", 2, 0.5),)) as server,
            PolicyClient(server.addresses[0], timeout_s=30) as client,
        ):
            local = {number: open_policy(own_repo / "tiny" / number, "onnxruntime") for number in ("1", "2")}
            for seed in range(20):
                first, again = (client.act(np.zeros(4), seed=seed) for _ in range(2))
                assert first.version == again.version == ("2" if lot("tiny", "", seed) < 0.5 else "1")
                assert np.allclose(
                    first.action, local[first.version].act(np.zeros(4), seed=seed).action, atol=1e-6
                )
            assert {client.act(np.zeros(4)).version for _ in range(64)} == {"1", "2"}
            noise = np.zeros(client.spec.noise_shape, np.float32)
            assert {client.act(np.zeros(4), deterministic=True).version for _ in range(8)} == {"1"}
            assert {client.act(np.zeros(4), noise=noise).version for _ in range(8)} == {"1"}

    def test_a_canary_becomes_current_by_the_pointer_and_newer_versions_come_beside_it(self, own_repo):
        add_version(own_repo, 2)
        with serve(own_repo, canaries=(Canary("tiny", 2, 0.5),)) as server:
            add_version(own_repo, 3)
            run(server, server.lifecycle.refresh())
            assert [entry[1] for entry in settled(server)] == ["2", "3"]
            assert server.registry.current("tiny") == 3
            point(own_repo, 2)
            run(server, server.lifecycle.refresh())
            assert [entry[1] for entry in settled(server)] == ["2"]
            assert acting_version(server) == "2"

    def test_a_canary_that_is_not_there_is_a_mistake(self, own_repo):
        canaries = (Canary("tiny", 2, 0.5),)
        with pytest.raises(BundleError, match="version 2.*got 1"), serve(own_repo, canaries=canaries):
            pass


class TestRegistry:
    """The rules that no server is needed for."""

    @pytest.fixture
    def lanes(self, tmp_path):
        lanes = []
        for version in ("1", "2"):
            path = write_bundle(tmp_path, make_spec("p", version))
            bundle = load_bundle(path)
            lanes.append(Lane(LocalPolicy(bundle, open_session(bundle, "onnxruntime")), BatchLimits()))
        return lanes

    def test_the_newest_is_current_unless_another_is_made(self, lanes):
        registry = Registry(lanes)
        assert (registry.current("p"), registry.ready("p"), registry.names) == (2, {1, 2}, ["p"])
        registry.set_current("p", 1)
        assert registry.find("", "") is registry.find("p", "1") is lanes[0]

    def test_a_canary_is_not_current_and_falls_back_to_it_when_it_is_gone(self, lanes):
        registry = Registry(lanes, canaries=[Canary("p", 2, 1.0)])
        assert registry.current("p") == 1
        assert registry.find("p", "", client_id="r") is lanes[1]
        assert registry.find("", "", seed=3) is lanes[1]
        assert registry.find("p", "", fixed=True) is lanes[0]
        assert registry.find("p", "", client_id="r", fixed=True) is lanes[1]
        registry.withdraw("p", 2)
        assert registry.find("p", "", client_id="r") is lanes[0]

    def test_states(self, lanes):
        registry = Registry(lanes[:1])
        registry.loading("p", 2)
        registry.failed("p", 3, "because")
        states = [(status.version, status.state, status.reason) for status in registry.index()]
        assert states == [(1, State.READY, ""), (2, State.LOADING, ""), (3, State.FAILED, "because")]
        with pytest.raises(NotReadyError, match="is being loaded"):
            registry.find("p", "2")
        with pytest.raises(NotReadyError, match="failed to load"):
            registry.find("p", "3")
        registry.publish(lanes[1])
        registry.set_current("p", 2)
        assert registry.withdraw("p", 1) is lanes[0]
        assert [status.state for status in registry.index()] == [State.DRAINING, State.READY, State.FAILED]
        registry.drained(lanes[0])
        registry.forget("p", 3)
        assert [status.version for status in registry.index()] == [2]
        assert registry.failure("p", 3) == ""

    def test_the_same_version_anew_takes_the_place_of_the_old(self, lanes, tmp_path):
        registry = Registry(lanes[:1])
        bundle = load_bundle(tmp_path / "p" / "1")
        anew = Lane(LocalPolicy(bundle, open_session(bundle, "onnxruntime")), BatchLimits())
        assert registry.publish(anew) is lanes[0]
        assert registry.find("p", "") is anew
        assert registry.draining == [lanes[0]]


class TestThreads:
    def test_results_and_errors_come_back(self):
        async def main():
            assert await in_thread(lambda: 3) == 3
            with pytest.raises(ZeroDivisionError):
                await in_thread(lambda: 1 / 0)

        asyncio.run(main())

    @pytest.mark.parametrize("loop_ends_first", [False, True])
    def test_a_result_that_nobody_waits_for_is_let_go(self, loop_ends_first):
        gate, let_go = threading.Event(), threading.Event()

        def work() -> int:
            assert gate.wait(30)
            return 7

        async def main():
            task = asyncio.create_task(in_thread(work, abandon=lambda value: let_go.set()))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            if not loop_ends_first:
                gate.set()
                while not let_go.is_set():
                    await asyncio.sleep(0.001)

        asyncio.run(main())
        gate.set()
        assert let_go.wait(30)


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, in nanosecond resolution."""
    return time.clock_gettime(~pid << 3 | 2)  # as clock_getcpuclockid(3) makes it


@ON_LINUX
@pytest.mark.parametrize("more", [[], ["--poll", "1", "--workers", "1"]])
def test_an_idle_server_costs_less_than_one_percent_of_a_core(own_repo, more):
    arguments = ["--repo", str(own_repo), "--address", "127.0.0.1:0", "--backend", "onnxruntime"]
    with (
        serving([*arguments, *more]) as (process, address, _),
        PolicyClient(address, timeout_s=30) as client,
        client.stream() as stream,
    ):
        stream.act(np.zeros(4))
        time.sleep(0.3)
        started, cpu = time.monotonic(), cpu_seconds(process.pid)
        time.sleep(2.0)
        share = (cpu_seconds(process.pid) - cpu) / (time.monotonic() - started)
        assert stream.act(np.zeros(4)).action.shape == (2,), "it was idle, not gone"
    assert share < 0.01
