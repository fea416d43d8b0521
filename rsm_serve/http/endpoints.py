"""The paths of the HTTP port: metrics, health, the status page and its data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus

from rsm_common.errors import NotReadyError, RequestError, wire_status
from rsm_serve.addresses import is_loopback, split_address
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.registry import Registry
from rsm_serve.http.page import page, refusal
from rsm_serve.http.sampling import Sampler
from rsm_serve.http.server import HttpServer, Request, Response
from rsm_serve.http.status_data import status_data
from rsm_serve.observe.counts import ServerCounts
from rsm_serve.observe.prometheus import Exposition

LOADING, WAITING, SERVING, DRAINING = "loading", "waiting", "serving", "draining"

_HTTP_STATUS: Mapping[str, HTTPStatus] = {
    "INVALID_ARGUMENT": HTTPStatus.BAD_REQUEST,
    "NOT_FOUND": HTTPStatus.NOT_FOUND,
    "UNAVAILABLE": HTTPStatus.SERVICE_UNAVAILABLE,
    "RESOURCE_EXHAUSTED": HTTPStatus.TOO_MANY_REQUESTS,
    "DEADLINE_EXCEEDED": HTTPStatus.GATEWAY_TIMEOUT,
}


class Monitor:
    """The counts of a server and its HTTP port; lives in the server's event loop.

    Until `serving` is called, everything is loading.
    """

    def __init__(self) -> None:
        self.counts = ServerCounts()
        """Of the server that this shows."""
        self._exposition = Exposition(self.counts)
        self.address = ""
        """The address that it listens on, the port filled in; empty before `open`."""
        self.state = LOADING
        self._registry = Registry([])
        self._addresses: tuple[str, ...] = ()
        self._sampler = Sampler()
        self._http = HttpServer(self.answer)
        self._on_loopback = False

    async def open(self, address: str) -> None:
        """Listen. Only metrics and health are served where `address` is not a loopback one.

        Raises:
            AddressError: in use, or not an address.
        """
        self._on_loopback = is_loopback(split_address(address, unix=False)[0])
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
            content, content_type = self._exposition.render(request.headers.get("accept", ""))
            return Response(content, content_type)
        if path == "/healthz":
            return self._health(known=True)
        if path.startswith("/healthz/"):
            name = path.removeprefix("/healthz/")
            return self._health(known=self.state == LOADING or name in self._registry.names)
        refused = refusal(request, on_loopback=self._on_loopback)
        if refused is not None:
            return refused
        if path == "/":
            return page()
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

    async def _api(self, path: str, query: Mapping[str, str]) -> Response:
        if path == "/api/status":
            return _json(status_data(self._state, self._addresses, self._registry, self.counts))
        if path == "/api/spec":
            return Response(self._lane(query).spec_json.encode(), "application/json")
        if path == "/api/sample":
            return _json(await self._sampler.sample(self._lane(query), query))
        return Response(b"wanted /, /metrics, /healthz or /api/status\n", status=HTTPStatus.NOT_FOUND)

    def _lane(self, query: Mapping[str, str]) -> Lane:
        if self.state == LOADING:
            raise NotReadyError("the policies are being loaded; try again in a moment")
        name, _, version = query.get("policy", "").partition(":")
        return self._registry.find(name, version, fixed=True)


def _json(data: object, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(json.dumps(data, allow_nan=False).encode(), "application/json", status)
