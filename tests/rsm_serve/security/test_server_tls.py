"""TLS with real certificates: who is served, who is not, and what is said to those."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton

from rsm_common.errors import (
    AddressError,
    ConfigError,
    InvalidRequestError,
    NotReadyError,
    UnauthenticatedError,
)
from rsm_eval.sources import open_policy
from rsm_serve.client import AsyncPolicyClient, PolicyClient, check_health
from rsm_serve.client.connection import Tls
from rsm_serve.commands import client_cli
from rsm_serve.commands import serve_cli as cli
from rsm_serve.config import ServerConfig
from rsm_serve.server import PolicyServer, background_server
from tests.certificates import Authority, openssl
from tests.hang import HANG_S
from tests.rsm_serve.commands.test_serve_cli import serving as process

ANY_PORT = ("127.0.0.1:0",)


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    authority = Authority(tmp_path_factory.mktemp("authority"))
    authority.sign("server")
    authority.sign("robot", "DNS:robot")
    return authority


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Authority:
    authority = Authority(tmp_path_factory.mktemp("stranger"))
    authority.sign("robot", "DNS:robot")
    return authority


@contextlib.contextmanager
def serving(repo: Path, authority: Authority, **settings: Any) -> Iterator[PolicyServer]:
    folder = authority.folder
    config = ServerConfig.from_options(
        **{
            "repo": repo,
            "addresses": ANY_PORT,
            "tls_cert": folder / "server.pem",
            "tls_key": folder / "server.key",
            **settings,
        }
    )
    with background_server(config) as server:
        yield server


def robot(authority: Authority, ca: Authority | None = None) -> Tls:
    return Tls((ca or authority).ca, authority.folder / "robot.pem", authority.folder / "robot.key")


@pytest.fixture(scope="module")
def tls_address(bundle_repo, authority) -> Iterator[str]:
    with serving(bundle_repo, authority) as server:
        yield server.addresses[0]


class TestEncryption:
    def test_every_client_acts(self, tls_address, authority, capsys):
        tls = Tls(authority.ca)
        with PolicyClient(tls_address, tls=tls, timeout_s=HANG_S) as client, client.stream() as stream:
            wanted = client.act(np.zeros(4), seed=3).action
            assert np.array_equal(stream.act(np.zeros(4), seed=3).action, wanted)

        async def act() -> None:
            async with AsyncPolicyClient(f"grpcs://{tls_address}/tiny:1", tls=tls, timeout_s=HANG_S) as client:
                assert np.array_equal((await client.act(np.zeros(4), seed=3)).action, wanted)

        asyncio.run(act())
        assert check_health(tls_address, tls=tls) == "SERVING"
        arguments = [
            "--address",
            f"grpcs://{tls_address}",
            "--tls-ca",
            str(authority.ca),
            "--timeout",
            str(HANG_S),
        ]
        assert client_cli.main(["act", *arguments]) == 0
        assert client_cli.main(["health", *arguments]) == 0
        theirs = triton.InferenceServerClient(tls_address, ssl=True, root_certificates=str(authority.ca))
        assert theirs.is_server_ready()
        theirs.close()

    def test_the_evaluator_takes_its_certificates_from_the_environment(
        self, tls_address, authority, monkeypatch
    ):
        monkeypatch.setenv("RSM_TLS_CA", str(authority.ca))
        with open_policy(f"grpcs://{tls_address}/tiny") as opened:
            assert opened.policy.act(np.zeros(4, np.float32)).action.shape == (2,)

    def test_a_server_that_another_authority_signed_is_not_trusted(self, tls_address, stranger):
        for tls in (Tls(stranger.ca), Tls()):
            with pytest.raises(UnauthenticatedError, match="signed by an authority that is known here"):
                PolicyClient(tls_address, tls=tls)

    def test_nor_one_with_another_name(self, bundle_repo, tmp_path):
        authority = Authority(tmp_path / "authority")
        cert, key = authority.sign("server", "DNS:elsewhere.example")
        config = ServerConfig.from_options(repo=bundle_repo, addresses=ANY_PORT, tls_cert=cert, tls_key=key)
        with background_server(config) as server:
            address = server.addresses[0]
            with pytest.raises(UnauthenticatedError, match="wanted a certificate for 127.0.0.1"):
                PolicyClient(address, tls=Tls(authority.ca))
            named = Tls(authority.ca, server_name="elsewhere.example")
            with PolicyClient(address, tls=named, timeout_s=HANG_S) as client:
                client.act(np.zeros(4))

    def test_a_client_without_tls_is_told_of_it(self, tls_address):
        with pytest.raises(NotReadyError, match="if it serves TLS, connect with grpcs://"):
            PolicyClient(tls_address)

    def test_a_client_with_tls_and_a_server_without(self, bundle_repo, authority):
        with (
            background_server(ServerConfig(repo=bundle_repo, addresses=ANY_PORT)) as server,
            pytest.raises(NotReadyError, match="does not serve TLS"),
        ):
            PolicyClient(server.addresses[0], tls=Tls(authority.ca))

    def test_a_unix_socket_stays_plain(self, bundle_repo, authority, tmp_path):
        addresses = (f"unix:{tmp_path}/s", *ANY_PORT)
        with (
            serving(bundle_repo, authority, addresses=addresses) as server,
            PolicyClient(server.addresses[0], timeout_s=HANG_S) as client,
            PolicyClient(server.addresses[1], timeout_s=HANG_S, tls=Tls(authority.ca)) as other,
        ):
            assert client.spec == other.spec


@pytest.fixture(scope="module")
def mutual_address(bundle_repo, authority) -> Iterator[str]:
    with serving(bundle_repo, authority, tls_client_ca=authority.ca) as server:
        yield server.addresses[0]


class TestClientCertificates:
    def test_a_known_robot_acts(self, mutual_address, authority, monkeypatch):
        with PolicyClient(mutual_address, tls=robot(authority), timeout_s=HANG_S) as client:
            expected = client.act(np.zeros(4), seed=3).action
        for name, suffix in (("CERT", "pem"), ("KEY", "key")):
            monkeypatch.setenv(f"RSM_TLS_{name}", str(authority.folder / f"robot.{suffix}"))
        monkeypatch.setenv("RSM_TLS_CA", str(authority.ca))
        with PolicyClient(f"grpcs://{mutual_address}", timeout_s=HANG_S) as client:
            assert np.array_equal(client.act(np.zeros(4), seed=3).action, expected)

    def test_others_do_not(self, mutual_address, authority, stranger):
        for tls, advice in (
            (Tls(authority.ca), "if it wants a client's certificate, give cert and key"),
            (robot(stranger, authority), "may not be the server's, so give another cert and key"),
        ):
            with pytest.raises(NotReadyError, match=advice):
                PolicyClient(mutual_address, tls=tls)


def served_certificate(address: str, ca: Path) -> str:
    host, _, port = address.rpartition(":")
    return ssl.get_server_certificate((host, int(port)), ca_certs=str(ca), timeout=HANG_S)


@pytest.mark.usefixtures("files_seen_at_once")
class TestRenewal:
    def test_a_renewed_certificate_is_used_without_a_restart(self, bundle_repo, tmp_path, caplog):
        authority = Authority(tmp_path / "authority")
        cert, key = authority.sign("server")
        with (
            serving(bundle_repo, authority) as server,
            PolicyClient(server.addresses[0], tls=Tls(authority.ca), timeout_s=HANG_S) as client,
        ):
            address = server.addresses[0]
            assert served_certificate(address, authority.ca) == cert.read_text()
            old = cert.read_text()
            # Half of a renewal: the new certificate with the old key. The old pair goes on.
            whole = key.read_bytes()
            authority.sign("server")
            new, new_key = cert.read_text(), key.read_bytes()
            replace(key, whole)
            with caplog.at_level(logging.WARNING, "rsm_serve"):
                assert served_certificate(address, authority.ca) == old
            assert "that was read before stays in use" in caplog.text
            replace(key, new_key)
            assert served_certificate(address, authority.ca) == new
            client.act(np.zeros(4))  # over the connection that was there before
            with PolicyClient(address, tls=Tls(authority.ca), timeout_s=HANG_S) as later:
                later.act(np.zeros(4))

    def test_so_are_other_authorities_of_clients(self, bundle_repo, authority, stranger, tmp_path):
        trusted = tmp_path / "clients.pem"
        trusted.write_bytes(authority.ca.read_bytes())
        with serving(bundle_repo, authority, tls_client_ca=trusted) as server:
            address = server.addresses[0]
            ours, theirs = robot(authority), robot(stranger, authority)
            PolicyClient(address, tls=ours, timeout_s=HANG_S).close()
            with pytest.raises(NotReadyError):
                PolicyClient(address, tls=theirs)
            replace(trusted, stranger.ca.read_bytes())
            PolicyClient(address, tls=theirs, timeout_s=HANG_S).close()
            with pytest.raises(NotReadyError):
                PolicyClient(address, tls=ours)


def test_handshakes_that_fail_write_no_log(bundle_repo, authority):
    folder = authority.folder
    arguments = ["--repo", str(bundle_repo), "--address", "127.0.0.1:0", "--tls-client-ca", str(authority.ca)]
    arguments += ["--tls-cert", str(folder / "server.pem"), "--tls-key", str(folder / "server.key")]
    with process(arguments) as (server, address, _):
        for tls in (None, Tls(authority.ca)):
            with pytest.raises(NotReadyError):
                PolicyClient(address, tls=tls)
        PolicyClient(address, tls=robot(authority), timeout_s=HANG_S).close()
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=HANG_S)
    assert server.returncode == 0
    assert not [line for line in log.splitlines() if " rsm_serve" not in line]


def replace(path: Path, content: bytes) -> None:
    beside = path.with_suffix(".new")
    beside.write_bytes(content)
    os.replace(beside, path)  # noqa: PTH105


class TestMistakes:
    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"tls_cert": "server.pem"}, "wanted --tls-cert and --tls-key together"),
            ({"tls_key": "server.key"}, "wanted --tls-cert and --tls-key together"),
            ({"tls_client_ca": "ca.pem"}, "wanted --tls-cert and --tls-key beside --tls-client-ca"),
            ({"tls_cert": "none.pem", "tls_key": "server.key"}, "none.pem.*No such file"),
            ({"tls_cert": "server.pem", "tls_key": "robot.key"}, "KEY_VALUES_MISMATCH"),
            ({"tls_cert": "server.key", "tls_key": "server.key"}, "certificate"),
            ({"tls_cert": "server.pem", "tls_key": "server.pem"}, "private key"),
            (
                {"tls_cert": "server.pem", "tls_key": "server.key", "tls_client_ca": "server.key"},
                "wanted certificates of authorities",
            ),
        ],
    )
    def test_they_are_one_sentence_before_anything_is_loaded(
        self, authority, tmp_path, settings, sentence, capsys
    ):
        paths = {name: authority.folder / file for name, file in settings.items()}
        with pytest.raises(ConfigError, match=sentence):
            PolicyServer(ServerConfig.from_options(repo=tmp_path, **paths))
        options = [part for name, path in paths.items() for part in (f"--{name.replace('_', '-')}", str(path))]
        assert cli.main(["--repo", str(tmp_path), *options]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1

    @pytest.mark.parametrize(
        ("kind", "taken"),
        [
            (("-newkey", "rsa:2048", "-nodes"), True),
            (("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp384r1", "-nodes"), True),
            (("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp521r1", "-nodes"), False),
            (("-newkey", "ed25519", "-nodes"), False),
        ],
        ids=["RSA", "P-384", "P-521", "Ed25519"],
    )
    def test_a_key_that_grpc_does_not_take_is_refused(self, bundle_repo, tmp_path, kind, taken):
        """It would be ready, and every handshake would fail, with no word in the log."""
        authority = Authority(tmp_path)
        cert, key = authority.sign("server", kind=kind)
        config = ServerConfig.from_options(
            repo=bundle_repo, addresses=("127.0.0.1:0",), tls_cert=cert, tls_key=key
        )
        if not taken:
            with pytest.raises(ConfigError, match="wanted a certificate for an RSA, P-256 or P-384 key"):
                PolicyServer(config)
            return
        with (
            background_server(config) as server,
            PolicyClient(server.addresses[0], tls=Tls(authority.ca), timeout_s=HANG_S) as client,
        ):
            assert client.act(np.zeros(4)).version == "1"

    def test_an_encrypted_key_is_not_asked_for_its_password(self, authority, tmp_path):
        key = tmp_path / "locked.key"
        openssl("ec", "-aes128", "-passout", "pass:secret", "-in", authority.folder / "server.key", "-out", key)
        config = ServerConfig.from_options(repo=tmp_path, tls_cert=authority.folder / "server.pem", tls_key=key)
        with pytest.raises(ConfigError, match="without a password"):
            PolicyServer(config)

    @pytest.mark.parametrize(
        ("address", "tls", "sentence"),
        [
            ("unix:/nowhere", Tls(), "unix socket"),
            ("grpcs://unix:/nowhere", None, "unix socket"),
            ("127.0.0.1:1", Tls("/no/ca.pem"), "/no/ca.pem.*No such file"),
            ("127.0.0.1:1", Tls(cert="robot.pem"), "cert and key together"),
            ("127.0.0.1:1", Tls("server.key"), "wanted certificates of authorities"),
            ("127.0.0.1:1", Tls("ca.pem", "robot.pem", "server.key"), "KEY_VALUES_MISMATCH"),
        ],
    )
    def test_a_clients_own(self, address, tls, sentence, authority, monkeypatch):
        monkeypatch.chdir(authority.folder)
        with pytest.raises(InvalidRequestError, match=sentence):
            PolicyClient(address, tls=tls)


def test_rsm_client_says_one_sentence(tls_address, stranger):
    command = [
        sys.executable,
        "-m",
        "rsm_serve.commands.client_cli",
        "info",
        "--address",
        f"grpcs://{tls_address}",
    ]
    command += ["--tls-ca", str(stranger.ca)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"rsm-client: wanted a certificate signed by .*\n", done.stderr)


@pytest.mark.parametrize("name", ["info", "act", "health", "bench", "replay"])
def test_the_help_does_not_promise_tls_by_the_environment(name, capsys):
    assert client_cli.main([name, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "switches TLS on, as grpcs:// in the address does. [default: with TLS, RSM_TLS_CA]" in text
    assert "[default: with TLS, RSM_TLS_CERT]" in text
    assert "[default: with TLS, RSM_TLS_KEY]" in text


class TestExposure:
    @pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "0:0", "[::ffff:0.0.0.0]:0"])
    def test_everybodys_address_needs_tls_or_a_word(self, bundle_repo, address, capsys):
        config = ServerConfig(repo=bundle_repo, addresses=(*ANY_PORT, address))
        with pytest.raises(AddressError, match="--insecure"):
            PolicyServer(config)
        assert cli.main(["--repo", str(bundle_repo), "--address", address]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1

    def test_a_name_is_what_it_stands_for(self, bundle_repo, monkeypatch):
        import socket

        known = {"robot.example": "192.0.2.7", "here.example": "127.0.0.1"}

        def look_up(host: str, port: int, **kwargs: Any) -> list[Any]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (known.get(host, host), port))]

        monkeypatch.setattr("rsm_serve.addresses.socket.getaddrinfo", look_up)
        with pytest.raises(AddressError, match="robot.example:0.*read every message"):
            PolicyServer(ServerConfig(repo=bundle_repo, addresses=("robot.example:0",)))
        PolicyServer(ServerConfig(repo=bundle_repo, addresses=("here.example:0", "localhost:0")))

    def test_insecure_is_a_word(self, bundle_repo):
        config = ServerConfig.from_options(repo=bundle_repo, addresses=("0.0.0.0:0",), insecure=True)
        with background_server(config) as server:
            port = server.addresses[0].rpartition(":")[2]
            with PolicyClient(f"127.0.0.1:{port}", timeout_s=HANG_S) as client:
                assert client.act(np.zeros(4)).action.shape == (2,)

    def test_so_is_tls(self, bundle_repo, authority):
        with serving(bundle_repo, authority, addresses=("0.0.0.0:0",)) as server:
            port = server.addresses[0].rpartition(":")[2]
            with PolicyClient(f"localhost:{port}", tls=Tls(authority.ca), timeout_s=HANG_S) as client:
                client.act(np.zeros(4))
            with pytest.raises(grpc.RpcError), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=HANG_S)
