"""Between the wire messages of `rsm.v1` and validated arrays; the same rules on both sides.

Arrays travel as raw little-endian float32 bytes in row-major order.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import (
    InvalidRequestError,
    RequestError,
    error_from_status,
    retry_after_ms,
    wire_status,
)
from rsm_common.policy import ActResult, ActRows, Timing, act_rows, require_finite
from rsm_common.seeds import resolve_seeds
from rsm_common.spec import PolicySpec
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.wire.caller import check_rows

SERVICE: str = pb.DESCRIPTOR.services_by_name["PolicyService"].full_name
"""rsm.v1.PolicyService."""

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
ERROR_MARK = ("rsm-error", "1")
"""Trailing metadata of every status that is ours, so that a client can tell it from gRPC's own."""

RETRY_AFTER = "retry-after-ms"
"""Trailing metadata of RESOURCE_EXHAUSTED: when to try again, whole milliseconds."""

WIRE_FLOAT = np.dtype("<f4")


def decode_request(spec: PolicySpec, request: pb.ActRequest, max_rows: int) -> ActRows:
    """Validate a request.

    Raises:
        InvalidRequestError: a byte count does not fit the rows, there are too many rows, a value is NaN or Inf,
            or a seed is wrong.
    """
    rows = request.rows
    if rows < 1:
        raise InvalidRequestError("wanted rows >= 1, got 0; set it to the number of observations in obs")
    obs = _from_bytes("obs", request.obs, (rows, spec.observation.size))
    check_rows(rows, max_rows)  # before work that grows with the rows
    if request.noise:
        if request.seeds or request.deterministic:
            raise InvalidRequestError("wanted noise or a seed, got both; leave one of them out")
        return act_rows(spec, obs, noise=_from_bytes("noise", request.noise, (rows, *spec.noise_shape)))
    count = len(request.seeds)
    seed = None if count == 0 else request.seeds[0] if count == 1 else np.array(request.seeds[:], np.uint64)
    require_finite("observation", obs)  # shape and dtype are already correct
    return ActRows(obs, resolve_seeds(seed, rows, deterministic=request.deterministic), None, single=False)


def encode_request(
    rows: ActRows,
    *,
    policy: str,
    version: str,
    request_id: int,
    deterministic: bool,
    client_id: str = "",
    priority: int = 0,
) -> pb.ActRequest:
    """Return the message of a validated call. Without seeds and noise in `rows`, the server draws the seeds."""
    request = pb.ActRequest(
        policy=policy,
        version=version,
        request_id=request_id,
        rows=len(rows.obs_BO),
        obs=_to_bytes(rows.obs_BO),
        deterministic=deterministic,
        client_id=client_id,
        priority=priority,
    )
    if rows.noise_BTNA is not None:
        request.noise = _to_bytes(rows.noise_BTNA)
    elif rows.seeds_B is not None and not deterministic:
        request.seeds.extend(rows.seeds_B.tolist())
    return request


def encode_response(request_id: int, result: ActResult, queue_us: float) -> pb.ActResponse:
    """The message for an answer with a batch axis."""
    response = pb.ActResponse(
        request_id=request_id,
        version=result.version,
        rows=len(result.action),
        action=_to_bytes(result.action),
        timing=encode_timing(result.timing, queue_us),
    )
    if result.q is not None:
        response.q = _to_bytes(result.q)
    if result.seed is not None:
        response.seeds.extend(result.seed.tolist())
    if result.adjusted is not None:
        response.adjusted.extend(result.adjusted.tolist())
    return response


def encode_timing(timing: Timing, queue_us: float) -> pb.Timing:
    """Where the time went on the server; the total is the caller's to measure."""
    return pb.Timing(
        queue_us=queue_us,
        batch_us=timing.batch_us,
        compute_us=timing.compute_us,
        batch_rows=timing.batch_rows,
    )


def encode_error(request_id: int, error: BaseException) -> pb.ActResponse:
    """The message for a request that failed inside a stream."""
    code, message = wire_status(error)
    retry_ms = retry_after_ms(error)
    return pb.ActResponse(
        request_id=request_id, error=pb.Error(code=code, message=message, retry_after_ms=retry_ms or 0)
    )


def decode_response(spec: PolicySpec, rows: ActRows, response: pb.ActResponse, *, total_us: float) -> ActResult:
    """The answer in the shape that the caller used.

    Raises:
        RequestError: the answer carries an error (its own type), or is not what the specification says.
    """
    if response.HasField("error"):
        error = response.error
        raise error_from_status(error.code, error.message, error.retry_after_ms or None)
    count = len(rows.obs_BO)
    try:
        # Copies: the caller owns the answer, and bytes are read-only.
        action = _from_bytes("action", response.action, (count, spec.action.size)).copy()
        q = _from_bytes("q", response.q, (count,)).copy() if response.q else None
    except InvalidRequestError as error:
        raise RequestError(f"the server's answer is damaged: {error}") from None
    timing = decode_timing(response.timing, total_us)
    seeds = np.array(response.seeds, np.uint64) if len(response.seeds) == count else None
    adjusted = np.array(response.adjusted, np.int32) if len(response.adjusted) == count else None
    answered = ActRows(rows.obs_BO, seeds, rows.noise_BTNA, rows.single)
    return answered.result(action, q, version=response.version, timing=timing, adjusted_B=adjusted)


def decode_timing(message: pb.Timing, total_us: float) -> Timing:
    """Where the time went on the server, and in all."""
    return Timing(message.queue_us, message.batch_us, message.compute_us, message.batch_rows, total_us)


def _to_bytes(array: NDArray[np.float32]) -> bytes:
    return (array if array.dtype == WIRE_FLOAT else array.astype(WIRE_FLOAT)).tobytes()


def _from_bytes(name: str, content: bytes, shape: tuple[int, ...]) -> NDArray[np.float32]:
    wanted = 4 * math.prod(shape)
    if len(content) != wanted:
        raise InvalidRequestError(
            f"wanted {wanted} bytes of {name} (float32 {list(shape)}), got {len(content)}; "
            "send raw little-endian float32 in row-major order"
        )
    array: NDArray[np.float32] = np.ndarray(shape, WIRE_FLOAT, content)
    return array if WIRE_FLOAT.isnative else array.astype(np.float32)
