"""`inference.GRPCInferenceService`: the Open Inference Protocol over the same registry and batchers.

Decode, submit to the lane, encode; what a message means is in `rsm_serve.rpc.oip_codec`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from functools import partial
from typing import Any, NoReturn

import grpc
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool

from rsm_common.errors import (
    InvalidRequestError,
    NotOfferedError,
    RepositoryError,
    RequestError,
    RsmError,
    wire_status,
)
from rsm_common.policy import ActResult
from rsm_serve.engine.intake import Intake
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.lifecycle import RepositoryControl
from rsm_serve.observe.settled import Answered
from rsm_serve.pb import oip_pb2 as pb
from rsm_serve.pb import oip_pb2_grpc
from rsm_serve.rpc.bad_messages import Abort
from rsm_serve.rpc.oip_codec import (
    MAX_ECHO,
    decode_caller,
    decode_infer,
    encode_config,
    encode_infer,
    encode_metadata,
    encode_statistics,
)
from rsm_serve.rpc.streams import SHUTTING_DOWN, OpenStreams, OrderedStream, Submitted
from rsm_serve.security.access import GRANT, Role

_Context = Any  # grpc has no type stubs

_DESCRIPTOR = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SERVICE: str = _DESCRIPTOR.full_name
SERVER_NAME = "rsm-serve"
READY = "READY"
MAX_VERSION_DIGITS = 19
MAX_NAME_ECHO = 90
"""Characters of a policy's name or version that come back with an error; those of policies are shorter."""

EXTENSIONS = ("model_configuration", "parameters", "statistics")
"""Of Triton's, those that always work."""
CONTROL_EXTENSION = "model_repository"

SWITCHED_OFF = (
    "loading and unloading policies is switched off; start rsm-serve with an admin token (--admin-token-file)"
)
NOT_LOADED = "did not load; the server's log, and an admin, can say why"
"""Instead of a reason that may name files of the server."""

_Answer = Answered[ActResult]


_InferStream = OrderedStream[pb.ModelInferRequest, _Answer, pb.ModelStreamInferResponse]


