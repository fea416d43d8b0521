"""How a policy is named: addresses with and without scheme, and the sentences for what is none."""

from __future__ import annotations

import pytest

from rsm_common.errors import InvalidRequestError
from rsm_serve.client import AsyncPolicyClient, PolicyClient, check_health
from rsm_serve.client.target import Target


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("h:1",), Target("h:1", "", "")),
        (("h:1", "p", 2), Target("h:1", "p", "2")),
        (("grpc://h:1/p",), Target("h:1", "p", "")),
        (("grpc://h:1/p:3",), Target("h:1", "p", "3")),
        (("grpc://[::1]:1/p",), Target("[::1]:1", "p", "")),
        (("grpc://h:1", "p"), Target("h:1", "p", "")),
        (("grpc://h:1/p", "p"), Target("h:1", "p", "")),
        (("grpcs://h:1/p:3",), Target("h:1", "p", "3", tls=True)),
        (("unix:/a/b", "p"), Target("unix:/a/b", "p", "")),
        (("grpc:unix:/a/b/p",), Target("unix:/a/b", "p", "")),
        (("grpc:unix:/a/b/p:3",), Target("unix:/a/b", "p", "3")),
        (("grpc:unix:b.sock/p", "p", 3), Target("unix:b.sock", "p", "3")),
        (("[::1]:65535",), Target("[::1]:65535", "", "")),
    ],
)
def test_ways_to_name_a_policy(arguments, expected):
    assert Target.parse(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "wanted an address such as 127.0.0.1:8001"),
        (("h",), "wanted an address such as"),
        (
            ("http://h:1/p",),
            "wanted an address such as .* a policy's name goes into grpc://127.0.0.1:8001/NAME",
        ),
        (("h:1/p",), "a policy's name goes into grpc://127.0.0.1:8001/NAME"),
        (("grpc://h:1/p", "q"), "wanted one policy, got 'p' in the address and 'q' beside it"),
        (("grpc://h:1/p:1", "p", 2), "wanted one policy, got 'p:1' in the address and 'p:2' beside it"),
        (("127.0.0.1:73537",), "wanted a port from 0 to 65535 .*got '127.0.0.1:73537'"),
        (("grpc://127.0.0.1:73537/p",), "wanted a port from 0 to 65535 .*got '127.0.0.1:73537'"),
        (("127.0.0.1:0",), "wanted a port from 1 to 65535, got '127.0.0.1:0'"),
        (("::1:8001",), r"wanted brackets around an IPv6 host, such as \[::1\]:8001, got '::1:8001'"),
        (("::1",), "wanted brackets around an IPv6 host"),
        (("grpc://::1:8001/p",), "wanted brackets around an IPv6 host"),
        (("grpc:unix:/a",), "wanted a unix socket and a policy as grpc:unix:/path/NAME, got 'grpc:unix:/a'"),
        (("grpc://unix:/a/p",), "wanted a unix socket as unix:/path or grpc:unix:/path/NAME"),
        (("unix:",), "wanted a socket path of 1 to 107 bytes"),
        (("unix:/" + "x" * 200,), "wanted a socket path of 1 to 107 bytes"),
        ((None,), "wanted the address as text, got NoneType"),
        ((8001,), "wanted the address as text, got int"),
        ((b"h:1",), "wanted the address as text, got bytes"),
        (("h:1", 3), "wanted the policy as text, got int"),
        (("h:1", "p", 1.5), "wanted the version as text, got float"),
        (("h:\udcff",), "UTF-8"),
    ],
)
def test_what_names_no_policy(arguments, message):
    with pytest.raises(InvalidRequestError, match=message):
        Target.parse(*arguments)


@pytest.mark.parametrize("connect", [PolicyClient, AsyncPolicyClient, check_health])
def test_every_client_refuses_what_names_no_policy(connect):
    with pytest.raises(InvalidRequestError, match="wanted a port from 0 to 65535"):
        connect("127.0.0.1:73537")


@pytest.mark.parametrize(
    ("address", "is_local"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/a", True),
        ("192.0.2.1:1", False),
        ("robot:1", False),
        ("[2001:db8::1]:1", False),
    ],
)
def test_which_addresses_stay_on_this_machine(address, is_local):
    assert Target.parse(address).is_local is is_local
