"""Requests of the Open Inference Protocol as validated arrays; pure functions."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import InvalidRequestError
from rsm_common.policy import ActRows, Seed, act_rows
from rsm_common.spec import PolicySpec
from rsm_serve.pb import oip_pb2 as pb
from rsm_serve.rpc.oip.tensors import DTYPES, Tensor, input_tensors, output_tensors
from rsm_serve.wire.caller import MAX_PRIORITY, Caller, check_client_id, check_rows

SHARED_MEMORY = "shared_memory_region"
MAX_ECHO = 1024
"""Characters of a field that the answer repeats, so that no request makes an answer too large to be sent."""
MAX_INPUTS = 3
SEED_DIGITS = len(str(2**64 - 1))

_CONTENTS = {"FP32": "fp32_contents", "UINT64": "uint64_contents"}


@dataclass(frozen=True)
class InferCall:
    """A validated ModelInfer request."""

    rows: ActRows
    outputs: tuple[Tensor, ...]
    """In the order in which they were asked for."""
    timeout_s: float | None
    """How long the answer is of use; None: for ever."""
    obs_stamp: pb.InferParameter | None
    """Echoed as it came."""


def decode_caller(request: pb.ModelInferRequest) -> Caller:
    """Who asks, and how urgently; read before the rest, because it decides which version that is for.

    Raises:
        InvalidRequestError: a parameter of the wrong type, or out of range.
    """
    parameters = request.parameters
    client_id = _parameter("client_id", parameters, ("string_param", "int64_param", "uint64_param"))
    level = _whole("priority", parameters)
    return Caller(
        client_id=check_client_id("" if client_id is None else str(client_id)),
        # Triton counts from 1, which is the most urgent, and 0 is the default.
        priority=max(-MAX_PRIORITY, MAX_PRIORITY + 1 - level) if level else 0,
        seed=_first_seed(request),
        fixed=bool(_parameter("deterministic", parameters, ("bool_param",)))
        or any(tensor.name == "noise" for tensor in request.inputs[:MAX_INPUTS]),
    )


def _first_seed(request: pb.ModelInferRequest) -> int | None:
    if "seed" in request.parameters:
        kinds = ("int64_param", "uint64_param", "string_param")
        text = str(_parameter("seed", request.parameters, kinds)).partition(",")[0]
        return int(text) if text.isascii() and text.isdecimal() and len(text) <= SEED_DIGITS else None
    for index, tensor in enumerate(request.inputs[:MAX_INPUTS]):
        if tensor.name == "seed":
            if tensor.contents.uint64_contents:
                return int(tensor.contents.uint64_contents[0])
            raw = request.raw_input_contents[index][:8] if index < len(request.raw_input_contents) else b""
            return int.from_bytes(raw, "little") if len(raw) == 8 else None
    return None


def decode_infer(spec: PolicySpec, request: pb.ModelInferRequest, max_rows: int) -> InferCall:
    """Validate a request.

    Raises:
        InvalidRequestError: a tensor that is unknown, missing, or of another datatype, shape or byte count; NaN
            or Inf; contents in two places; an unknown output; a parameter of the wrong type; or an id or
            obs_stamp that is too long.
    """
    _check_echoes(request)
    arrays = _read_inputs(input_tensors(spec), request, max_rows)
    if "obs" not in arrays:
        raise InvalidRequestError(
            f"wanted the input 'obs' (FP32, [B, {spec.observation.size}]), got "
            f"{_names(arrays) or 'no inputs'}; add it"
        )
    parameters = request.parameters
    timeout_us = _whole("timeout", parameters)
    rows = act_rows(
        spec,
        arrays["obs"],
        seed=_seed(parameters, arrays.get("seed"), len(arrays["obs"])),
        noise=arrays.get("noise"),
        deterministic=bool(_parameter("deterministic", parameters, ("bool_param",))),
    )
    return InferCall(
        rows=rows,
        outputs=_requested(output_tensors(spec), request.outputs),
        timeout_s=1e-6 * timeout_us if timeout_us else None,
        obs_stamp=parameters.get("obs_stamp"),
    )


def _check_echoes(request: pb.ModelInferRequest) -> None:
    stamp = request.parameters["obs_stamp"].string_param if "obs_stamp" in request.parameters else ""
    for name, text in (("id", request.id), ("obs_stamp", stamp)):
        if len(text) > MAX_ECHO:
            raise InvalidRequestError(
                f"wanted an {name} of at most {MAX_ECHO} characters, got {len(text)}; use a number or a UUID"
            )


def _read_inputs(
    tensors: Sequence[Tensor], request: pb.ModelInferRequest, max_rows: int
) -> dict[str, NDArray[Any]]:
    known = {tensor.name: tensor for tensor in tensors}
    raw = request.raw_input_contents
    if len(request.inputs) > MAX_INPUTS:  # before anything is done with as many
        raise InvalidRequestError(
            f"wanted each of the inputs {_names(known)} at most once, got {len(request.inputs)} inputs; "
            "see ModelMetadata"
        )
    if raw and any(message.HasField("contents") for message in request.inputs):
        raise InvalidRequestError(
            "wanted either raw_input_contents or contents, got both in one request; use one for all inputs"
        )
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequestError(
            f"wanted one of raw_input_contents per input, got {len(raw)} for {len(request.inputs)} inputs; "
            "send them in the order of the inputs"
        )
    arrays: dict[str, NDArray[Any]] = {}
    for index, message in enumerate(request.inputs):
        if message.name not in known or message.name in arrays:
            raise InvalidRequestError(
                f"wanted each of the inputs {_names(known)} at most once, got {message.name!r:.60}; "
                "see ModelMetadata"
            )
        arrays[message.name] = _read(known[message.name], message, raw[index] if raw else None, max_rows)
    return arrays


def _read(
    tensor: Tensor, message: pb.ModelInferRequest.InferInputTensor, raw: bytes | None, max_rows: int
) -> NDArray[Any]:
    """An input as an array of the shape that the message claims, which is one of the tensor's."""
    name, shape = tensor.name, list(message.shape)
    _refuse_shared_memory(f"input {name!r}", message.parameters)
    if message.datatype != tensor.datatype:
        raise InvalidRequestError(
            f"wanted datatype {tensor.datatype} for input {name!r}, got {message.datatype!r:.60}; convert it"
        )
    if not shape or shape[0] < 1 or tuple(shape[1:]) not in (tensor.shown, tensor.dims):
        raise InvalidRequestError(
            f"wanted input {name!r} of shape {_shape(tensor.shown)} with B >= 1, got {shape!s:.60}; "
            "the first axis is the batch"
        )
    dtype, count = DTYPES[tensor.datatype], math.prod(shape)
    if raw is None:
        check_rows(shape[0], max_rows)  # before as many numbers are converted one by one
        values = getattr(message.contents, _CONTENTS[tensor.datatype])
        if len(values) != count:
            raise InvalidRequestError(
                f"wanted {count} numbers in {_CONTENTS[tensor.datatype]} of input {name!r} ({shape}), "
                f"got {len(values)}; send them there, or as raw_input_contents"
            )
        return np.array(values, dtype).reshape(shape)
    if len(raw) != dtype.itemsize * count:
        raise InvalidRequestError(
            f"wanted {dtype.itemsize * count} bytes of input {name!r} ({tensor.datatype} {shape}), "
            f"got {len(raw)}; send raw little-endian {tensor.datatype} in row-major order"
        )
    check_rows(shape[0], max_rows)
    return np.frombuffer(raw, dtype).reshape(shape)


