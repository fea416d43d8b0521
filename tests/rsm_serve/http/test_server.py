"""The limits of the HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import numpy as np
import pytest

from rsm_common.errors import (
    AddressError,
)
from rsm_serve.addresses import is_loopback
from rsm_serve.client import PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.http import server as http_server
from rsm_serve.http.server import MAX_CONNECTIONS, HttpServer, Request, Response
from rsm_serve.server import background_server
from tests.hang import HANG_S
from tests.rsm_serve.http.ask import ANY_PORT, get, http_of
from tests.rsm_serve.test_server import wait_until


class TestPort:
    """The HTTP server's limits."""

    def test_in_use_is_one_sentence(self, server, bundle_repo):
        config = ServerConfig.from_options(repo=bundle_repo, addresses=(ANY_PORT,), http=http_of(server))
        with pytest.raises(AddressError, match="in use; choose another --http"), background_server(config):
            pass
        with (
            pytest.raises(AddressError, match="wanted an address such as"),
            background_server(
                ServerConfig.from_options(repo=bundle_repo, addresses=(ANY_PORT,), http="nonsense")
            ),
        ):
            pass

    @pytest.mark.parametrize("host", ["a" * 70, "a..b"])
    def test_a_host_name_that_is_none_is_one_sentence(self, bundle_repo, host):
        config = ServerConfig.from_options(
            repo=bundle_repo, addresses=(ANY_PORT,), http=f"{host}:0", insecure=True
        )
        with (
            pytest.raises(AddressError, match=rf"wanted to listen on {host}:0 for HTTP, got: .*--http"),
            background_server(config),
        ):
            pass

    @pytest.mark.parametrize(
        ("sent", "status"),
        [
            (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
            (b"GET /metrics\r\n\r\n", 400),
            (b"GET http://elsewhere/ HTTP/1.1\r\n\r\n", 400),
            (b"\x16\x03\x01\x02\x00\x01\x00 \r\n\r\n", 400),
            (b"GET /?" + b"&".join(b"a%d=1" % i for i in range(99)) + b" HTTP/1.1\r\n\r\n", 400),
            (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n", 431),
            (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
            (b"GET //metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        ],
    )
    def test_what_is_no_proper_request_is_refused(self, server, sent, status):
        host, _, port = http_of(server).rpartition(":")
        with socket.create_connection((host, int(port)), timeout=HANG_S) as connection:
            connection.sendall(sent)
            assert connection.recv(4096).startswith(b"HTTP/1.1 %d " % status)

    def test_a_slow_writer_and_a_slow_reader_block_nobody_and_are_cut_off(self, monkeypatch):
        async def answer(request: Request) -> Response:
            return Response(bytes(50_000_000) if request.path == "/large" else b"small")

        async def be_slow(address: str) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
            host, _, port = address.rpartition(":")
            silent = await asyncio.open_connection(host, int(port))
            silent[1].write(b"GET / HT")
            deaf = await asyncio.open_connection(host, int(port), limit=1024)
            deaf[1].write(b"GET /large HTTP/1.1\r\n\r\n")
            return [silent, deaf]

        async def main() -> None:
            server = HttpServer(answer)
            address = await server.listen(ANY_PORT)
            monkeypatch.setattr(http_server, "READ_S", 300.0)
            monkeypatch.setattr(http_server, "WRITE_S", 300.0)
            first = await be_slow(address)
            assert (await asyncio.to_thread(get, address))[1] == "small"
            assert len(server._open) >= 2, "the slow ones are still there"
            monkeypatch.setattr(http_server, "READ_S", 0.3)
            monkeypatch.setattr(http_server, "WRITE_S", 0.3)
            (silent, writer), (deaf, another) = await be_slow(address)
            assert await asyncio.wait_for(silent.read(), HANG_S) == b""
            await asyncio.to_thread(wait_until, lambda: len(server._open) == 2, "the second two to be cut off")
            with pytest.raises((OSError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(deaf.readexactly(50_000_000), HANG_S)
            server.close()
            for open_writer in (writer, another, *(slow[1] for slow in first)):
                open_writer.close()

        asyncio.run(main())

    def test_connections_are_limited_and_grpc_goes_on(self, server, monkeypatch):
        monkeypatch.setattr(http_server, "READ_S", HANG_S)
        open_here = server.monitor._http._open
        host, _, port = http_of(server).rpartition(":")
        idle = [socket.create_connection((host, int(port)), timeout=HANG_S) for _ in range(MAX_CONNECTIONS)]
        try:
            wait_until(lambda: len(open_here) == MAX_CONNECTIONS, "all to be accepted")
            another = socket.create_connection((host, int(port)), timeout=HANG_S)
            with another, contextlib.suppress(ConnectionResetError):
                assert another.recv(1) == b""
            with PolicyClient(server.addresses[0], timeout_s=HANG_S) as client:
                assert client.act(np.zeros(4)).action.shape == (2,)
        finally:
            for connection in idle:
                connection.close()
        wait_until(lambda: _answers(http_of(server)), "room for a connection")

    def test_a_fault_of_ours_is_logged_without_the_query(self, caplog):
        async def fail(request: Request) -> Response:
            raise RuntimeError("broken")

        async def main() -> tuple[int, str, dict[str, str]]:
            server = HttpServer(fail)
            address = await server.listen(ANY_PORT)
            answer = await asyncio.to_thread(get, f"{address}/api/sample?obs=123.456")
            server.close()
            return answer

        status, body, _ = asyncio.run(main())
        assert status == 500
        assert "broken" not in body
        assert "GET /api/sample failed" in caplog.text
        assert "123.456" not in caplog.text

    def test_other_sites_get_nothing(self, server):
        http = http_of(server)
        for path in ("/", "/api/status", "/api/spec?policy=tiny", "/api/sample?policy=tiny"):
            assert get(http + path, Host="evil.example")[0] == 403
        for site in ("cross-site", "same-site"):
            assert get(f"{http}/api/status", Sec_Fetch_Site=site)[0] == 403
        assert get(f"{http}/api/status", Sec_Fetch_Site="same-origin")[0] == 200
        assert get(f"{http}/", Host="localhost:9000")[0] == 200
        assert get(f"{http}/metrics", Host="rsm.example")[0] == 200, "scrapers use a name"

    def test_a_public_address_shows_neither_page_nor_samples(self, bundle_repo):
        config = ServerConfig.from_options(repo=bundle_repo, addresses=(ANY_PORT,), http="0.0.0.0:0")
        with background_server(config) as server:
            http = http_of(server).replace("0.0.0.0", "127.0.0.1")
            assert [get(f"{http}{path}")[0] for path in ("/metrics", "/healthz", "/", "/api/status")] == [
                *(200, 200),
                *(404, 404),
            ]

    def test_loopback(self):
        for host in ("127.0.0.1", "127.3.2.1", "[::1]", "::1", "localhost", "LocalHost"):
            assert is_loopback(host)
        for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", "", "127.0.0.1.evil.example"):
            assert not is_loopback(host)


def _answers(http: str) -> bool:
    try:
        return get(f"{http}/healthz")[0] == 200
    except OSError:
        return False
