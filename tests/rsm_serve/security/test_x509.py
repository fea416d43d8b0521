"""Validity dates and kinds of keys, compared with what openssl says of real certificates."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import ssl
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from rsm_common.errors import UnauthenticatedError
from rsm_serve.client import PolicyClient
from rsm_serve.client.connection import Tls
from rsm_serve.config import ServerConfig
from rsm_serve.security.x509 import Certificate, first_certificate, read_certificate, server_certificate
from rsm_serve.server import background_server
from tests.certificates import Authority
from tests.hang import HANG_S

DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d"
DATES = rf"valid from {DATE} to {DATE}, while the clock of this machine says {DATE} \(UTC\)"


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    authority = Authority(tmp_path_factory.mktemp("authority"))
    authority.sign("server")
    authority.sign("past", days=-1)
    authority.sign("long", days=20_000)
    authority.sign("rsa", kind=("-newkey", "rsa:2048", "-nodes"))
    return authority


def shown_by_openssl(path: Path, option: str) -> datetime:
    program = shutil.which("openssl")
    assert program is not None
    line = subprocess.run(
        [program, "x509", "-in", path, "-noout", option],
        check=True,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    ).stdout
    moment = datetime.strptime(line.partition("=")[2].strip(), "%b %d %H:%M:%S %Y GMT")
    return moment.replace(tzinfo=timezone.utc)


@pytest.mark.parametrize("name", ["server", "past", "long", "rsa", "ca"])  # "long" ends after 2049
def test_dates_are_those_that_openssl_shows(authority, name):
    path = authority.folder / f"{name}.pem"
    certificate = first_certificate(path.read_bytes())
    assert certificate is not None
    assert certificate.not_before == shown_by_openssl(path, "-startdate")
    assert certificate.not_after == shown_by_openssl(path, "-enddate")


def test_a_moment_outside_the_dates_is_named_on_both_sides():
    start = datetime(2026, 1, 2, 3, 4, tzinfo=timezone.utc)
    certificate = Certificate(start, start + timedelta(days=365), b"")
    assert certificate.outside(start) == certificate.outside(start + timedelta(days=365)) == ""
    early = certificate.outside(datetime(1970, 1, 1, tzinfo=timezone.utc))
    assert early == (
        "valid from 2026-01-02 03:04 to 2027-01-02 03:04, while the clock of this machine says "
        "1970-01-01 00:00 (UTC)"
    )
    assert certificate.outside(start + timedelta(days=366))


def test_any_part_of_a_certificate_is_a_value_error_and_never_another(authority):
    der = ssl.PEM_cert_to_DER_cert((authority.folder / "server.pem").read_text())
    for length in range(len(der)):
        with pytest.raises(ValueError):
            read_certificate(der[:length])
    for position in range(len(der)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = der[:position] + bytes([der[position] ^ flip]) + der[position + 1 :]
            with contextlib.suppress(ValueError):
                read_certificate(damaged)


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"]
)
def test_a_file_without_a_certificate_has_none(content):
    assert first_certificate(content) is None


def test_a_server_shows_its_certificate_and_a_closed_port_none(authority, bundle_repo):
    with background_server(config(bundle_repo, authority, "server")) as server:
        host, _, port = server.addresses[0].rpartition(":")
        found = server_certificate(host, int(port), 10.0)
        assert found == first_certificate((authority.folder / "server.pem").read_bytes())
    assert server_certificate(host, int(port), 10.0) is None


def config(repo: Path, authority: Authority, name: str, **settings: object) -> ServerConfig:
    cert, key = authority.folder / f"{name}.pem", authority.folder / f"{name}.key"
    return ServerConfig.from_options(repo, addresses=("127.0.0.1:0",), tls_cert=cert, tls_key=key, **settings)


def test_an_expired_certificate_of_the_server_is_named_with_its_dates_on_both_sides(
    authority, bundle_repo, caplog
):
    with caplog.at_level(logging.WARNING), background_server(config(bundle_repo, authority, "past")) as server:
        assert re.search(rf"clients refuse the certificate in \S+past.pem, which is {DATES}", caplog.text)
        address = f"localhost:{server.addresses[0].rpartition(':')[2]}"
        with (
            pytest.raises(
                UnauthenticatedError, match=f"from the server at {address}, got one {DATES}; set the clock"
            ),
            PolicyClient(address, tls=Tls(authority.ca), timeout_s=HANG_S) as client,
        ):
            _ = client.spec


def test_an_expired_certificate_of_the_client_is_named_with_its_dates(authority, bundle_repo):
    expired = Tls(authority.ca, authority.folder / "past.pem", authority.folder / "past.key")
    settings = {"tls_client_ca": authority.ca}
    with background_server(config(bundle_repo, authority, "server", **settings)) as server:
        address = f"localhost:{server.addresses[0].rpartition(':')[2]}"
        with (
            pytest.raises(
                UnauthenticatedError, match=rf"client's certificate in \S+past.pem is {DATES}; set the"
            ),
            PolicyClient(address, tls=expired, timeout_s=HANG_S) as client,
        ):
            _ = client.spec


def test_a_valid_certificate_is_not_blamed(authority, bundle_repo, caplog):
    with caplog.at_level(logging.WARNING), background_server(config(bundle_repo, authority, "server")):
        assert "certificate" not in caplog.text
    assert Tls(authority.ca, authority.folder / "server.pem").outside_dates() == ""
