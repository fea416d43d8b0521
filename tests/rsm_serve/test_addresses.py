"""Which addresses a server can listen on, and why not."""

from __future__ import annotations

import socket

import pytest

from rsm_common.errors import AddressError
from rsm_serve.addresses import check_free, split_address


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("localhost:80", ("localhost", 80)), ("[::1]:65535", ("::1", 65535))],
)
def test_addresses_are_split(address, expected):
    assert split_address(address) == expected


@pytest.mark.parametrize(
    ("address", "message"),
    [
        *(
            (text, "wanted an address such as")
            for text in ("", "host", ":80", "host:", "host:x", "host:-1", "h:²")
        ),
        ("[host]:80", "wanted an address such as"),
        ("host:65536", "wanted a port from 0 to 65535 .* got 'host:65536'"),
        ("host:" + "9" * 5000, "wanted a port from 0 to 65535"),
        ("::1:80", r"wanted brackets around an IPv6 host, such as \[::1\]:8001, got '::1:80'"),
        ("2001:db8::7", "wanted brackets around an IPv6 host"),
        ("unix:", "wanted a socket path of 1 to 107 bytes"),
    ],
)
def test_what_is_no_address(address, message):
    with pytest.raises(AddressError, match=message):
        check_free(address)


def test_a_port_in_use_is_found_under_each_of_its_names():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for host in ("127.0.0.1", "localhost", "0.0.0.0"):
            with pytest.raises(AddressError, match="the port is in use"):
                check_free(f"{host}:{port}")
    check_free(f"127.0.0.1:{port}")


def test_a_host_of_another_machine():
    with pytest.raises(AddressError, match="192.0.2.1"):
        check_free("192.0.2.1:8001")
    with pytest.raises(AddressError, match=r"nowhere\.invalid"):
        check_free("nowhere.invalid:8001")


def test_socket_paths(tmp_path):
    check_free(f"unix:{tmp_path}/free.sock")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(AddressError, match="there is a file"):
        check_free(f"unix:{tmp_path}/file")
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(AddressError, match="no directory"):
        check_free(f"unix:{tmp_path}/nothing/x.sock")
    with pytest.raises(AddressError, match="1 to 107 bytes"):
        check_free(f"unix:/{'x' * 200}")
