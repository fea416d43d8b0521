"""Answers of the Open Inference Protocol; pure functions."""

from __future__ import annotations

from collections.abc import Mapping

from rsm_common.policy import ActResult, Adjustment
from rsm_common.spec import PolicySpec
from rsm_serve.observe.settled import Answered
from rsm_serve.pb import oip_pb2 as pb
from rsm_serve.rpc.oip.requests import InferCall
from rsm_serve.rpc.oip.tensors import DTYPES


def encode_infer(
    spec: PolicySpec, call: InferCall, request_id: str, answered: Answered[ActResult]
) -> pb.ModelInferResponse:
    """The message for an answer, contents raw and in the order of the outputs."""
    result = answered.answer
    response = pb.ModelInferResponse(model_name=spec.name, model_version=result.version, id=request_id)
    arrays = {"action": result.action, "q": result.q}
    for tensor in call.outputs:
        array = arrays[tensor.name]
        assert array is not None
        shape = (len(result.action), *tensor.shown)
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
        response.raw_output_contents.append(array.astype(DTYPES[tensor.datatype], copy=False).tobytes())
    _tell(response.parameters, answered)
    if call.obs_stamp is not None:
        response.parameters["obs_stamp"].CopyFrom(call.obs_stamp)
    return response


def _tell(parameters: Mapping[str, pb.InferParameter], answered: Answered[ActResult]) -> None:
    """Where the answer comes from and where the time went, microseconds."""
    result, timing = answered.answer, answered.answer.timing
    parameters["version"].string_param = result.version
    parameters["queue_us"].double_param = answered.queue_us
    parameters["batch_us"].double_param = timing.batch_us
    parameters["compute_us"].double_param = timing.compute_us
    parameters["batch_rows"].int64_param = timing.batch_rows
    if result.adjusted is not None:
        names = [Adjustment(value).name.lower() for value in result.adjusted.tolist()]
        parameters["adjusted"].string_param = ",".join(names)
    if result.seed is None:  # the request carried noise
        return
    if len(result.seed) == 1:
        parameters["seed"].uint64_param = int(result.seed[0])
    else:
        parameters["seed"].string_param = ",".join(map(str, result.seed.tolist()))
