"""Arguments of every type for every kind of Policy: InvalidRequestError, and no other exception."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from rsm_common.errors import InvalidRequestError
from rsm_serve.client import AsyncPolicyClient, PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.local import open_policy
from rsm_serve.server import background_server
from rsm_train.policy import TorchPolicy
from tests.bundles import make_spec
from tests.hang import HANG_S

Act = Callable[..., Any]

nested: list[Any] = []
nested.append(nested)


class Raising:
    """An object whose conversions raise."""

    def __array__(self, *_: object, **__: object) -> None:
        raise KeyError("conversion")

    def __index__(self) -> int:
        raise KeyError("conversion")

    def __bool__(self) -> bool:
        raise KeyError("conversion")


WRONG: dict[str, Any] = {
    "a tensor with a gradient": torch.zeros(4, requires_grad=True),
    "a list of tensors with gradients": [torch.zeros(4, requires_grad=True)],
    "a tensor of bfloat16": torch.zeros(4, dtype=torch.bfloat16),
    "a tensor without data": torch.zeros(4, device="meta"),
    "a sparse tensor": torch.zeros(4).to_sparse(),
    "rows of different lengths": [[1.0, 2.0], [1.0]],
    "text": "0,0,0,0",
    "numbers as text": ["0", "0", "0", "0"],
    "bytes": b"0000",
    "an object": object(),
    "a list with None": [0, None, 0, 0],
    "a mapping": {"obs": [0, 0, 0, 0]},
    "complex numbers": np.zeros(4, complex),
    "times": np.zeros(4, "M8[s]"),
    "named fields": np.zeros(4, "f4,f4"),
    "integers of 400 digits": [10**400] * 4,
    "integers of 5000 digits": [10**5000] * 4,
    "a list that holds itself": nested,
    "an object whose conversions raise": Raising(),
}
SPEC = make_spec("tiny")


class Weights:
    """Stands where trained weights do; arguments are refused before they are used."""


def local_policy(repository: Any, address: str) -> Iterator[Act]:
    with_policy = open_policy(repository / "tiny")
    yield with_policy.act
    with_policy.close()


def torch_policy(repository: Any, address: str) -> Iterator[Act]:
    yield TorchPolicy(SPEC, Weights()).act  # type: ignore[arg-type]


def client(repository: Any, address: str) -> Iterator[Act]:
    with PolicyClient(address, timeout_s=HANG_S, connect_timeout_s=HANG_S) as policy:
        yield policy.act


def stream(repository: Any, address: str) -> Iterator[Act]:
    with PolicyClient(address, timeout_s=HANG_S, connect_timeout_s=HANG_S) as policy, policy.stream() as steps:
        yield steps.act


def asyncio_client(repository: Any, address: str, *, streams: bool = False) -> Iterator[Act]:
    loop = asyncio.new_event_loop()
    policy = loop.run_until_complete(
        AsyncPolicyClient(address, timeout_s=HANG_S, connect_timeout_s=HANG_S).connect()
    )
    act: Act = policy.stream().act if streams else policy.act
    yield lambda *given, **named: loop.run_until_complete(act(*given, **named))
    loop.run_until_complete(policy.close())
    loop.close()


def asyncio_stream(repository: Any, address: str) -> Iterator[Act]:
    yield from asyncio_client(repository, address, streams=True)


@pytest.fixture(scope="module")
def address(bundle_repo):
    with background_server(ServerConfig(repo=bundle_repo, addresses=("127.0.0.1:0",))) as server:
        yield server.addresses[0]


@pytest.fixture(
    scope="module",
    params=[local_policy, torch_policy, client, stream, asyncio_client, asyncio_stream],
    ids=lambda make: make.__name__,
)
def act(request, bundle_repo, address):
    yield from request.param(bundle_repo, address)


@pytest.mark.parametrize("argument", ["obs", "noise", "seed", "deterministic"])
def test_a_wrong_argument_is_an_invalid_request(act, argument):
    for name, value in WRONG.items():
        arguments = {"obs": np.zeros(4, np.float32), argument: value}
        with pytest.raises(InvalidRequestError) as caught:
            act(arguments.pop("obs"), **arguments)
        assert len(str(caught.value)) < 700, name
        assert "\n" not in str(caught.value), name


def test_none_is_no_observation(act):
    with pytest.raises(InvalidRequestError, match="got dtype object of None; give a number for every element"):
        act(None)


def test_the_advice_for_a_tensor_works(act):
    tensor = torch.zeros(4, requires_grad=True)
    with pytest.raises(InvalidRequestError, match=r"give tensor\.detach\(\)\.cpu\(\)\.float\(\)\.numpy\(\)"):
        act(tensor)
    if isinstance(getattr(act, "__self__", None), TorchPolicy):
        return  # has no weights to act with
    assert act(tensor.detach().cpu().float().numpy(), seed=1).seed == 1


@pytest.mark.parametrize("make", [PolicyClient, AsyncPolicyClient])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"client_id": 7}, "wanted a client_id as text, got int"),
        ({"client_id": b"arm"}, "wanted a client_id as text, got bytes"),
        ({"client_id": None}, "wanted a client_id as text, got NoneType"),
        ({"priority": "1"}, "wanted an integer priority from -10 to 10, got '1'"),
        ({"priority": 1.5}, "wanted an integer priority"),
        ({"priority": None}, "wanted an integer priority"),
        ({"timeout_s": "1"}, "wanted timeout_s > 0 .*got '1'"),
        ({"timeout_s": None}, "wanted timeout_s > 0"),
        ({"connect_timeout_s": "1"}, "wanted connect_timeout_s > 0"),
        ({"token": 7}, "wanted a token as text, got int"),
        ({"tls": True}, "wanted tls as a Tls, got bool"),
    ],
)
def test_a_client_checks_its_own_arguments(make, arguments, message):
    with pytest.raises(InvalidRequestError, match=message):
        make("127.0.0.1:1", **arguments)
