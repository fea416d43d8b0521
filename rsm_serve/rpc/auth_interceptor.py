"""The token check of the gRPC server: a call without a sufficient token is refused before it is read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from rsm_common.errors import RequestError, wire_status
from rsm_serve.observe.observer import REASONS, Observer
from rsm_serve.rpc.status import abort
from rsm_serve.security.access import GRANT, Access


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Checks the token of every call.

    Args:
        access: the rules.
        methods: full names that the observer may count; a caller can invent any other name.
        observer: counts refusals; None: no counts.
    """

    def __init__(
        self,
        access: Access,
        methods: frozenset[str],
        observer: Observer | None,
    ) -> None:
        self._access = access
        self._methods = methods
        self._observer = observer

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """See `grpc.aio.ServerInterceptor`; the handler runs in this context."""
        try:
            GRANT.set(self._access.grant(details.method, details.invocation_metadata))
        except RequestError as error:
            return self._refusal(details.method, error)
        return await continuation(details)

    def _refusal(self, method: str, error: RequestError) -> Any:
        if self._observer is not None:
            label = method.rpartition("/")[2] if method in self._methods else ""
            self._observer.refused(label, wire_status(error)[0], REASONS[type(error)])

        async def refuse(requests: Any, context: Any) -> None:
            await abort(context, error)

        # A handler of streams answers any kind of call, and before its first message.
        return grpc.stream_stream_rpc_method_handler(refuse)
