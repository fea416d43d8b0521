"""What the HTTP port shows: metrics, health, the status page and what it reads.

The page and its data are for whoever sits at this machine: they show specifications and sample policies, and
nobody is asked who they are. So they are served on a loopback address only, under a loopback name (a site of
elsewhere whose name leads here is refused), and not to requests that another site's page makes.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from http import HTTPStatus
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsm_common.errors import InvalidRequestError, NotReadyError, QueueFullError, RequestError, wire_status
from rsm_common.policy import ActRows, act_rows
from rsm_common.seeds import expand_seed
from rsm_serve.addresses import is_loopback, split_address
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.registry import Registry
from rsm_serve.http.server import HttpServer, Request, Response
from rsm_serve.observe.prometheus import LATENCY_BOUNDS_S, ROWS_BOUNDS, Histogram, LaneMetrics, Telemetry

MAX_SAMPLES = 512
"""Actions of one call of /api/sample."""
SAMPLE_CHUNK = 8
"""Rows of a sample that are computed together: a robot's request waits for no more than these."""
SAMPLE_S = 10.0
"""For a whole sample."""

LOADING, WAITING, SERVING, DRAINING = "loading", "waiting", "serving", "draining"

_HTTP_STATUS: Mapping[str, HTTPStatus] = {
    "INVALID_ARGUMENT": HTTPStatus.BAD_REQUEST,
    "NOT_FOUND": HTTPStatus.NOT_FOUND,
    "UNAVAILABLE": HTTPStatus.SERVICE_UNAVAILABLE,
    "RESOURCE_EXHAUSTED": HTTPStatus.TOO_MANY_REQUESTS,
    "DEADLINE_EXCEEDED": HTTPStatus.GATEWAY_TIMEOUT,
}


