"""The methods of the Open Inference Protocol that sample actions: decode, submit to the lane, encode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial

from rsm_common.errors import RequestError, wire_status
from rsm_common.policy import ActResult
from rsm_serve.engine.intake import Intake
from rsm_serve.observe.settled import Answered
from rsm_serve.pb import oip_pb2 as pb
from rsm_serve.rpc.oip.requests import MAX_ECHO, decode_caller, decode_infer
from rsm_serve.rpc.oip.responses import encode_infer
from rsm_serve.rpc.oip.tensors import SERVICE
from rsm_serve.rpc.status import Context, abort, log_fault
from rsm_serve.rpc.streams import OpenStreams, OrderedStream, Submitted

MAX_NAME_ECHO = 90
"""Characters of a policy's name or version that an error repeats; real names are shorter."""

_Answer = Answered[ActResult]
_InferStream = OrderedStream[pb.ModelInferRequest, _Answer, pb.ModelStreamInferResponse]


class InferenceMethods:
    """ModelInfer and ModelStreamInfer.

    Args:
        intake: queues the requests.
        streams: the open streams of the service.
    """

    def __init__(self, intake: Intake, streams: OpenStreams) -> None:
        self._intake = intake
        self._streams = streams

    async def ModelInfer(  # noqa: N802
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        """Sample actions once."""
        try:
            # gRPC cancels this handler when the caller left or its deadline passed. That cancels the future,
            # which takes the request out of the queue.
            future, encode = self._submit("ModelInfer", request, context)
            return encode(await future)
        except Exception as error:
            await abort(context, error)

    async def ModelStreamInfer(  # noqa: N802
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Sample actions at every control step, in order, several in flight."""
        identity = object()
        stream: _InferStream = OrderedStream(
            lambda request: self._submit_streamed(request, context, identity),
            lambda request, error: _refused(_named(request), error),
        )
        try:
            async with self._streams.open(stream, requests, context.add_done_callback) as responses:
                async for response in responses:
                    yield response
        except RequestError as error:
            await abort(context, error)

    def _submit(
        self, method: str, request: pb.ModelInferRequest, context: Context, stream: object | None = None
    ) -> tuple[asyncio.Future[_Answer], Callable[[_Answer], pb.ModelInferResponse]]:
        """The future answer, and the function that makes its message."""
        name, version = request.model_name, request.model_version
        with self._intake.receive(SERVICE, method, context, name, version, stream) as arrival:
            lane = arrival.find(decode_caller(request))
            call = decode_infer(lane.spec, request, lane.limits.max_batch_size)
            future = arrival.submit(call.rows, call.timeout_s)
        return future, partial(encode_infer, lane.spec, call, request.id)

    def _submit_streamed(
        self, request: pb.ModelInferRequest, context: Context, stream: object
    ) -> Submitted[_Answer, pb.ModelStreamInferResponse]:
        future, encode = self._submit("ModelStreamInfer", request, context, stream)
        refuse = partial(_refused, _named(request))  # not the request, which may be large
        return Submitted(future, lambda answered: _streamed(encode(answered)), refuse)


def _refused(named: pb.ModelInferResponse, error: Exception) -> pb.ModelStreamInferResponse:
    log_fault(error)
    return pb.ModelStreamInferResponse(error_message=": ".join(wire_status(error)), infer_response=named)


def _named(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    """The fields of a request that an error repeats, cut to their longest length."""
    return pb.ModelInferResponse(
        model_name=request.model_name[:MAX_NAME_ECHO],
        model_version=request.model_version[:MAX_NAME_ECHO],
        id=request.id[:MAX_ECHO],
    )


def _streamed(response: pb.ModelInferResponse) -> pb.ModelStreamInferResponse:
    # Triton sets it for a policy with one response per request.
    response.parameters["triton_final_response"].bool_param = True
    return pb.ModelStreamInferResponse(infer_response=response)
