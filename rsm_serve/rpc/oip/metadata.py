"""The methods of the Open Inference Protocol that describe the server and its policies."""

from __future__ import annotations

from rsm_common.errors import RequestError
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.registry import Registry
from rsm_serve.pb import oip_pb2 as pb
from rsm_serve.rpc.oip.descriptions import encode_config, encode_metadata, encode_statistics
from rsm_serve.rpc.status import Context, abort
from rsm_serve.rpc.streams import OpenStreams

SERVER_NAME = "rsm-serve"


class MetadataMethods:
    """Liveness, readiness, metadata, configuration and statistics.

    Args:
        registry: the loaded policies.
        server_version: for ServerMetadata.
        extensions: the extensions that work, for ServerMetadata.
        streams: the open streams of the service; while they drain, the server is not ready.
    """

    def __init__(
        self, registry: Registry, server_version: str, extensions: tuple[str, ...], streams: OpenStreams
    ) -> None:
        self._registry = registry
        self._server_version = server_version
        self._extensions = extensions
        self._streams = streams

    async def ServerLive(  # noqa: N802
        self, request: pb.ServerLiveRequest, context: Context
    ) -> pb.ServerLiveResponse:
        """True, because the process answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(  # noqa: N802
        self, request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        """True if at least one policy takes requests."""
        return pb.ServerReadyResponse(ready=not self._streams.draining and bool(self._registry.names))

    async def ModelReady(  # noqa: N802
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        """True if a policy takes requests; false for one that is not loaded."""
        try:
            self._registry.find(request.name, request.version)
        except RequestError:  # unknown, or a version that is loading, draining or has failed
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=not self._streams.draining)

    async def ServerMetadata(  # noqa: N802
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        """Name, version and the extensions that work."""
        return pb.ServerMetadataResponse(
            name=SERVER_NAME, version=self._server_version, extensions=self._extensions
        )

    async def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """A policy's tensors."""
        lane = await self._lane(request.name, request.version, context)
        return encode_metadata(lane.spec, self._versions(lane), lane.runtime)

    async def ModelConfig(  # noqa: N802
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        """A policy's tensors and batching."""
        lane = await self._lane(request.name, request.version, context)
        return encode_config(lane.spec, self._versions(lane), lane.runtime, lane.limits, lane.spec_json)

    async def ModelStatistics(  # noqa: N802
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        """Counts and durations of one version, of all versions of a policy, or of all policies."""
        if request.name or request.version:
            lanes = [await self._lane(request.name, request.version, context)]
            if not request.version:
                lanes = [lane for lane in self._registry.lanes if lane.spec.name == lanes[0].spec.name]
        else:
            lanes = self._registry.lanes
        return pb.ModelStatisticsResponse(model_stats=[encode_statistics(lane.counts) for lane in lanes])

    async def _lane(self, name: str, version: str, context: Context) -> Lane:
        try:
            return self._registry.find(name, version, fixed=True)  # never a canary: the call has no client_id
        except RequestError as error:
            await abort(context, error)

    def _versions(self, lane: Lane) -> list[str]:
        """All loaded versions of the lane's policy."""
        return [other.spec.version for other in self._registry.lanes if other.spec.name == lane.spec.name]
