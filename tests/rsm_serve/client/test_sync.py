"""Clients: addresses, connection problems, unix sockets, asyncio, the check against an environment."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from rsm_common.errors import (
    AddressError,
    DeadlineExpiredError,
    InvalidRequestError,
    NotReadyError,
    RequestError,
    UnsupportedEnvError,
)
from rsm_serve.client import AsyncPolicyClient, PolicyClient, check_health
from rsm_serve.config import ServerConfig
from rsm_serve.local import open_policy
from rsm_serve.server import background_server
from tests.hang import HANG_S


@pytest.fixture(scope="module")
def address(bundle_repo):
    with background_server(ServerConfig(repo=bundle_repo, addresses=("127.0.0.1:0",))) as server:
        yield server.addresses[0]


@pytest.fixture
def silent_port():
    """A port that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def unused_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def test_an_interrupted_step_leaves_no_answer_behind(address, monkeypatch):
    with PolicyClient(address, timeout_s=HANG_S) as client, client.stream() as stream:
        assert stream.act(np.zeros(4), seed=1).seed == 1
        real = stream._responses

        class Interrupted:
            cancel = real.cancel

            def __next__(self):
                next(real)
                raise KeyboardInterrupt

        stream._responses = Interrupted()
        with pytest.raises(KeyboardInterrupt):
            stream.act(np.zeros(4), seed=2)
        assert stream.act(np.zeros(4), seed=3).seed == 3
        stream.close()
        with pytest.raises(NotReadyError, match="closed here"):
            stream.act(np.zeros(4))


def test_the_answer_to_another_request_is_refused(address, monkeypatch):
    with PolicyClient(address, timeout_s=HANG_S) as client:
        real = client._act

        def confused(request, timeout):
            response = real(request, timeout=timeout)
            response.request_id += 1
            return response

        monkeypatch.setattr(client, "_act", confused)
        with pytest.raises(RequestError, match="wanted the answer to request"):
            client.act(np.zeros(4))


@pytest.mark.parametrize("timeout_s", [0, -1, float("inf"), float("nan"), 1e10, 86_401])
def test_every_call_has_a_deadline(timeout_s, address):
    wanted = r"wanted {}timeout_s > 0 and at most 86400 s, a day, got .*; every call has a deadline"
    for kind in (PolicyClient, AsyncPolicyClient):
        with pytest.raises(InvalidRequestError, match=wanted.format("")):
            kind("127.0.0.1:1", timeout_s=timeout_s)
        with pytest.raises(InvalidRequestError, match=wanted.format("connect_")):
            kind("127.0.0.1:1", connect_timeout_s=timeout_s)
    with pytest.raises(InvalidRequestError, match=wanted.format("")):
        check_health("127.0.0.1:1", timeout_s=timeout_s)
    with PolicyClient(address) as client, pytest.raises(InvalidRequestError, match=wanted.format("")):
        client.stream(timeout_s=timeout_s)


def test_the_longest_deadline(address):
    with PolicyClient(address, timeout_s=86_400, connect_timeout_s=86_400) as client, client.stream() as stream:
        assert client.act(np.zeros(4), seed=1).seed == 1
        assert stream.act(np.zeros(4), seed=2).seed == 2
        assert stream.act(np.zeros(4), seed=3).seed == 3
    assert check_health(address, timeout_s=86_400) == "SERVING"


def test_no_server_at_the_address(one_attempt):
    address = unused_port()
    with pytest.raises(NotReadyError, match=f"{address}.*start one with rsm-serve"):
        PolicyClient(address, connect_timeout_s=HANG_S)
    with pytest.raises(NotReadyError, match=address):
        check_health(address, timeout_s=HANG_S)

    async def main():
        async with AsyncPolicyClient(address, connect_timeout_s=HANG_S):
            pass

    with pytest.raises(NotReadyError, match=f"{address}.*start one with rsm-serve"):
        asyncio.run(main())


def test_a_server_that_never_answers(silent_port):
    with pytest.raises(DeadlineExpiredError, match=f"{silent_port} within 0.2 s"):
        PolicyClient(silent_port, connect_timeout_s=0.2)


def test_a_server_that_goes_away(bundle_repo):
    with background_server(ServerConfig(repo=bundle_repo, addresses=("127.0.0.1:0",))) as server:
        client = PolicyClient(server.addresses[0], timeout_s=HANG_S)
        stream = client.stream()
        stream.act(np.zeros(4))
    for act in (client.act, stream.act):
        with pytest.raises(NotReadyError):
            act(np.zeros(4))
    stream.close()
    client.close()


def test_a_closed_client_says_so(address):
    with PolicyClient(address, timeout_s=HANG_S) as client:
        stream = client.stream()
        stream.act(np.zeros(4))
    for act in (client.act, stream.act, client.stream().act):
        with pytest.raises(NotReadyError, match="closed here"):
            act(np.zeros(4))
    stream.close()

    async def main():
        async with AsyncPolicyClient(address, timeout_s=HANG_S) as client:
            stream = client.stream()
        for act in (client.act, stream.act):
            with pytest.raises(NotReadyError, match="closed here"):
                await act(np.zeros(4))

    asyncio.run(main())


