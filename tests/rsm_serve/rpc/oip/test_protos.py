"""The messages of the Open Inference Protocol: the same as tritonclient's, and beside them in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto
from tritonclient.grpc import model_config_pb2, service_pb2

from rsm_serve.pb import oip_pb2
from tests.hang import HANG_S

OURS = oip_pb2.DESCRIPTOR.pool
THEIRS = service_pb2.DESCRIPTOR.pool
# Of KServe's protocol, which Triton's messages lack.
NOT_IN_TRITON = {
    "inference.ModelMetadataResponse.properties",
    "inference.ModelMetadataResponse.PropertiesEntry",
}


def as_proto(descriptor: Any) -> DescriptorProto:
    proto = DescriptorProto()
    descriptor.CopyToProto(proto)
    return proto


def messages(descriptors: Any, prefix: str = "inference.") -> dict[str, DescriptorProto]:
    """Full name -> message, nested ones included."""
    found = {}
    for proto in descriptors:
        found[prefix + proto.name] = proto
        found |= messages(proto.nested_type, f"{prefix}{proto.name}.")
    return found


def enums(protos: dict[str, DescriptorProto], top: Any) -> dict[str, dict[str, int]]:
    found: dict[str, EnumDescriptorProto] = {}
    for descriptor in top:
        found[f"inference.{descriptor.name}"] = EnumDescriptorProto()
        descriptor.CopyToProto(found[f"inference.{descriptor.name}"])
    for name, proto in protos.items():
        found |= {f"{name}.{enum.name}": enum for enum in proto.enum_type}
    return {name: {value.name: value.number for value in enum.value} for name, enum in found.items()}


def fields(name: str, proto: DescriptorProto) -> dict[str, tuple[Any, ...]]:
    """Full name of each field -> all that the wire and other languages see of it."""
    return {
        f"{name}.{field.name}": (
            field.number,
            field.type,
            field.label,
            field.type_name,
            proto.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else None,
        )
        for field in proto.field
    }


MINE = messages(map(as_proto, oip_pb2.DESCRIPTOR.message_types_by_name.values()))
TRITONS = messages(
    as_proto(descriptor)
    for file in (service_pb2, model_config_pb2)
    for descriptor in file.DESCRIPTOR.message_types_by_name.values()
)


@pytest.mark.parametrize("name", sorted(MINE.keys() - NOT_IN_TRITON))
def test_every_field_is_tritonclients(name):
    theirs = fields(name, TRITONS[name])
    mine = {field: value for field, value in fields(name, MINE[name]).items() if field not in NOT_IN_TRITON}
    assert mine == {field: theirs.get(field) for field in mine}
    assert MINE[name].options.map_entry == TRITONS[name].options.map_entry


def test_every_enum_value_is_tritonclients():
    mine = enums(MINE, oip_pb2.DESCRIPTOR.enum_types_by_name.values())
    theirs = enums(TRITONS, model_config_pb2.DESCRIPTOR.enum_types_by_name.values())
    assert mine
    for name, values in mine.items():
        assert values.items() <= theirs[name].items(), name


def test_every_method_is_tritonclients():
    mine = oip_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert mine.full_name == theirs.full_name
    assert len(mine.methods) == 12
    for method in mine.methods:
        other = theirs.methods_by_name[method.name]
        for side in ("input_type", "output_type"):
            assert getattr(method, side).full_name == getattr(other, side).full_name
        assert (method.client_streaming, method.server_streaming) == (
            other.client_streaming,
            other.server_streaming,
        )


def test_what_triton_lacks_has_its_number_of_the_specification():
    for name in NOT_IN_TRITON:
        message, _, field = name.rpartition(".")
        assert field not in {other.name for other in TRITONS[message].field}
    message = "inference.ModelMetadataResponse"
    assert fields(message, MINE[message])[f"{message}.properties"][0] == 6
    assert MINE[f"{message}.PropertiesEntry"].options.map_entry


def test_the_pools_are_apart():
    assert OURS is not THEIRS
    assert OURS.FindMessageTypeByName("inference.ModelInferRequest") is oip_pb2.ModelInferRequest.DESCRIPTOR


IMPORTS = ("import rsm_serve.server", "import tritonclient.grpc, tritonclient.grpc.aio")
SERVE = """
import asyncio, pathlib, sys
import numpy as np
from rsm_serve.config import ServerConfig
from rsm_serve.server import background_server

def tensors(module):
    tensor = module.InferInput("obs", [1, 4], "FP32")
    return [tensor.set_data_from_numpy(np.zeros((1, 4), np.float32))]

async def asked_async(address):
    async with tritonclient.grpc.aio.InferenceServerClient(address) as client:
        return (await client.infer("tiny", tensors(tritonclient.grpc.aio))).as_numpy("action").shape

config = ServerConfig.from_options(pathlib.Path(sys.argv[1]), addresses=("127.0.0.1:0",), backend="onnxruntime")
with background_server(config) as server:
    with tritonclient.grpc.InferenceServerClient(server.addresses[0]) as client:
        print(client.infer("tiny", tensors(tritonclient.grpc)).as_numpy("action").shape)
    print(asyncio.run(asked_async(server.addresses[0])))
"""
ROUND_TRIP = """
from rsm_serve.pb import oip_pb2, oip_pb2_grpc
from tritonclient.grpc import service_pb2
theirs = service_pb2.ModelInferRequest(model_name="tiny", raw_input_contents=[b"1234"])
theirs.parameters["priority"].uint64_param = 3
theirs.inputs.add(name="obs", shape=[1, 4])
ours = oip_pb2.ModelInferRequest.FromString(theirs.SerializeToString())
assert ours.parameters["priority"].uint64_param == 3
assert ours.inputs[0].shape == [1, 4]
assert service_pb2.ModelInferRequest.FromString(ours.SerializeToString()) == theirs
from google.protobuf.internal import api_implementation
print(api_implementation.Type())
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("imports", [IMPORTS, IMPORTS[::-1]], ids=["server-first", "tritonclient-first"])
class TestOneProcess:
    def test_server_and_both_clients(self, imports, bundle_repo):
        assert run("\n".join(imports) + SERVE, str(bundle_repo)) == "(1, 2)\n(1, 2)\n"

    def test_pure_python_protobuf(self, imports):
        """Where protobuf has no binary wheel."""
        imports = [line.replace("rsm_serve.server", "rsm_serve.pb.oip_pb2") for line in imports]
        output = run("\n".join(imports) + ROUND_TRIP, PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION="python")
        assert output == "python\n"
