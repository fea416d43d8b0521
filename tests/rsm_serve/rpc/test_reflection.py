"""Server reflection, read by a client that knows no protocol."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.rsm_serve.rpc.oip.ask import (
    TIMEOUT_S,
)


class TestReflection:
    def test_a_client_that_knows_nothing_learns_enough_to_ask(self, address):
        """What grpcurl does: find the service, fetch its file, build messages, call."""
        with grpc.insecure_channel(address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            requests = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService"),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol="rsm.v1.PolicyService"),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol="grpc.health.v1.Health"),
            ]
            listed, *files = stub.ServerReflectionInfo(iter(requests), timeout=TIMEOUT_S)
            names = {service.name for service in listed.list_services_response.service}
            assert "inference.GRPCInferenceService" in names
            pool = descriptor_pool.DescriptorPool()
            for answer in files:
                for content in answer.file_descriptor_response.file_descriptor_proto:
                    pool.Add(FileDescriptorProto.FromString(content))
            assert pool.FindServiceByName("rsm.v1.PolicyService")
            method = pool.FindServiceByName("inference.GRPCInferenceService").methods_by_name["ModelInfer"]
            ask: Any = message_factory.GetMessageClass(method.input_type)
            answered: Any = message_factory.GetMessageClass(method.output_type)
            call = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                request_serializer=ask.SerializeToString,
                response_deserializer=answered.FromString,
            )
            body = {
                "model_name": "tiny",
                "inputs": [
                    {
                        "name": "obs",
                        "datatype": "FP32",
                        "shape": [1, 4],
                        "contents": {"fp32_contents": [0, 0, 0, 0]},
                    }
                ],
            }
            response = call(json_format.ParseDict(body, ask()), timeout=TIMEOUT_S)
        assert [output.name for output in response.outputs] == ["action", "q"]

    def test_it_describes_only_what_is_offered(self, address):
        with grpc.insecure_channel(address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(
                file_containing_symbol="inference.SystemSharedMemoryStatusRequest"
            )
            (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=TIMEOUT_S)
        assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
