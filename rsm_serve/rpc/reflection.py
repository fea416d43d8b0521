"""Server reflection: the protocols of every service, for clients that do not know them."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from rsm_serve.pb import oip_pb2, policy_pb2

_SERVICES = [
    service
    for module in (policy_pb2, oip_pb2, health_pb2, reflection_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
]
METHODS = frozenset(
    f"/{service.full_name}/{method}" for service in _SERVICES for method in service.methods_by_name
)
"""Full names of all methods that the server answers."""


def add_reflection(server: Any) -> None:
    """Register server reflection with a server."""
    # One pool for the reflection alone: the files are in several pools, and none imports another file.
    pool = DescriptorPool()
    for service in _SERVICES:
        pool.AddSerializedFile(service.file.serialized_pb)
    names = [service.full_name for service in _SERVICES]
    servicer = reflection.aio.ReflectionServicer(names, pool=pool)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