class Monitor:
    """The telemetry of a server and its HTTP port; lives in the server's event loop.

    Until `serving` is called, everything is loading.
    """

    def __init__(self) -> None:
        self.telemetry = Telemetry()
        self.address = ""
        """Where it listens, the port filled in; empty before `open`."""
        self.state = LOADING
        self._registry = Registry([])
        self._addresses: tuple[str, ...] = ()
        self._sampling = asyncio.Lock()
        self._http = HttpServer(self.answer)
        self._page_allowed = False

    async def open(self, address: str) -> None:
        """Listen; only metrics and health are served where `address` is not a loopback one.

        Raises:
            AddressError: in use, or not an address.
        """
        self._page_allowed = is_loopback(split_address(address)[0])
        self.address = await self._http.listen(address)

    def serving(self, registry: Registry, addresses: Sequence[str]) -> None:
        """The policies are loaded and gRPC listens on `addresses`."""
        self.state, self._registry, self._addresses = SERVING, registry, tuple(addresses)

    def draining(self) -> None:
        """New requests are refused."""
        self.state = DRAINING

    def close(self) -> None:
        """Stop listening; may be repeated."""
        self._http.close()

    async def answer(self, request: Request) -> Response:
        """Answer a GET request."""
        path = request.path
        if path == "/metrics":
            content, content_type = self.telemetry.render(request.headers.get("accept", ""))
            return Response(content, content_type)
        if path == "/healthz":
            return self._health(known=True)
        if path.startswith("/healthz/"):
            name = path.removeprefix("/healthz/")
            return self._health(known=self.state == LOADING or name in self._registry.names)
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        if path == "/":
            return self._page
        try:
            return await self._api(path, request.query)
        except RequestError as error:
            code, message = wire_status(error)
            return _json({"error": message}, _HTTP_STATUS.get(code, HTTPStatus.INTERNAL_SERVER_ERROR))

    @property
    def _state(self) -> str:
        """As `state`, or that there is no policy."""
        return WAITING if self.state == SERVING and not self._registry.names else self.state

    def _health(self, *, known: bool) -> Response:
        if not known:
            return Response(b"unknown policy\n", status=HTTPStatus.NOT_FOUND)
        state = self._state
        status = HTTPStatus.OK if state == SERVING else HTTPStatus.SERVICE_UNAVAILABLE
        return Response(f"{state}\n".encode(), status=status)

    def _refusal(self, request: Request) -> Response | None:
        """Of whatever is not for everybody; see the module's docstring."""
        if not self._page_allowed:
            return Response(
                b"only /metrics and /healthz are served here; the status page needs a loopback --http\n",
                status=HTTPStatus.NOT_FOUND,
            )
        host = request.headers.get("host", "")
        if not is_loopback(host.rpartition(":")[0] or host):
            return Response(
                b"wanted localhost or a loopback number as the host's name\n", status=HTTPStatus.FORBIDDEN
            )
        foreign = request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if foreign and request.path != "/":
            return Response(b"not for the pages of other sites\n", status=HTTPStatus.FORBIDDEN)
        return None

    async def _api(self, path: str, query: Mapping[str, str]) -> Response:
        if path == "/api/status":
            return _json(self._status())
        if path == "/api/spec":
            return Response(self._lane(query).spec_json.encode(), "application/json")
        if path == "/api/sample":
            return _json(await self._sample(query))
        return Response(b"wanted /, /metrics, /healthz or /api/status\n", status=HTTPStatus.NOT_FOUND)

    def _lane(self, query: Mapping[str, str]) -> Lane:
        if self.state == LOADING:
            raise NotReadyError("the policies are being loaded; try again in a moment")
        name, _, version = query.get("policy", "").partition(":")
        return self._registry.find(name, version, fixed=True)

    def _status(self) -> dict[str, Any]:
        metrics = {(lane.policy, lane.version): lane for lane in self.telemetry.lanes()}
        return {
            "state": self._state,
            "toolkit": self.telemetry.toolkit,
            "uptime_s": round(self.telemetry.uptime_s, 3),
            "addresses": self._addresses,
            "streams": self.telemetry.open_streams,
            "latency_bounds_s": LATENCY_BOUNDS_S,
            "rows_bounds": ROWS_BOUNDS,
            "loads": [
                {"policy": policy, "result": result, "count": count}
                for (policy, result), count in self.telemetry.loads.items()
            ],
            "refused": _counts(self.telemetry.refusals),
            "policies": [
                self._lane_status(lane, metrics.get((lane.spec.name, lane.spec.version)))
                for lane in self._registry.lanes
            ],
        }

    def _lane_status(self, lane: Lane, metrics: LaneMetrics | None) -> dict[str, Any]:
        status: dict[str, Any] = {
            "name": lane.spec.name,
            "version": lane.spec.version,
            "default": self._registry.current_lane(lane.spec.name) is lane,
            "state": self.state,
            "runtime": lane.runtime,
            "max_batch_size": lane.limits.max_batch_size,
            "probe_rows": len(lane.probe_obs),
            "queued_rows": lane.batcher.queued_rows,
        }
        if metrics is not None:
            status |= {
                "requests": _counts(metrics.requests),
                "rows": metrics.rows,
                "failed_executions": metrics.failed_executions,
                "unsound": metrics.unsound,
                "request_s": _histogram(metrics.request_s),
                "queue_s": _histogram(metrics.queue_s),
                "compute_s": _histogram(metrics.compute_s),
                "batch_rows": _histogram(metrics.batch_rows),
            }
        return status

    async def _sample(self, query: Mapping[str, str]) -> dict[str, Any]:
        """Actions for one observation, with as many seeds."""
        lane = self._lane(query)
        obs_O = parse_observation(query.get("obs", "zeros"), lane)
        count = _whole_number(query, "n", 256, 1, MAX_SAMPLES)
        seed = _whole_number(query, "seed", 0, 0, 2**64 - 1)
        if self._sampling.locked():
            raise QueueFullError("wanted one sample at a time, and one is being drawn; try again in a moment")
        async with self._sampling:
            try:
                action_BA, q_B = await asyncio.wait_for(_draw(lane, obs_O, expand_seed(seed, count)), SAMPLE_S)
            except asyncio.TimeoutError:
                raise NotReadyError(
                    f"wanted {count} actions within {SAMPLE_S:g} s, got fewer; ask for fewer, or later"
                ) from None
        return {
            "policy": lane.spec.name,
            "version": lane.spec.version,
            "seed": str(seed),  # 64 bits are more than a number holds in JavaScript
            "obs": _rounded(obs_O),
            "action": _rounded(action_BA),
            "q": None if q_B is None else _rounded(q_B),
        }

    @cached_property
    def _page(self) -> Response:
        """The status page, whose policy lets run its own script and style and nothing else."""
        text = resources.files("rsm_serve.http").joinpath("status.html").read_text(encoding="utf-8")
        sources = {
            tag: " ".join(_digest(body) for body in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL))
            for tag in ("script", "style")
        }
        policy = (
            f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; img-src data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
        return Response(text.encode(), "text/html; charset=utf-8", headers=headers)


async def _draw(
    lane: Lane, obs_O: NDArray[np.float32], seeds_B: NDArray[np.uint64]
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """(action [B, A], q [B]), through the queue that robots use, a few rows at a time."""
    step = min(SAMPLE_CHUNK, lane.limits.max_batch_size)
    actions, values = [], []
    for start in range(0, len(seeds_B), step):
        seeds = seeds_B[start : start + step]
        rows = ActRows(np.repeat(obs_O[None], len(seeds), axis=0), seeds, None, single=False)
        result = (await lane.submit(rows, SAMPLE_S)).answer
        actions.append(result.action)
        if result.q is not None:
            values.append(result.q)
    return np.concatenate(actions), np.concatenate(values) if values else None


def parse_observation(text: str, lane: Lane) -> NDArray[np.float32]:
    """[O] of "zeros", "probe:K" (K from 0) or numbers apart by commas or blanks.

    Raises:
        InvalidRequestError: none of these, or not as many as the policy takes.
    """
    text = text.strip()
    if text in ("", "zeros"):
        return np.zeros(lane.spec.observation.size, np.float32)
    if text.startswith("probe:"):
        row = text.removeprefix("probe:")
        if not (row.isascii() and row.isdecimal() and len(row) < 9 and int(row) < len(lane.probe_obs)):
            raise InvalidRequestError(
                f"wanted probe:K with K below {len(lane.probe_obs)}, got another one; the bundle holds no more"
            )
        return _checked(lane, lane.probe_obs[int(row)])
    try:
        numbers = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise InvalidRequestError(
            "wanted numbers with commas between them, zeros, or probe:0, got something else"
        ) from None
    return _checked(lane, numbers)


def _checked(lane: Lane, obs: ArrayLike) -> NDArray[np.float32]:
    obs_O: NDArray[np.float32] = act_rows(lane.spec, obs, seed=0).obs_BO[0]
    return obs_O


def _whole_number(query: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = query.get(name) or str(default)
    if not (text.isascii() and text.isdecimal() and len(text) <= 20 and low <= int(text) <= high):
        raise InvalidRequestError(f"wanted {name} as a whole number from {low} to {high}, got {text!r:.40}")
    return int(text)


def _rounded(array: NDArray[np.float32]) -> list[Any]:
    """Finite numbers with the digits that the largest of them has as a float32."""
    digits = 7 - math.ceil(math.log10(max(1.0, float(np.abs(array).max(initial=1.0)))))
    numbers: list[Any] = array.astype(np.float64).round(digits).tolist()
    return numbers


def _counts(counts: Mapping[tuple[str, str, str], int]) -> list[dict[str, Any]]:
    return [
        {"method": method, "code": code, "reason": reason, "count": count}
        for (method, code, reason), count in counts.items()
    ]


def _histogram(histogram: Histogram) -> dict[str, Any]:
    return {"counts": histogram.counts, "sum": histogram.total}


def _digest(content: str) -> str:
    """What a content security policy calls an inline script or style by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _json(data: object, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(json.dumps(data, allow_nan=False).encode(), "application/json", status)
