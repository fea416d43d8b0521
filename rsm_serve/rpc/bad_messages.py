"""Malformed messages end their call with INVALID_ARGUMENT, and write nothing to the log.

gRPC alone would answer UNKNOWN, and log a traceback as if the server were at fault.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from rsm_common.errors import InvalidRequestError
from rsm_serve.rpc.status import Context, abort
from rsm_serve.rpc.streams import UNREADABLE

_MALFORMED = object()
"""Stands for a message that could not be parsed."""


class GuardedServer:
    """Stands for the server when services are registered, and guards their methods.

    Args:
        server: of `grpc.aio`.
        streams: whether request streams are guarded too. An `OrderedStream` does it itself, at a lower cost.
    """

    def __init__(self, server: Any, *, streams: bool = False) -> None:
        self._server = server
        self._streams = streams

    def add_generic_rpc_handlers(self, handlers: tuple[Any, ...]) -> None:
        """See `grpc.Server`."""
        self._server.add_generic_rpc_handlers(tuple(_Generic(handler, self._guarded) for handler in handlers))

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """See `grpc.Server`."""
        guarded = {name: self._guarded(handler) for name, handler in handlers.items()}
        self._server.add_registered_method_handlers(service, guarded)

    def _guarded(self, handler: Any) -> Any:
        if handler is None or handler.request_deserializer is None:
            return handler
        if handler.request_streaming:
            return self._guarded_stream(handler) if self._streams else handler
        codecs = {
            "request_deserializer": _lenient(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:  # gRPC's Health.Watch, a coroutine that writes by itself
            return grpc.unary_stream_rpc_method_handler(self._guarded_call(handler.unary_stream), **codecs)
        return grpc.unary_unary_rpc_method_handler(self._guarded_call(handler.unary_unary), **codecs)

    def _guarded_call(self, behavior: Callable[[Any, Context], Coroutine[Any, Any, Any]]) -> Any:
        async def call(request: Any, context: Context) -> Any:
            if request is _MALFORMED:
                await abort(context, InvalidRequestError(UNREADABLE))
            return await behavior(request, context)

        return call

    def _guarded_stream(self, handler: Any) -> Any:
        async def call(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            try:
                async for response in handler.stream_stream(requests, context):
                    yield response
            except DecodeError:
                await abort(context, InvalidRequestError(UNREADABLE))

        return grpc.stream_stream_rpc_method_handler(
            call, handler.request_deserializer, handler.response_serializer
        )


class _Generic(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The handlers of a service, guarded; asked by versions of gRPC that do not take registered ones."""

    def __init__(self, inner: Any, guarded: Callable[[Any], Any]) -> None:
        self._inner = inner
        self._guarded = guarded

    def service(self, details: Any) -> Any:
        """See `grpc.GenericRpcHandler`."""
        return self._guarded(self._inner.service(details))


def _lenient(deserializer: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def deserialize(content: bytes) -> Any:
        try:
            return deserializer(content)
        except Exception:
            return _MALFORMED

    return deserialize