def test_a_unix_socket(bundle_repo, tmp_path):
    where = f"unix:{tmp_path}/rsm.sock"
    config = ServerConfig(repo=bundle_repo, addresses=("127.0.0.1:0", where))
    with background_server(config) as server, PolicyClient(where, timeout_s=HANG_S) as client:
        assert server.addresses[1] == where
        assert client.act(np.zeros(4), seed=1).seed == 1
        with pytest.raises(AddressError, match="another server does"), background_server(config):
            pass
        assert client.act(np.zeros(4), seed=1).seed == 1
    # What a dead server has left behind does not stop the next one.
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    config = ServerConfig(repo=bundle_repo, addresses=(f"unix:{tmp_path}/dead.sock",))
    with background_server(config) as server, PolicyClient(server.addresses[0], timeout_s=HANG_S) as client:
        client.act(np.zeros(4))


def test_many_threads_share_one_client(address, bundle_repo):
    local = open_policy(bundle_repo / "tiny")
    obs = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    expected = [local.act(row, seed=n).action for n, row in enumerate(obs)]
    wrong: list[int] = []
    with PolicyClient(address, timeout_s=HANG_S) as client:

        def work(n: int) -> None:
            for _ in range(20):
                if not np.allclose(client.act(obs[n], seed=n).action, expected[n], atol=1e-6):
                    wrong.append(n)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


class TestAsyncClient:
    def test_it_acts_like_the_others(self, address, bundle_repo):
        local = open_policy(bundle_repo / "tiny")
        obs = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)

        async def main():
            async with AsyncPolicyClient(f"grpc://{address}/tiny", timeout_s=HANG_S) as client:
                assert client.spec == local.spec
                answers = await asyncio.gather(*(client.act(row, seed=n) for n, row in enumerate(obs)))
                async with client.stream() as stream:
                    steps = [await stream.act(row, seed=n) for n, row in enumerate(obs)]
                    with pytest.raises(InvalidRequestError, match="1 to 64 rows"):
                        await stream.act(np.zeros((65, 4)))
                    assert (await stream.act(obs[0], seed=5)).seed == 5
                with pytest.raises(InvalidRequestError, match="1 to 64 rows"):
                    await client.act(np.zeros((65, 4)))
            return answers, steps

        for answers in asyncio.run(main()):
            for n, answer in enumerate(answers):
                assert np.allclose(answer.action, local.act(obs[n], seed=n).action, atol=1e-6)

    def test_it_must_be_connected_first(self, address):
        async def main():
            await AsyncPolicyClient(address).act(np.zeros(4))

        with pytest.raises(NotReadyError, match="async with"):
            asyncio.run(main())

    def test_a_stream_that_the_server_ended_between_two_steps(self, bundle_repo, tmp_path):
        where = f"unix:{tmp_path}/rsm.sock"
        config = ServerConfig(repo=bundle_repo, addresses=(where,))

        async def main():
            with contextlib.ExitStack() as first:
                first.enter_context(background_server(config))
                client = await AsyncPolicyClient(where, timeout_s=HANG_S).connect()
                stream = client.stream()
                await stream.act(np.zeros(4))
                await asyncio.to_thread(first.close)
            while not stream._stream.done():
                await asyncio.sleep(0.01)
            with pytest.raises(NotReadyError):
                await stream.act(np.zeros(4))
            with background_server(config):
                assert (await stream.act(np.zeros(4), seed=2)).seed == 2
                await stream.close()
                await client.close()

        asyncio.run(asyncio.wait_for(main(), HANG_S))

    def test_a_closed_stream_says_so(self, address):
        async def main():
            async with AsyncPolicyClient(address, timeout_s=HANG_S) as client:
                async with client.stream() as stream:
                    await stream.act(np.zeros(4))
                with pytest.raises(NotReadyError, match="the stream to .* was closed here; open another"):
                    await stream.act(np.zeros(4))
                assert (await client.act(np.zeros(4), seed=2)).seed == 2

        asyncio.run(main())

    def test_a_late_step(self, address, silent_port):
        async def main():
            async with AsyncPolicyClient(address, timeout_s=HANG_S) as client:
                stream = client.stream(timeout_s=1e-6)
                with pytest.raises(DeadlineExpiredError, match="within 1e-06 s"):
                    await stream.act(np.zeros(4))
                stream._timeout_s = HANG_S
                assert (await stream.act(np.zeros(4), seed=2)).seed == 2
                await stream.close()

        asyncio.run(main())


def test_the_check_against_an_environment(address):
    def box(low, high):
        return SimpleNamespace(shape=np.shape(low), low=np.array(low), high=np.array(high))

    def env(size):
        return SimpleNamespace(
            observation_space=box([0.0] * size, [1.0] * size), action_space=box([-3.0] * 2, [1.0] * 2)
        )

    with PolicyClient(address) as client:
        client.check_env(env(4))
        with pytest.raises(UnsupportedEnvError, match="wanted 4 observation elements, the environment has 5"):
            client.check_env(env(5))


def test_a_damaged_answer_is_an_error_not_an_action(address, monkeypatch):
    with PolicyClient(address, timeout_s=HANG_S) as client:
        real = client._act

        def damaged(request, timeout):
            response = real(request, timeout=timeout)
            response.action = response.action[:-1]
            return response

        monkeypatch.setattr(client, "_act", damaged)
        with pytest.raises(RequestError, match="damaged"):
            client.act(np.zeros(4))
