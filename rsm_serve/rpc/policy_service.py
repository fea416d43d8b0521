"""`rsm.v1.PolicyService`: the protocol of the toolkit's own clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

from rsm_common.errors import RequestError
from rsm_common.policy import ActResult
from rsm_serve.engine.intake import Intake
from rsm_serve.observe.settled import Answered
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.pb import policy_pb2_grpc
from rsm_serve.rpc.status import Context, abort, log_fault
from rsm_serve.rpc.streams import OpenStreams, OrderedStream, Submitted
from rsm_serve.wire.caller import Caller, check_client_id, check_priority
from rsm_serve.wire.codec import SERVICE, decode_request, encode_error, encode_response

_ActStream = OrderedStream[pb.ActRequest, Answered[ActResult], pb.ActResponse]


class PolicyService(policy_pb2_grpc.PolicyServiceServicer):
    """`rsm.v1.PolicyService`.

    Args:
        intake: queues the requests.
        server_version: for GetSpec.
    """

    def __init__(self, intake: Intake, server_version: str) -> None:
        self._intake = intake
        self._server_version = server_version
        self._streams = OpenStreams(intake.streams)

    async def GetSpec(  # noqa: N802
        self, request: pb.GetSpecRequest, context: Context
    ) -> pb.GetSpecResponse:
        """The specification of a policy."""
        try:
            # Never a canary: the call has no client_id.
            lane = self._intake.registry.find(request.policy, request.version, fixed=True)
        except RequestError as error:
            await abort(context, error)
        return pb.GetSpecResponse(
            spec_json=lane.spec_json,
            max_batch_size=lane.limits.max_batch_size,
            server_version=self._server_version,
        )

    async def Act(self, request: pb.ActRequest, context: Context) -> pb.ActResponse:  # noqa: N802
        """Sample actions once."""
        try:
            # gRPC cancels this handler when the caller left or its deadline passed. That cancels the future,
            # which takes the request out of the queue.
            answered = await self._submit("Act", request, context)
            return encode_response(request.request_id, answered.answer, answered.queue_us)
        except Exception as error:
            await abort(context, error, request_id=request.request_id)

    async def ActStream(  # noqa: N802
        self, requests: AsyncIterator[pb.ActRequest], context: Context
    ) -> AsyncIterator[pb.ActResponse]:
        """Sample actions at every control step, in order, several in flight."""

        identity = object()

        def submit(request: pb.ActRequest) -> Submitted[Answered[ActResult], pb.ActResponse]:
            future = self._submit("ActStream", request, context, identity)
            request_id = request.request_id  # not the request, which may be large
            return Submitted(
                future,
                lambda done: encode_response(request_id, done.answer, done.queue_us),
                partial(_refused, request_id),
            )

        stream: _ActStream = OrderedStream(submit, lambda request, error: _refused(request.request_id, error))
        try:
            async with self._streams.open(stream, requests, context.add_done_callback) as responses:
                async for response in responses:
                    yield response
        except RequestError as error:
            await abort(context, error)

    def drain(self) -> None:
        """Answer what is in flight, then end the open streams."""
        self._streams.drain()

    def _submit(
        self, method: str, request: pb.ActRequest, context: Context, stream: object | None = None
    ) -> asyncio.Future[Answered[ActResult]]:
        policy, version = request.policy, request.version
        with self._intake.receive(SERVICE, method, context, policy, version, stream) as arrival:
            lane = arrival.find(_caller(request))
            return arrival.submit(decode_request(lane.spec, request, lane.limits.max_batch_size))


def _caller(request: pb.ActRequest) -> Caller:
    return Caller(
        client_id=check_client_id(request.client_id),
        priority=check_priority(request.priority),
        seed=request.seeds[0] if request.seeds else None,
        fixed=request.deterministic or bool(request.noise),
    )


def _refused(request_id: int, error: Exception) -> pb.ActResponse:
    log_fault(error, request_id=request_id)
    return encode_error(request_id, error)
