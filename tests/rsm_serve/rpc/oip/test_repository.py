"""The index of the repository, and loading and unloading."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from rsm_common.errors import BundleError, PolicyNotFoundError
from tests.rsm_serve.rpc.oip.ask import (
    TIMEOUT_S,
    raw_stub,
)


class TestRepository:
    def test_without_control_it_is_read_only(self, client):
        index = client.get_model_repository_index().models
        assert [(m.name, m.version, m.state, m.reason) for m in index] == [
            ("other", "3", "READY", ""),
            ("tiny", "1", "READY", ""),
            ("tiny", "2", "READY", ""),
        ]
        for call in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="UNIMPLEMENTED.*switched off.*admin token"):
                call("tiny")
        assert client.is_model_ready("tiny")

    def test_there_is_one_repository(self, address):
        with raw_stub(address) as stub, pytest.raises(grpc.RpcError) as caught:
            stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(repository_name="x"), timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "wanted no repository_name" in caught.value.details()


class Control:
    """Remembers what it was told; a RepositoryControl."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    async def load(self, name: str, version: int | None) -> None:
        self.calls.append(("load", name, version))
        if name == "broken":
            raise BundleError(
                "bundle broken/3: wanted the sha256 of the manifest, got another; export it again"
            )
        if name == "fault":
            raise ZeroDivisionError("secret")

    async def unload(self, name: str) -> None:
        self.calls.append(("unload", name))
        if name == "nope":
            raise PolicyNotFoundError("wanted policy 'nope', this server has tiny; name one of them")

    def index(self) -> list[tuple[str, str, str, str]]:
        return [("tiny", "1", "READY", ""), ("tiny", "2", "UNAVAILABLE", "wanted a graph, got none")]


class TestControl:
    @pytest.fixture
    def control(self, server, monkeypatch) -> Control:
        control = Control()
        monkeypatch.setattr(server._endpoint._inference._repository, "_control", control)
        return control

    def test_load_and_unload_reach_it(self, client, control):
        client.load_model("tiny")
        client.unload_model("tiny")
        assert control.calls == [("load", "tiny", None), ("unload", "tiny")]

    def test_aio(self, address, control):
        async def main() -> None:
            async with triton_aio.InferenceServerClient(address) as client:
                await client.load_model("tiny")
                await client.unload_model("tiny")

        asyncio.run(main())
        assert control.calls == [("load", "tiny", None), ("unload", "tiny")]

    def test_the_index_is_its_own(self, client, address, control):
        index = client.get_model_repository_index().models
        assert [(m.version, m.state, m.reason) for m in index] == [
            ("1", "READY", ""),
            ("2", "UNAVAILABLE", "wanted a graph, got none"),
        ]
        with raw_stub(address) as stub:
            ready = stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(ready=True), timeout=TIMEOUT_S)
        assert [m.version for m in ready.models] == ["1"]

    @pytest.mark.parametrize(("kind", "value"), [("int64_param", 3), ("string_param", "3")])
    def test_a_version_can_be_named(self, address, control, kind, value):
        request = service_pb2.RepositoryModelLoadRequest(model_name="tiny")
        setattr(request.parameters["version"], kind, value)
        with raw_stub(address) as stub:
            stub.RepositoryModelLoad(request, timeout=TIMEOUT_S)
        assert control.calls == [("load", "tiny", 3)]

    @pytest.mark.parametrize(
        ("parameter", "kind", "value", "text"),
        [
            ("version", "int64_param", 0, "a number such as 3 as version, got '0'"),
            ("version", "string_param", "x", "got 'x'"),
            ("version", "bool_param", True, "got ''"),
            ("version", "string_param", "9" * 5000, "got '999"),
            ("config", "string_param", "{}", "wanted no parameter but version, got config"),
            ("file:1/model.onnx", "bytes_param", b"", "got file:1/model.onnx"),
        ],
    )
    def test_nothing_else_can_be_brought_along(self, address, control, parameter, kind, value, text):
        request = service_pb2.RepositoryModelLoadRequest(model_name="tiny")
        setattr(request.parameters[parameter], kind, value)
        with raw_stub(address) as stub, pytest.raises(grpc.RpcError) as caught:
            stub.RepositoryModelLoad(request, timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert text in caught.value.details()
        assert control.calls == []

    def test_what_is_wrong_with_a_bundle_is_told(self, client, control):
        with pytest.raises(InferenceServerException, match="FAILED_PRECONDITION.*sha256 of the manifest"):
            client.load_model("broken")
        with pytest.raises(InferenceServerException, match="NOT_FOUND.*policy 'nope'"):
            client.unload_model("nope")
        with pytest.raises(InferenceServerException) as caught:
            client.load_model("fault")
        assert "INTERNAL" in str(caught.value)
        assert "secret" not in str(caught.value)