def _requested(tensors: Sequence[Tensor], wanted: Sequence[Any]) -> tuple[Tensor, ...]:
    """The outputs that a request names, all of them if it names none."""
    left = {tensor.name: tensor for tensor in tensors}
    found = []
    for message in wanted:
        _refuse_shared_memory(f"output {message.name!r:.60}", message.parameters)
        if "classification" in message.parameters:
            raise InvalidRequestError(
                f"wanted output {message.name!r:.60} as numbers, got its parameter 'classification', which "
                "tritonclient calls class_count; leave it out"
            )
        if message.name not in left:  # each once: an answer must not be larger than the policy's
            raise InvalidRequestError(
                f"wanted each of the outputs {_names([tensor.name for tensor in tensors])} at most once, "
                f"got {message.name!r:.60}; see ModelMetadata"
            )
        found.append(left.pop(message.name))
    return tuple(found or tensors)


def _refuse_shared_memory(what: str, parameters: Container[str]) -> None:
    if SHARED_MEMORY in parameters:
        raise InvalidRequestError(
            f"wanted {what} inside the message, got a shared memory region, which this server does not offer; "
            "send and receive the numbers themselves"
        )


_Parameters = Mapping[str, pb.InferParameter]


def _parameter(name: str, parameters: _Parameters, kinds: Sequence[str]) -> bool | int | float | str | None:
    """A parameter of one of the types, None if it is not there."""
    if name not in parameters:
        return None
    kind = parameters[name].WhichOneof("parameter_choice")
    if kind not in kinds:
        raise InvalidRequestError(
            f"wanted the parameter {name!r} as {' or '.join(kinds)}, got {kind or 'nothing'}; change its type"
        )
    value: bool | int | float | str = getattr(parameters[name], kind)
    return value


def _whole(name: str, parameters: _Parameters) -> int:
    """A count; 0 if it is not there."""
    value = _parameter(name, parameters, ("int64_param", "uint64_param"))
    assert value is None or isinstance(value, int)
    if value is not None and value < 0:
        raise InvalidRequestError(f"wanted the parameter {name!r} as a number >= 0, got {value}; leave it out")
    return value or 0


def _seed(parameters: _Parameters, tensor: NDArray[np.uint64] | None, rows: int) -> Seed:
    """The seed for all rows, the seeds per row, or None if there is neither."""
    value = _parameter("seed", parameters, ("int64_param", "uint64_param", "string_param"))
    if tensor is not None and value is not None:
        raise InvalidRequestError("wanted the seeds once, got an input and a parameter; leave one of them out")
    if tensor is not None:
        return tensor.reshape(-1).astype(np.uint64, copy=False)
    if not isinstance(value, str):
        assert value is None or isinstance(value, int)
        return value
    # An answer tells the seeds of several rows in this way, and clients have no larger numbers than int64.
    texts = value.split(",", maxsplit=rows)
    if not all(text.isascii() and text.isdecimal() and len(text) <= SEED_DIGITS for text in texts):
        raise InvalidRequestError(
            f"wanted the parameter 'seed' as a whole number, or {rows} with commas between them, "
            f"got {value!r:.60}; use unsigned 64-bit numbers"
        )
    seeds = [int(text) for text in texts]
    return seeds[0] if len(seeds) == 1 else seeds


def _names(names: Any) -> str:
    return ", ".join(map(repr, names))


def _shape(dims: Sequence[int]) -> str:
    return f"[{', '.join(['B', *map(str, dims)])}]"
