"""Between the wire messages of `rsm.v1` and validated arrays; the same rules on both sides.

Arrays travel as raw little-endian float32 bytes in row-major order.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rsm_serve.errors import (
    InvalidRequestError,
    RequestError,
    error_from_status,
    retry_after_ms,
    wire_status,
)
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.policy import ActResult, ActRows, PolicySpec, Timing, act_rows
from rsm_serve.scheduling import check_rows

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
ERROR_MARK = ("rsm-error", "1")
"""Trailing metadata of every status that is ours, so that a client can tell it from gRPC's own."""

RETRY_AFTER = "retry-after-ms"
"""Trailing metadata of RESOURCE_EXHAUSTED: when to try again, whole milliseconds."""

WIRE_FLOAT = np.dtype("<f4")


def decode_request(spec: PolicySpec, request: pb.ActRequest, max_rows: int) -> ActRows:
    """Validate a request.

    Raises:
        InvalidRequestError: the byte counts are not those of the rows, too many rows, NaN or Inf, or wrong
            seeds.
    """
    rows = request.rows
    if rows < 1:
        raise InvalidRequestError("wanted rows >= 1, got 0; set it to the number of observations in obs")
    obs = _from_bytes("obs", request.obs, (rows, spec.observation.size))
    check_rows(rows, max_rows)  # before anything is done with as many
    if request.noise:
        if request.seeds or request.deterministic:
            raise InvalidRequestError("wanted noise or a seed, got both; leave one of them out")
        return act_rows(spec, obs, noise=_from_bytes("noise", request.noise, (rows, *spec.noise_shape)))
    count = len(request.seeds)
    seed = None if count == 0 else request.seeds[0] if count == 1 else np.array(request.seeds[:], np.uint64)
    return act_rows(spec, obs, seed=seed, deterministic=request.deterministic)


def encode_request(
    rows: ActRows,
    *,
    policy: str,
    version: str,
    request_id: int,
    draw: bool,
    deterministic: bool,
    client_id: str = "",
    priority: int = 0,
) -> pb.ActRequest:
    """The message for a validated call; `draw` leaves the seeds to the server."""
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
    elif not (draw or deterministic):
        assert rows.seeds_B is not None
        request.seeds.extend(rows.seeds_B.tolist())
    return request


def encode_response(request_id: int, result: ActResult, queue_us: float) -> pb.ActResponse:
    """The message for an answer with a batch axis."""
    timing = result.timing
    response = pb.ActResponse(
        request_id=request_id,
        version=result.version,
        rows=len(result.action),
        action=_to_bytes(result.action),
        timing=pb.Timing(
            queue_us=queue_us,
            batch_us=timing.batch_us,
            compute_us=timing.compute_us,
            batch_rows=timing.batch_rows,
        ),
    )
    if result.q is not None:
        response.q = _to_bytes(result.q)
    if result.seed is not None:
        response.seeds.extend(result.seed.tolist())
    return response


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
    seeds = np.array(response.seeds[:], np.uint64) if len(response.seeds) == count else None
    timing = Timing(
        queue_us=response.timing.queue_us,
        batch_us=response.timing.batch_us,
        compute_us=response.timing.compute_us,
        batch_rows=response.timing.batch_rows,
        total_us=total_us,
    )
    answered = ActRows(rows.obs_BO, seeds, rows.noise_BTNA, rows.single)
    return answered.result(action, q, version=response.version, timing=timing)


def _to_bytes(array: NDArray[np.float32]) -> bytes:
    return array.astype(WIRE_FLOAT, copy=False).tobytes()


def _from_bytes(name: str, content: bytes, shape: tuple[int, ...]) -> NDArray[np.float32]:
    wanted = WIRE_FLOAT.itemsize * math.prod(shape)
    if len(content) != wanted:
        raise InvalidRequestError(
            f"wanted {wanted} bytes of {name} (float32 {list(shape)}), got {len(content)}; "
            "send raw little-endian float32 in row-major order"
        )
    return np.ndarray(shape, WIRE_FLOAT, content).astype(np.float32, copy=False)
