"""The token check of the gRPC server: a call without a sufficient token is refused before it is read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from rsm_common.errors import RequestError
from rsm_serve.observe.counts import ServerCounts
from rsm_serve.observe.settled import status
from rsm_serve.rpc.status import abort
from rsm_serve.security.access import GRANT, Access


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Checks the token of every call.

    Args:
        access: the rules.
        methods: full names that may be counted; a caller can invent any other name.
        counts: of the server; refusals are counted there.
    """

    def __init__(
        self,
        access: Access,
        methods: frozenset[str],
        counts: ServerCounts,
    ) -> None:
        self._access = access
        self._methods = methods
        self._counts = counts

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """See `grpc.aio.ServerInterceptor`; the handler runs in this context."""
        try:
            GRANT.set(self._access.grant(details.method, details.invocation_metadata))
        except RequestError as error:
            return self._refusal(details.method, error)
        return await continuation(details)

    def _refusal(self, method: str, error: RequestError) -> Any:
        label = method.rpartition("/")[2] if method in self._methods else ""
        self._counts.refused(label, *status(error))

        async def refuse(requests: Any, context: Any) -> None:
            await abort(context, error)

        # A handler of streams answers any kind of call, and before its first message.
        return grpc.stream_stream_rpc_method_handler(refuse)
