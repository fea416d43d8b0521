"""Health, the data of the status page and its samples, asked of a real server."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rsm_common.errors import (
    BackendError,
)
from rsm_common.seeds import expand_seed
from rsm_serve.bundle.contract import load_bundle
from rsm_serve.client import PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.http.endpoints import Monitor
from rsm_serve.local import LocalPolicy, open_policy
from rsm_serve.server import background_server
from rsm_serve.sessions.choice import open_session
from tests.bundles import make_probe, make_spec, write_bundle
from tests.hang import HANG_S
from tests.rsm_serve.http.ask import ANY_PORT, get, http_of
from tests.rsm_serve.test_server import Gated, wait_until


class TestHealth:
    def test_of_the_server_and_of_each_policy(self, server):
        http = http_of(server)
        assert get(f"{http}/healthz")[:2] == (200, "serving\n")
        assert get(f"{http}/healthz/tiny")[:2] == (200, "serving\n")
        assert get(f"{http}/healthz/nope")[0] == 404

    def test_loading_and_draining_are_503(self):
        async def main() -> None:
            board = Monitor()
            await board.open(ANY_PORT)
            for path in ("/healthz", "/healthz/tiny"):
                assert (await asyncio.to_thread(get, board.address + path))[:2] == (503, "loading\n")
            status, body, _ = await asyncio.to_thread(get, f"{board.address}/api/sample?policy=tiny")
            assert (status, "being loaded" in body) == (503, True)
            board.draining()
            assert (await asyncio.to_thread(get, f"{board.address}/healthz"))[:2] == (503, "draining\n")
            board.close()

        asyncio.run(main())

    def test_a_draining_server_says_so_while_it_answers_what_is_queued(self, bundle_repo):
        bundle = load_bundle(bundle_repo / "tiny")
        session = Gated(open_session(bundle))
        lane = Lane(LocalPolicy(bundle, session), BatchLimits())
        config = ServerConfig.from_options(repo=bundle_repo, addresses=(ANY_PORT,), http=ANY_PORT)
        with background_server(config, [lane]) as server, ThreadPoolExecutor(1) as pool:
            with PolicyClient(server.addresses[0], timeout_s=HANG_S) as client:
                session.open.clear()
                while session.entered.acquire(blocking=False):
                    pass
                held = pool.submit(client.act, np.zeros(4))
                assert session.entered.acquire(timeout=HANG_S)
                assert lane.batcher._loop is not None
                drained = asyncio.run_coroutine_threadsafe(server.drain(), lane.batcher._loop)
                wait_until(lambda: get(f"{http_of(server)}/healthz")[:2] == (503, "draining\n"), "draining")
                session.open.set()
                assert held.result(HANG_S).action.shape == (2,)
                assert drained.result(HANG_S)
            with pytest.raises(OSError):
                get(f"{http_of(server)}/healthz")


class TestSample:
    def test_it_is_the_policys_answer_to_as_many_seeds(self, server, bundle_repo):
        answer = json.loads(get(f"{http_of(server)}/api/sample?policy=tiny:1&obs=1,2,-3,0.5&n=21&seed=7")[1])
        local = open_policy(bundle_repo / "tiny")
        expected = local.act(np.tile([1, 2, -3, 0.5], (21, 1)), seed=expand_seed(7, 21))
        assert np.allclose(answer["action"], expected.action, atol=1e-5)
        assert np.allclose(answer["q"], np.asarray(expected.q), atol=1e-5)
        assert (answer["seed"], answer["version"], answer["obs"]) == ("7", "1", [1, 2, -3, 0.5])

    def test_observations_are_zeros_probe_rows_or_numbers(self, server):
        def obs(text: str) -> list[float]:
            found: list[float] = json.loads(get(f"{http_of(server)}/api/sample?n=1&obs={text}")[1])["obs"]
            return found

        assert obs("zeros") == obs("") == [0, 0, 0, 0]
        assert np.allclose(obs("probe:2"), make_probe(make_spec("tiny")).obs[2], atol=1e-5)
        assert obs("1e3%20-2.5,%203,4") == [1000, -2.5, 3, 4]

    @pytest.mark.parametrize(
        ("query", "status", "message"),
        [
            ("obs=1,2", 400, r"shape \[4\].*got \[2\]"),
            ("obs=1,2,3,nan", 400, "finite"),
            ("obs=1,2,3,four", 400, "wanted numbers"),
            ("obs=probe:4", 400, "K below 4"),
            ("obs=probe:-1", 400, "K below 4"),
            ("n=0", 400, "n as a whole number from 1 to 512"),
            ("n=513", 400, "from 1 to 512, got '513'"),
            ("n=x", 400, "got 'x'"),
            (f"seed={2**64}", 400, "seed as a whole number"),
            ("policy=nope", 404, "'nope'"),
            ("policy=tiny:9", 404, "version '9'"),
        ],
    )
    def test_a_mistake_is_one_sentence(self, server, query, status, message):
        found, body, _ = get(f"{http_of(server)}/api/sample?{query}")
        assert found == status
        assert re.search(message, json.loads(body)["error"])

    def test_one_at_a_time_and_robots_wait_for_a_few_rows_only(self, bundle_repo):
        bundle = load_bundle(bundle_repo / "tiny")
        session = Gated(open_session(bundle))
        lane = Lane(LocalPolicy(bundle, session), BatchLimits())
        config = ServerConfig.from_options(repo=bundle_repo, addresses=(ANY_PORT,), http=ANY_PORT)
        with background_server(config, [lane]) as server, ThreadPoolExecutor(2) as pool:
            session.open.clear()
            session.batches.clear()
            while session.entered.acquire(blocking=False):
                pass
            drawn = pool.submit(get, f"{http_of(server)}/api/sample?n=20")
            assert session.entered.acquire(timeout=HANG_S)
            status, body, _ = get(f"{http_of(server)}/api/sample?n=20")
            assert (status, "one sample at a time" in body) == (429, True)
            session.open.set()
            assert drawn.result(HANG_S)[0] == 200
            assert session.batches == [8, 8, 4]

    def test_no_observation_is_logged(self, server, caplog):
        caplog.set_level(logging.DEBUG)
        get(f"{http_of(server)}/api/sample?n=1&obs=123.456,1,2,3")
        get(f"{http_of(server)}/api/sample?n=1&obs=123.456,1,2,nan")
        lane = server.registry.lanes[0]

        def fail(*_: object) -> object:
            raise RuntimeError("no")

        lane._policy._graph._session.run = fail
        assert get(f"{http_of(server)}/api/sample?n=1&obs=123.456,1,2,3")[0] == 500
        with PolicyClient(server.addresses[0], timeout_s=HANG_S) as client, pytest.raises(BackendError):
            client.act([123.456, 1, 2, 3])
        assert "a batch of 1 rows failed" in caplog.text
        assert "123.4" not in caplog.text


def test_the_status_has_what_the_page_shows(tmp_path):
    for spec in (make_spec("tiny", "1"), make_spec("tiny", "2"), make_spec("other", "3", has_q=False)):
        write_bundle(tmp_path, spec)
    with background_server(
        ServerConfig.from_options(repo=tmp_path, addresses=(ANY_PORT,), http=ANY_PORT)
    ) as server:
        with PolicyClient(server.addresses[0], policy="tiny", timeout_s=HANG_S) as client:
            client.act(np.zeros((3, 4)))
        status = json.loads(get(f"{http_of(server)}/api/status")[1])
        spec = json.loads(get(f"{http_of(server)}/api/spec?policy=other:3")[1])
        sample = json.loads(get(f"{http_of(server)}/api/sample?policy=other&n=2")[1])
    assert status["state"] == "serving"
    assert status["addresses"] == list(server.addresses)
    assert [(policy["name"], policy["version"]) for policy in status["policies"]] == [
        ("other", "3"),
        ("tiny", "2"),
    ]
    tiny = status["policies"][1]
    assert tiny["rows"] == 3
    assert tiny["default"] is True
    assert tiny["probe_rows"] == 4
    assert sum(tiny["request_s"]["counts"]) == 1
    assert len(tiny["request_s"]["counts"]) == len(status["latency_bounds_s"]) + 1
    assert tiny["batch_rows"]["counts"][status["rows_bounds"].index(3)] == 1
    assert spec["env_id"] == "Tiny-v0"
    assert sample["q"] is None
