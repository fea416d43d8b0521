"""How a call ends with an error: the log for our own faults, a status and one sentence for the caller."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, NoReturn

import grpc
import grpc.aio

from rsm_common.errors import RequestError, retry_after_ms, wire_status
from rsm_serve.wire.codec import ERROR_MARK, RETRY_AFTER

logger = logging.getLogger(__name__)

Context = Any
"""The context of a call; grpc has no type stubs."""


def log_fault(error: BaseException, **fields: object) -> None:
    """Write a fault of the server to the log; the caller alone is told of the caller's own mistake.

    Args:
        error: of any kind.
        fields: for the log record, see `rsm_serve.observe.logs.FIELDS`.
    """
    if wire_status(error)[0] == "INTERNAL":
        known = isinstance(error, RequestError)
        logger.error("request failed: %s", error, exc_info=None if known else error, extra=fields)


async def abort(context: Context, error: Exception, **fields: object) -> NoReturn:
    """End a call with the status of an exception, and with the time to wait where the error has one.

    Args:
        context: of the call.
        error: of any kind.
        fields: for the log record.

    Raises:
        grpc.aio.AbortError: always; it ends the handler.
    """
    log_fault(error, **fields)
    code, message = wire_status(error)
    retry_ms = retry_after_ms(error)
    hint = () if retry_ms is None else ((RETRY_AFTER, str(retry_ms)),)
    try:
        await context.abort(grpc.StatusCode[code], message, (ERROR_MARK, *hint))
    except grpc.aio.AbortError as aborted:
        # The call keeps its exception, and the exception's frames keep the call and the request. Only the
        # garbage collector would end this circle, and until then refused messages of 16 MiB pile up.
        asyncio.get_running_loop().call_soon(_forget, aborted)
        raise
    raise AssertionError("abort raises")


def _forget(error: BaseException) -> None:
    """Drop the references of an exception that is no longer needed."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