class InferenceService(oip_pb2_grpc.GRPCInferenceServiceServicer):
    """`inference.GRPCInferenceService`.

    Args:
        intake: where requests enter.
        server_version: for ServerMetadata.
        abort: how a call ends with an error.
        log_fault: told every error inside a stream, which does not end the call.
        control: loads and unloads; None: both are switched off.
    """

    def __init__(
        self,
        intake: Intake,
        server_version: str,
        *,
        abort: Abort,
        log_fault: Callable[[BaseException], None],
        control: RepositoryControl | None = None,
    ) -> None:
        self._intake = intake
        self._registry = intake.registry
        self._server_version = server_version
        self._abort = abort
        self._log_fault = log_fault
        self._control = control
        self._streams = OpenStreams(intake.streams)
        self._draining = False

    def drain(self) -> None:
        """No longer ready; answer what is in flight, then end the open streams."""
        self._draining = True
        self._streams.drain()

    async def ServerLive(  # noqa: N802
        self, request: pb.ServerLiveRequest, context: _Context
    ) -> pb.ServerLiveResponse:
        """Always true: the process answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(  # noqa: N802
        self, request: pb.ServerReadyRequest, context: _Context
    ) -> pb.ServerReadyResponse:
        """Whether requests are taken, for one policy at least."""
        return pb.ServerReadyResponse(ready=not self._draining and bool(self._registry.names))

    async def ModelReady(  # noqa: N802
        self, request: pb.ModelReadyRequest, context: _Context
    ) -> pb.ModelReadyResponse:
        """Whether a policy takes requests; false for one that is not loaded."""
        try:
            self._registry.find(request.name, request.version)
        except RequestError:  # unknown, or a version that is loading, draining or has failed
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=not self._draining)

    async def ServerMetadata(  # noqa: N802
        self, request: pb.ServerMetadataRequest, context: _Context
    ) -> pb.ServerMetadataResponse:
        """Name, version and the extensions that work."""
        extensions = [*EXTENSIONS, *([CONTROL_EXTENSION] if self._control else [])]
        return pb.ServerMetadataResponse(name=SERVER_NAME, version=self._server_version, extensions=extensions)

    async def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, context: _Context
    ) -> pb.ModelMetadataResponse:
        """A policy's tensors."""
        lane = await self._lane(request.name, request.version, context)
        return encode_metadata(lane.spec, self._versions(lane), lane.runtime)

    async def ModelConfig(  # noqa: N802
        self, request: pb.ModelConfigRequest, context: _Context
    ) -> pb.ModelConfigResponse:
        """A policy's tensors and batching."""
        lane = await self._lane(request.name, request.version, context)
        return encode_config(lane.spec, self._versions(lane), lane.runtime, lane.limits, lane.spec_json)

    async def ModelStatistics(  # noqa: N802
        self, request: pb.ModelStatisticsRequest, context: _Context
    ) -> pb.ModelStatisticsResponse:
        """What one version, all versions, or all policies have done."""
        if request.name or request.version:
            lanes = [await self._lane(request.name, request.version, context)]
            if not request.version:
                lanes = [lane for lane in self._registry.lanes if lane.spec.name == lanes[0].spec.name]
        else:
            lanes = self._registry.lanes
        return pb.ModelStatisticsResponse(
            model_stats=[
                encode_statistics(lane.spec.name, lane.spec.version, lane.statistics) for lane in lanes
            ]
        )

    async def ModelInfer(  # noqa: N802
        self, request: pb.ModelInferRequest, context: _Context
    ) -> pb.ModelInferResponse:
        """Sample actions once."""
        try:
            # Cancelling this handler (the caller left, or its deadline passed) cancels the future, which
            # takes the request out of the queue.
            future, encode = self._submit("ModelInfer", request, context)
            return encode(await future)
        except Exception as error:
            await self._abort(context, error)

    async def ModelStreamInfer(  # noqa: N802
        self, requests: AsyncIterator[pb.ModelInferRequest], context: _Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Sample actions at every control step, in order, several in flight."""
        identity = object()
        stream: _InferStream = OrderedStream(
            lambda request: self._submit_streamed(request, context, identity),
            lambda request, error: self._refused(_named(request), error),
        )
        try:
            async with self._streams.open(stream, requests, context.add_done_callback) as responses:
                async for response in responses:
                    yield response
        except RequestError as error:
            await self._abort(context, error)

    async def RepositoryIndex(  # noqa: N802
        self, request: pb.RepositoryIndexRequest, context: _Context
    ) -> pb.RepositoryIndexResponse:
        """Policies and versions, and the state of each."""
        try:
            _check_repository(request.repository_name)
        except RequestError as error:
            await self._abort(context, error)
        entries = self._loaded() if self._control is None else self._control.index()
        grant = GRANT.get()
        hidden = grant is not None and grant.role is not Role.ADMIN
        response = pb.RepositoryIndexResponse()
        for name, version, state, reason in entries:
            if self._control is not None and reason and hidden:
                reason = NOT_LOADED
            if state == READY or not request.ready:
                response.models.add(name=name, version=version, state=state, reason=reason)
        return response

    async def RepositoryModelLoad(  # noqa: N802
        self, request: pb.RepositoryModelLoadRequest, context: _Context
    ) -> pb.RepositoryModelLoadResponse:
        """Load a version of a policy."""
        try:
            control = self._controlled(request.repository_name)
            await control.load(request.model_name, _version_to_load(request.parameters))
        except Exception as error:
            await self._abort(context, _told_to_admin(error))
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(  # noqa: N802
        self, request: pb.RepositoryModelUnloadRequest, context: _Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Unload all versions of a policy."""
        try:
            await self._controlled(request.repository_name).unload(request.model_name)
        except Exception as error:
            await self._abort(context, _told_to_admin(error))
        return pb.RepositoryModelUnloadResponse()

    async def refuse(self, method: str, context: _Context) -> NoReturn:
        """Answer a method of the protocol that is not offered."""
        offered = ", ".join(_DESCRIPTOR.methods_by_name)
        error = NotOfferedError(f"wanted one of {offered}, got {method:.60}, which this server does not offer")
        await self._abort(context, error)

    def _submit(
        self, method: str, request: pb.ModelInferRequest, context: _Context, stream: object | None = None
    ) -> tuple[asyncio.Future[_Answer], Callable[[_Answer], pb.ModelInferResponse]]:
        """The future answer, and what makes its message."""
        lane, call, future = self._intake.submit(
            f"{SERVICE}/{method}",
            context,
            request.model_name,
            request.model_version,
            lambda: decode_caller(request),
            lambda lane: decode_infer(lane.spec, request, lane.limits.max_batch_size),
            stream,
        )
        return future, partial(encode_infer, lane.spec, call, request.id)

    def _submit_streamed(
        self, request: pb.ModelInferRequest, context: _Context, stream: object
    ) -> Submitted[_Answer, pb.ModelStreamInferResponse]:
        future, encode = self._submit("ModelStreamInfer", request, context, stream)
        refuse = partial(self._refused, _named(request))  # not the request, which may be large
        return Submitted(future, lambda answered: _streamed(encode(answered)), refuse)

    def _refused(self, named: pb.ModelInferResponse, error: Exception) -> pb.ModelStreamInferResponse:
        self._log_fault(error)
        return pb.ModelStreamInferResponse(error_message=": ".join(wire_status(error)), infer_response=named)

    async def _lane(self, name: str, version: str, context: _Context) -> Lane:
        try:
            # What a caller meets who is no canary's; nobody in particular asks here.
            return self._registry.find(name, version, fixed=True)
        except RequestError as error:
            await self._abort(context, error)

    def _versions(self, lane: Lane) -> list[str]:
        """All loaded versions of the lane's policy."""
        return [other.spec.version for other in self._registry.lanes if other.spec.name == lane.spec.name]

    def _loaded(self) -> list[tuple[str, str, str, str]]:
        state, reason = ("UNAVAILABLE", SHUTTING_DOWN) if self._draining else (READY, "")
        return [(lane.spec.name, lane.spec.version, state, reason) for lane in self._registry.lanes]

    def _controlled(self, repository_name: str) -> RepositoryControl:
        if self._control is None:
            raise NotOfferedError(SWITCHED_OFF)
        _check_repository(repository_name)
        return self._control


def _named(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    """What of a request comes back with an error, as much of it as can."""
    return pb.ModelInferResponse(
        model_name=request.model_name[:MAX_NAME_ECHO],
        model_version=request.model_version[:MAX_NAME_ECHO],
        id=request.id[:MAX_ECHO],
    )


def _streamed(response: pb.ModelInferResponse) -> pb.ModelStreamInferResponse:
    # What Triton says of a policy with one response per request.
    response.parameters["triton_final_response"].bool_param = True
    return pb.ModelStreamInferResponse(infer_response=response)


def _check_repository(name: str) -> None:
    if name:
        raise InvalidRequestError(
            f"wanted no repository_name, because there is one repository, got {name!r:.60}; leave it empty"
        )


def _version_to_load(parameters: Mapping[str, pb.ModelRepositoryParameter]) -> int | None:
    """The parameter `version`, None if it is not there."""
    if others := sorted(set(parameters) - {"version"}):
        raise InvalidRequestError(
            f"wanted no parameter but version, got {', '.join(others):.60}; a bundle brings its own files and "
            "configuration, publish another version instead"
        )
    if "version" not in parameters:
        return None
    kind = parameters["version"].WhichOneof("parameter_choice")
    text = str(getattr(parameters["version"], kind)) if kind in ("int64_param", "string_param") else ""
    if not (text.isascii() and text.isdecimal() and len(text) < MAX_VERSION_DIGITS and int(text) > 0):
        raise InvalidRequestError(f"wanted a number such as 3 as version, got {text!r:.60}; or leave it out")
    return int(text)


def _told_to_admin(error: Exception) -> Exception:
    """Who may load a bundle may know what is wrong with it."""
    known = isinstance(error, RsmError) and not isinstance(error, RequestError)
    return RepositoryError(str(error)) if known else error


class _NotOffered(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Methods of the protocol that have no handler: a clear sentence instead of gRPC's own."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service

    def service(self, details: Any) -> Any:
        """The handler of a method, None if it is another service's."""
        service, _, method = details.method.lstrip("/").partition("/")
        if service != SERVICE:
            return None

        async def refuse(request: bytes, context: _Context) -> NoReturn:
            await self._service.refuse(method, context)

        return grpc.unary_unary_rpc_method_handler(refuse)


def add_to_server(service: InferenceService, server: Any) -> None:
    """Register the service, and a sentence for the methods that it does not have."""
    add_service: Any = oip_pb2_grpc.add_GRPCInferenceServiceServicer_to_server  # untyped, generated
    add_service(service, server)
    server.add_generic_rpc_handlers((_NotOffered(service),))


def reflection_pool(files: Iterable[FileDescriptor]) -> DescriptorPool:
    """One pool for server reflection, of files from any pools that import no others."""
    pool = DescriptorPool()
    for file in files:
        pool.AddSerializedFile(file.serialized_pb)
    return pool
