"""Channels: how soon they connect again, proxies, and a server that is starting."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from rsm_common.errors import NotReadyError, PolicyNotFoundError
from rsm_serve.client import AsyncPolicyClient, PolicyClient, check_health
from rsm_serve.client.call import Attempts
from rsm_serve.client.connection import CHANNEL_OPTIONS, PROXY_VARIABLES, RECONNECT_OPTIONS, Connection
from rsm_serve.client.target import Target
from rsm_serve.config import ServerConfig
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.server import background_server
from rsm_serve.wire.codec import ERROR_MARK, SERVICE
from tests.bundles import make_spec
from tests.hang import HANG_S

DEFAULT_ATTEMPTS = 4
"""Attempts of a channel with gRPC's own pauses; the fourth comes after about 5 s."""


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def loading_server(
    refusals: int, status: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
) -> Iterator[tuple[str, list[bytes]]]:
    """(address, requests so far) of a server that refuses the first requests for a specification."""
    asked: list[bytes] = []

    def get_spec(request: bytes, context: grpc.ServicerContext) -> bytes:
        asked.append(request)
        if len(asked) <= refusals:
            context.set_trailing_metadata((ERROR_MARK,))
            context.abort(status, "policy 'tiny' is being loaded; try again in a moment")
        return pb.GetSpecResponse(spec_json=make_spec("tiny").to_json()).SerializeToString()

    handler = grpc.method_handlers_generic_handler(
        SERVICE, {"GetSpec": grpc.unary_unary_rpc_method_handler(get_spec)}
    )
    server = grpc.server(ThreadPoolExecutor(1), handlers=(handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", asked
    server.stop(None).wait()


class Refuser:
    """A port that closes every connection at once, and counts them."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.count = 0
        self.enough = threading.Event()
        threading.Thread(target=self._refuse, daemon=True).start()

    def _refuse(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._listener.accept()[0].close()
                self.count += 1
                if self.count >= DEFAULT_ATTEMPTS:
                    self.enough.set()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def refusers() -> Iterator[tuple[Refuser, Refuser]]:
    both = Refuser(), Refuser()
    yield both
    for refuser in both:
        refuser.close()


class TestReconnecting:
    def test_the_pause_between_attempts_is_at_most_a_second(self):
        options = dict(RECONNECT_OPTIONS)
        assert set(RECONNECT_OPTIONS) < set(CHANNEL_OPTIONS)
        assert options["grpc.max_reconnect_backoff_ms"] == 1_000
        assert options["grpc.initial_reconnect_backoff_ms"] < 1_000
        # gRPC's name for the time of one attempt. A TLS handshake over a slow line must fit.
        assert 3_000 <= options["grpc.min_reconnect_backoff_ms"] <= 6_000

    def test_a_channel_tries_more_often_than_one_of_grpc_alone(self, refusers):
        """Counted and compared, because a busy machine slows both channels down alike."""
        ours, default = refusers
        ready = []
        with contextlib.ExitStack() as stack:
            for channel in (
                Connection.to(Target.parse(ours.address), token="").channel(),
                grpc.insecure_channel(default.address, options=(("grpc.use_local_subchannel_pool", 1),)),
            ):
                stack.enter_context(channel)
                ready.append(grpc.channel_ready_future(channel))
            assert default.enough.wait(HANG_S)
            # About 8 attempts with the cap, and about as many as the other channel without it.
            assert ours.count >= default.count + 2
            for future in ready:
                future.cancel()

    def test_an_asyncio_channel_tries_as_often(self, refusers):
        ours, default = refusers

        async def main() -> None:
            channels = (
                Connection.to(Target.parse(ours.address), token="").aio_channel(),
                grpc.aio.insecure_channel(default.address, options=(("grpc.use_local_subchannel_pool", 1),)),
            )
            waits = [asyncio.ensure_future(channel.channel_ready()) for channel in channels]
            assert await asyncio.to_thread(default.enough.wait, HANG_S)
            assert ours.count >= default.count + 2
            for wait in waits:
                wait.cancel()
            for channel in channels:
                await channel.close()

        asyncio.run(main())


class TestProxies:
    @pytest.fixture(autouse=True)
    def no_proxy_of_this_machine(self, monkeypatch):
        for name in (*PROXY_VARIABLES, "no_proxy", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)

    def test_loopback_needs_no_proxy(self, bundle_repo, tmp_path, monkeypatch):
        for name in PROXY_VARIABLES:
            monkeypatch.setenv(name, f"http://{free_port()}")
        addresses = ("127.0.0.1:0", "localhost:0", f"unix:{tmp_path}/s")
        with background_server(ServerConfig(repo=bundle_repo, addresses=addresses)) as server:
            for address in server.addresses:
                with PolicyClient(address, timeout_s=HANG_S, connect_timeout_s=HANG_S) as client:
                    assert client.act(np.zeros(4), seed=1).seed == 1
                assert check_health(address, timeout_s=HANG_S) == "SERVING"

    @pytest.mark.parametrize("name", PROXY_VARIABLES)
    def test_a_proxy_that_fails_is_named(self, name, monkeypatch, one_attempt):
        proxy = free_port()
        monkeypatch.setenv(name, f"http://user:secret@{proxy}")
        with pytest.raises(NotReadyError) as caught:
            PolicyClient("192.0.2.1:8001", connect_timeout_s=HANG_S)
        assert f"through the proxy {proxy} of the environment variable {name}" in str(caught.value)
        assert "add 192.0.2.1 to no_proxy" in str(caught.value)
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize(
        ("environment", "expected"),
        [
            ({}, ""),
            ({"http_proxy": "p:1"}, "http_proxy"),
            ({"http_proxy": "p:1", "https_proxy": "q:1", "grpc_proxy": ""}, "https_proxy"),
            ({"http_proxy": "p:1", "no_proxy": "example.org, robot"}, ""),
            ({"http_proxy": "p:1", "no_proxy": "example.org"}, "http_proxy"),
            ({"http_proxy": "p:1", "no_proxy": "robot", "no_grpc_proxy": "other"}, "http_proxy"),
        ],
    )
    def test_which_variable_counts(self, environment, expected, monkeypatch):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert Connection.to(Target.parse("robot:8001"), token="").proxy_variable == expected


class TestWaitingForAServer:
    """`connect_timeout_s` covers a server that is not there yet, and one that is there and loads."""

    def test_a_server_that_is_not_there_yet(self, bundle_repo):
        address = free_port()
        clients: list[PolicyClient] = []
        thread = threading.Thread(
            target=lambda: clients.append(PolicyClient(address, connect_timeout_s=HANG_S))
        )
        with pytest.raises(NotReadyError):
            check_health(address)
        thread.start()
        with background_server(ServerConfig(repo=bundle_repo, addresses=(address,))):
            thread.join(HANG_S)
            (client,) = clients
            assert client.spec.name == "tiny"
            client.close()

    def test_a_server_that_is_not_there_yet_for_asyncio(self, bundle_repo):
        address = free_port()

        async def main() -> None:
            waiting = asyncio.ensure_future(AsyncPolicyClient(address, connect_timeout_s=HANG_S).connect())
            await asyncio.sleep(0)
            with background_server(ServerConfig(repo=bundle_repo, addresses=(address,))):
                client = await waiting
                assert client.spec.name == "tiny"
                await client.close()

        asyncio.run(main())

    def test_a_server_that_is_there_and_loads(self):
        with loading_server(refusals=2) as (address, asked):
            with PolicyClient(address, connect_timeout_s=HANG_S) as client:
                assert client.spec.name == "tiny"
            assert len(asked) == 3

    def test_a_server_without_the_policy_is_asked_once(self):
        with loading_server(refusals=99, status=grpc.StatusCode.NOT_FOUND) as (address, asked):
            with pytest.raises(PolicyNotFoundError):
                PolicyClient(address, connect_timeout_s=HANG_S)
            assert len(asked) == 1

    def test_the_reason_is_told_when_the_time_is_over(self, monkeypatch):
        """The last attempt begins when the time is over; the test says when that is."""
        attempts: list[float] = []

        def left_s(self: Attempts) -> float:
            attempts.append(HANG_S if len(attempts) < 4 else 1e-3)
            return attempts[-1]

        monkeypatch.setattr(Attempts, "left_s", property(left_s))
        with pytest.raises(NotReadyError, match="no policy server answers at .*start one with rsm-serve"):
            PolicyClient(free_port(), connect_timeout_s=HANG_S)
        assert len(attempts) > 4, "it was tried more than once"
