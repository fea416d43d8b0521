"""`grpc.health.v1.Health`: balancers and probes ask it whether a policy takes requests.

The servicer of grpcio-health-checking is not used. There a watcher that reads no messages blocks the call that
sets a state, and so reloads and shutdown; and a watcher that leaves takes away the lock that others wait for.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_Context = Any  # grpc has no type stubs
_States = health_pb2.HealthCheckResponse


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """`grpc.health.v1.Health`; belongs to one event loop."""

    def __init__(self) -> None:
        self._ready: dict[str, bool] = {}
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._draining = False

    def set(self, name: str, ready: bool) -> None:
        """Set whether the service or policy of this name takes requests; does not wait for watchers."""
        self._ready[name] = ready
        self._tell(name)

    def drain(self) -> None:
        """Report that no service and no policy takes requests, now and after later calls of `set`."""
        self._draining = True
        for name in self._ready:
            self._tell(name)

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> health_pb2.HealthCheckResponse:
        """The state of a name; NOT_FOUND for a name that was never set."""
        if request.service not in self._ready:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return _States(status=self._state(request.service))

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: _Context) -> None:  # noqa: N802
        """The state of a name now and after each change; a change and its reverse may be left out."""
        name, told = request.service, None
        changed = asyncio.Event()
        self._watchers.setdefault(name, set()).add(changed)
        try:
            while True:
                changed.clear()
                state = self._state(name)
                if state != told:
                    told = state
                    await context.write(_States(status=state))
                await changed.wait()
        finally:
            watchers = self._watchers[name]
            watchers.discard(changed)
            if not watchers:  # callers choose the names, so an empty set must not stay
                del self._watchers[name]

    def _state(self, name: str) -> int:
        ready = self._ready.get(name)
        if ready is None:
            return int(_States.SERVICE_UNKNOWN)
        return int(_States.SERVING if ready and not self._draining else _States.NOT_SERVING)

    def _tell(self, name: str) -> None:
        for changed in self._watchers.get(name, ()):
            changed.set()
