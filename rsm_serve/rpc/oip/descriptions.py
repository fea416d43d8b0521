"""A policy's tensors, batching and counts as messages of the Open Inference Protocol; pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rsm_common.spec import PolicySpec
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.observe.counts import Durations, Histogram, LaneCounts
from rsm_serve.pb import oip_pb2 as pb
from rsm_serve.rpc.oip.tensors import Tensor, input_tensors, output_tensors

_ENUM = {"FP32": pb.TYPE_FP32, "UINT64": pb.TYPE_UINT64}


def encode_metadata(spec: PolicySpec, versions: Sequence[str], runtime: str) -> pb.ModelMetadataResponse:
    """A policy's tensors, the batch axis shown as -1."""
    response = pb.ModelMetadataResponse(name=spec.name, versions=versions, platform=platform(runtime))
    for tensors, messages in (
        (input_tensors(spec), response.inputs),
        (output_tensors(spec), response.outputs),
    ):
        for tensor in tensors:
            messages.add(name=tensor.name, datatype=tensor.datatype, shape=(-1, *tensor.shown))
    response.properties.update(
        algorithm=spec.algorithm, env_id=spec.env_id, precision=spec.precision, runtime=runtime
    )
    return response


def encode_config(
    spec: PolicySpec, versions: Sequence[str], runtime: str, limits: BatchLimits, spec_json: str
) -> pb.ModelConfigResponse:
    """A policy's tensors, without the batch axis, and how its requests are batched."""
    response = pb.ModelConfigResponse()
    config = response.config
    config.name = spec.name
    config.platform, config.backend = platform(runtime), backend(runtime)
    config.version_policy.specific.versions.extend(map(int, versions))
    config.max_batch_size = limits.max_batch_size
    for tensor in input_tensors(spec):
        _describe(tensor, config.input.add(optional=tensor.optional))
    for tensor in output_tensors(spec):
        _describe(tensor, config.output.add())
    kind = pb.ModelInstanceGroup.KIND_CPU if "CPU" in runtime else pb.ModelInstanceGroup.KIND_GPU
    config.instance_group.add(name=f"{spec.name}_0", count=1, kind=kind)
    config.dynamic_batching.max_queue_delay_microseconds = round(1e6 * limits.max_queue_delay_s)
    config.dynamic_batching.default_queue_policy.allow_timeout_override = True
    config.parameters["policy_json"].string_value = spec_json
    config.model_transaction_policy.decoupled = False
    return response


def _describe(tensor: Tensor, message: Any) -> None:
    message.name, message.data_type = tensor.name, _ENUM[tensor.datatype]
    message.dims.extend(tensor.shown)
    if not tensor.dims:
        message.reshape.SetInParent()


def backend(runtime: str) -> str:
    """Triton's kind of name: "onnxruntime" of "onnxruntime 1.31.1, CPU"."""
    return runtime.split()[0].lower()


def platform(runtime: str) -> str:
    """The backend and the format of what it runs, as in config.pbtxt: "onnxruntime_onnx"."""
    return f"{backend(runtime)}_onnx"


def encode_statistics(counts: LaneCounts) -> pb.ModelStatistics:
    """Make the message of what one version of a policy has done."""
    message = pb.ModelStatistics(
        name=counts.policy,
        version=counts.version,
        last_inference=counts.last_arrival_ns // 1_000_000,
        inference_count=counts.rows,
        execution_count=counts.executions,
    )
    totals = message.inference_stats
    _sum(totals.success, counts.request_s)
    _sum(totals.fail, counts.failed)
    _sum(totals.queue, counts.queue_s)
    _sum(totals.compute_input, counts.stacking)
    _sum(totals.compute_infer, counts.network)
    totals.compute_output.count = counts.network.count  # slicing the batch: not worth a clock
    for rows, batches in sorted(counts.by_batch_rows.items()):
        batch = message.batch_stats.add(batch_size=rows)
        _sum(batch.compute_input, batches.stacking)
        _sum(batch.compute_infer, batches.network)
        batch.compute_output.count = batches.network.count
    return message


def _sum(message: pb.StatisticDuration, durations: Durations | Histogram) -> None:
    message.count, message.ns = durations.count, round(1e9 * durations.total)
