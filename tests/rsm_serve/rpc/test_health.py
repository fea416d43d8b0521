"""Health: who asks, who watches, and watchers that nobody should wait for."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import struct
import threading
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rsm_serve.config import ServerConfig
from rsm_serve.server import PolicyServer, background_server
from tests.bundles import make_spec, write_bundle
from tests.hang import HANG_S
from tests.rsm_serve.test_fuzz import PREFACE, frame
from tests.rsm_serve.test_server import ANY_PORT
from tests.server_process import wait_until

STATES = health_pb2.HealthCheckResponse.ServingStatus
NO_WINDOW = struct.pack(">HI", 4, 0)
"""The setting SETTINGS_INITIAL_WINDOW_SIZE = 0: no message may be sent."""


@pytest.fixture
def server(own_repo) -> Iterator[PolicyServer]:
    config = ServerConfig.from_options(repo=own_repo, addresses=ANY_PORT, poll=0.05, drain_seconds=1)
    with background_server(config) as found:
        yield found


class Watcher:
    """Reads a watch in a thread."""

    def __init__(self, address: str, service: str) -> None:
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        request = health_pb2.HealthCheckRequest(service=service)
        self._call = health_pb2_grpc.HealthStub(self._channel).Watch(request)
        self._states: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(grpc.RpcError):
            for response in self._call:
                self._states.put(STATES.Name(response.status))

    def next(self) -> str:
        return self._states.get(timeout=HANG_S)

    def leave(self) -> None:
        self._call.cancel()
        self._channel.close()


def deaf_watcher(address: str, service: bytes) -> socket.socket:
    """A connection whose watch can be sent nothing."""

    headers = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": b"/grpc.health.v1.Health/Watch",
        b":authority": b"x",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
    }
    block = b"".join(b"\0" + bytes([len(k)]) + k + bytes([len(v)]) + v for k, v in headers.items())
    message = b"\x0a" + bytes([len(service)]) + service if service else b""
    data = b"\0" + struct.pack(">I", len(message)) + message
    host, port = address.rsplit(":", 1)
    connection = socket.create_connection((host, int(port)))
    connection.sendall(PREFACE + frame(4, 0, 0, NO_WINDOW) + frame(4, 1, 0, b""))
    connection.sendall(frame(1, 4, 1, block) + frame(0, 1, 1, data))
    return connection


def watchers(server: PolicyServer) -> int:
    return sum(map(len, server._endpoint._health._watchers.values()))


def unload(server: PolicyServer) -> None:
    assert server.lifecycle.loop is not None
    asyncio.run_coroutine_threadsafe(server.lifecycle.unload("tiny"), server.lifecycle.loop).result(HANG_S)


def test_every_watcher_hears_of_every_change_whoever_leaves(server):
    first, second = Watcher(server.addresses[0], "tiny"), Watcher(server.addresses[0], "tiny")
    assert (first.next(), second.next()) == ("SERVING", "SERVING")
    first.leave()
    wait_until(lambda: watchers(server) == 1, "the first watcher to be forgotten")
    third = Watcher(server.addresses[0], "tiny")
    assert third.next() == "SERVING"
    unload(server)
    assert (second.next(), third.next()) == ("NOT_SERVING", "NOT_SERVING")
    second.leave()
    third.leave()


def test_a_name_that_comes_later_is_unknown_until_then(server, own_repo):
    watcher = Watcher(server.addresses[0], "other")
    assert watcher.next() == "SERVICE_UNKNOWN"
    write_bundle(own_repo, make_spec("other", "1"))
    assert watcher.next() == "SERVING"
    watcher.leave()


def test_watchers_are_forgotten_when_they_leave(server):
    watcher = Watcher(server.addresses[0], "a name that a caller made up")
    assert watcher.next() == "SERVICE_UNKNOWN"
    assert len(server._endpoint._health._watchers) == 1
    watcher.leave()
    wait_until(lambda: watchers(server) == 0, "the watcher to be forgotten")


def test_a_watcher_that_takes_no_message_holds_up_neither_a_reload_nor_the_shutdown(own_repo):
    config = ServerConfig.from_options(repo=own_repo, addresses=ANY_PORT, poll=0.05, drain_seconds=1)
    with contextlib.ExitStack() as stack, background_server(config) as server:
        for service in (b"", b"tiny"):
            stack.enter_context(deaf_watcher(server.addresses[0], service))
        wait_until(lambda: watchers(server) == 2, "two watchers")
        write_bundle(own_repo, make_spec("tiny", "2"))
        write_bundle(own_repo, make_spec("other", "1"))
        wait_until(lambda: server.registry.names == ["other", "tiny"], "the new policy")
        wait_until(lambda: server.registry.current("tiny") == 2, "the new version")
        unload(server)
        # The server has drained while the watchers, which take nothing, are still connected.


def test_everything_that_is_told_while_draining_is_that_nothing_is_served(own_repo):
    with background_server(ServerConfig(repo=own_repo, addresses=ANY_PORT)) as server:
        watchers = [Watcher(server.addresses[0], name) for name in ("", "tiny", "rsm.v1.PolicyService")]
        assert [watcher.next() for watcher in watchers] == ["SERVING"] * 3
    assert [watcher.next() for watcher in watchers] == ["NOT_SERVING"] * 3
