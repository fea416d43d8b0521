"""Versions, canaries and priorities as clients of the Open Inference Protocol meet them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from rsm_common.errors import InvalidRequestError
from rsm_serve.engine.canary import Canary, lot
from rsm_serve.pb import oip_pb2 as pb
from rsm_serve.rpc.oip.requests import decode_caller
from tests.hang import HANG_S
from tests.rsm_serve.versions import acting_version, add_version, damage, run, serve, settled

ZEROS = np.zeros((1, 4), np.float32)


def infer(client: triton.InferenceServerClient, parameters: dict[str, Any], version: str = "") -> str:
    """The version that acted."""
    obs = triton.InferInput("obs", list(ZEROS.shape), "FP32")
    obs.set_data_from_numpy(ZEROS)
    result = client.infer("tiny", [obs], model_version=version, parameters=parameters, client_timeout=HANG_S)
    return str(result.get_response().model_version)


def test_a_canary_is_met_by_client_id_and_by_seed(own_repo):
    add_version(own_repo, 2)
    with serve(own_repo, canaries=(Canary("tiny", 2, 0.5),)) as server:
        client = triton.InferenceServerClient(server.addresses[0])
        for number in range(12):
            name = f"robot-{number}"
            wanted = "2" if lot("tiny", name, None) < 0.5 else "1"
            assert infer(client, {"client_id": name, "seed": 1}) == wanted
            assert infer(client, {"client_id": name, "deterministic": True}) == wanted
            assert infer(client, {"client_id": name}, version="1") == "1"
            assert infer(client, {"seed": number}) == ("2" if lot("tiny", "", number) < 0.5 else "1")
        assert {infer(client, {"deterministic": True}) for _ in range(8)} == {"1"}
        client.close()


def test_the_life_cycle_is_a_repository_control(own_repo, monkeypatch):
    add_version(own_repo, 1, "other")
    with serve(own_repo) as server:
        monkeypatch.setattr(server._endpoint._inference._repository, "_control", server.lifecycle)
        client = triton.InferenceServerClient(server.addresses[0])
        add_version(own_repo, 2)
        client.load_model("tiny")
        assert infer(client, {}) == "2"
        damage(add_version(own_repo, 3))
        with pytest.raises(InferenceServerException, match="sha256"):
            client.load_model("tiny")
        assert not client.is_model_ready("tiny", "3")
        settled(server)
        index = {(m.name, m.version): m.state for m in client.get_model_repository_index().models}
        assert index == {("other", "1"): "READY", ("tiny", "2"): "READY", ("tiny", "3"): "UNAVAILABLE"}
        client.unload_model("tiny")
        assert not client.is_model_ready("tiny")
        assert acting_version(server, "other") == "1"
        with pytest.raises(InferenceServerException, match="none of that name"):
            client.load_model("nope")
        run(server, server.lifecycle.load("other", 1))
        client.close()


def request(tensors: tuple[str, ...] = ("obs",), raw: tuple[bytes, ...] = (), **parameters: Any) -> Any:
    message = pb.ModelInferRequest(raw_input_contents=raw)
    for name in tensors:
        message.inputs.add(name=name)
    for name, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
        setattr(message.parameters[name], kind, value)
    return message


@pytest.mark.parametrize(
    ("level", "priority"), [(0, 0), (1, 10), (2, 9), (11, 0), (21, -10), (22, -10), (2**62, -10)]
)
def test_tritons_levels_as_priorities(level, priority):
    assert decode_caller(request(priority=level)).priority == priority


@pytest.mark.parametrize(
    ("message", "seed", "fixed"),
    [
        (request(), None, False),
        (request(seed=7), 7, False),
        (request(seed="18446744073709551615,3"), 2**64 - 1, False),
        (request(seed="x"), None, False),
        (request(seed="9" * 5000), None, False),
        (request(("obs", "seed"), (b"x", (5).to_bytes(8, "little") + bytes(8))), 5, False),
        (request(("obs", "seed"), (b"x", b"short")), None, False),
        (request(("seed",)), None, False),
        (request(deterministic=True), None, True),
        (request(deterministic=False), None, False),
        (request(("obs", "noise")), None, True),
    ],
)
def test_what_draws_the_lot(message, seed, fixed):
    caller = decode_caller(message)
    assert (caller.seed, caller.fixed, caller.client_id) == (seed, fixed, "")


def test_a_client_id_is_limited():
    assert decode_caller(request(client_id=7)).client_id == "7"
    with pytest.raises(InvalidRequestError, match="at most 128 bytes"):
        decode_caller(request(client_id="x" * 129))
