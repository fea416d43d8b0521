"""Versions come and go under load: no request is lost or mixed up, and memory is given back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import re
import shutil
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from rsm_common.errors import (
    NotReadyError,
    PolicyNotFoundError,
)
from rsm_serve.bundle.contract import load_bundle
from rsm_serve.client import PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.local import LocalPolicy, open_policy
from rsm_serve.server import background_server
from rsm_serve.sessions.choice import open_session
from tests.bundles import make_model, make_spec, write_bundle
from tests.hang import HANG_S
from tests.rsm_serve.commands.test_serve_cli import started
from tests.rsm_serve.test_server import ANY_PORT, Gated, wait_until
from tests.rsm_serve.versions import ON_LINUX, acting_version, add_version, damage, point, run, serve, settled


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
            thread.join(HANG_S)

    def wait_for_answers(self, count: int = 30) -> None:
        before = len(self.answers)
        wait_until(lambda: bool(self.failures) or len(self.answers) >= before + count, "answers")
        assert not self.failures, self.failures

    def _loop(self, number: int, streams: bool) -> None:
        generator = np.random.default_rng(number)
        try:
            with (
                PolicyClient(self.address, policy="tiny", timeout_s=HANG_S) as client,
                client.stream() as stream,
            ):
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
        repo=own_repo, addresses=ANY_PORT, backend="onnxruntime", drain_seconds=HANG_S
    )
    with background_server(config, [lane]) as server:
        old = PolicyClient(server.addresses[0], timeout_s=HANG_S)
        pinned = PolicyClient(server.addresses[0], version=1, timeout_s=HANG_S)
        session.open.clear()
        while session.entered.acquire(blocking=False):
            pass
        results: list[str] = []
        threads = [
            threading.Thread(target=lambda: results.append(old.act(np.zeros(4)).version)) for _ in range(3)
        ]
        threads[0].start()
        assert session.entered.acquire(timeout=HANG_S)
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
            thread.join(HANG_S)
        assert results == ["1", "1", "1"]
        assert settled(server) == [("tiny", "2", "READY", "")]
        closed.append(session.closed)
        assert closed == [False, True]
        with pytest.raises(PolicyNotFoundError, match="version '1'.*has 2"):
            pinned.act(np.zeros(4))
        old.close()
        pinned.close()


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
        opened, closed, threads, grown_mb = process.submit(reload_60_times, own_repo).result(HANG_S)
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
        PolicyClient(server.addresses[0], timeout_s=HANG_S) as client,
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
    """An unknown field of the ONNX file (protobuf field 500, bytes): kept by readers, and not used."""
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


def wakes(pid: int) -> int:
    """How often the threads of a process have gone to sleep, which is how often they wake up."""
    found = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with contextlib.suppress(OSError):  # the thread has ended
            found += int(re.findall(r"^voluntary_ctxt_switches:\s*(\d+)", status.read_text(), re.M)[0])
    return found


@ON_LINUX
def test_an_idle_server_wakes_up_only_to_look_at_the_repository(own_repo, tmp_path):
    """Counted by looks, not by time; docs/explanation/request.md has the CPU time of an idle server."""
    told = tmp_path / "looks"
    told.touch()
    code = (
        "import sys; from rsm_serve.commands import serve_cli as cli; from rsm_serve.engine import follow\n"
        "look, told = follow.Follower.look, open(sys.argv[1], 'ab', 0)\n"
        "def counted(self): told.write(b'.'); return look(self)\n"
        "follow.Follower.look = counted\n"
        "sys.exit(cli.main(sys.argv[2:]))"
    )
    arguments = ["--repo", str(own_repo), "--address", "127.0.0.1:0", "--backend", "onnxruntime"]
    command = [sys.executable, "-c", code, str(told), *arguments, "--poll", "0.05", "--workers", "1"]
    with (
        started(command) as (process, address, _),
        PolicyClient(address, timeout_s=HANG_S) as client,
        client.stream() as stream,
    ):
        stream.act(np.zeros(4))
        looks = told.stat().st_size
        before = wakes(process.pid)
        wait_until(lambda: told.stat().st_size >= looks + 40, "looks at the repository")
        count, looks = wakes(process.pid) - before, told.stat().st_size - looks
        assert stream.act(np.zeros(4)).action.shape == (2,), "it was idle, not gone"
    # About 8 for each look: timer, thread, event loop. Beside two busy processes it is as many.
    assert looks / 2 < count < 20 * looks
