"""`inference.GRPCInferenceService`, put together from its methods."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc

from rsm_common.errors import NotOfferedError
from rsm_serve.engine.intake import Intake
from rsm_serve.engine.lifecycle import RepositoryControl
from rsm_serve.pb import oip_pb2 as pb
from rsm_serve.pb import oip_pb2_grpc
from rsm_serve.rpc.oip.inference import InferenceMethods
from rsm_serve.rpc.oip.metadata import MetadataMethods
from rsm_serve.rpc.oip.repository import RepositoryMethods
from rsm_serve.rpc.oip.tensors import SERVICE
from rsm_serve.rpc.status import Context, abort
from rsm_serve.rpc.streams import OpenStreams

EXTENSIONS = ("model_configuration", "parameters", "statistics")
"""Triton's extensions that always work."""
CONTROL_EXTENSION = "model_repository"

_METHODS = tuple(pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name)


class InferenceService:
    """`inference.GRPCInferenceService`.

    Args:
        intake: queues the requests.
        server_version: for ServerMetadata.
        control: loads and unloads; None: both are switched off.
    """

    def __init__(self, intake: Intake, server_version: str, control: RepositoryControl | None = None) -> None:
        self._streams = streams = OpenStreams(intake.streams)
        extensions = EXTENSIONS if control is None else (*EXTENSIONS, CONTROL_EXTENSION)
        self._inference = InferenceMethods(intake, streams)
        self._metadata = MetadataMethods(intake.registry, server_version, extensions, streams)
        self._repository = RepositoryMethods(intake.registry, control, streams)

    def drain(self) -> None:
        """Be no longer ready; answer what is in flight, then end the open streams."""
        self._streams.drain()

    def add_to(self, server: Any) -> None:
        """Register the methods with a server, and a sentence for the methods that are not offered."""
        servicer = oip_pb2_grpc.GRPCInferenceServiceServicer()
        parts = (self._inference, self._metadata, self._repository)
        for method in _METHODS:
            (part,) = (part for part in parts if hasattr(part, method))
            setattr(servicer, method, getattr(part, method))
        add: Any = oip_pb2_grpc.add_GRPCInferenceServiceServicer_to_server  # untyped, generated
        add(servicer, server)
        server.add_generic_rpc_handlers((_NotOffered(),))


class _NotOffered(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Methods of the protocol that have no handler: a clear sentence instead of gRPC's own."""

    def service(self, details: Any) -> Any:
        """The handler of a method, None if it belongs to another service."""
        service, _, method = details.method.lstrip("/").partition("/")
        if service != SERVICE:
            return None

        async def refuse(request: bytes, context: Context) -> NoReturn:
            offered = ", ".join(_METHODS)
            await abort(
                context,
                NotOfferedError(f"wanted one of {offered}, got {method:.60}, which this server does not offer"),
            )

        return grpc.unary_unary_rpc_method_handler(refuse)
