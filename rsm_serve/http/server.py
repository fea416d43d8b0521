"""A tiny HTTP/1.1 server on asyncio: GET only, one request per connection, everything bounded.

Scrapers, probes and one status page need no more; docs/design.md has the comparison with libraries. The log
names only the path of a request that failed by the server's fault, because a query may hold an observation.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qsl, unquote, urlsplit

from rsm_common.errors import AddressError
from rsm_serve.addresses import split_address

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 32 * 1024
"""Size of the request line, which may hold an observation, and the headers."""
MAX_FIELDS = 16
"""Fields of a query."""
MAX_CONNECTIONS = 32
READ_S = 5.0
"""Time for the whole head of a request to arrive."""
WRITE_S = 10.0
"""Time for the other side's machine to take the whole answer."""


@dataclass(frozen=True)
class Request:
    """A GET request."""

    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    """By lower-case name."""


@dataclass(frozen=True)
class Response:
    """An answer."""

    content: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[Request], Awaitable[Response]]


class _BadRequestError(Exception):
    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class HttpServer:
    """Answers GET requests in the event loop that calls `listen`.

    Args:
        handler: answers a request; an exception of it becomes status 500 and a line in the log.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def listen(self, address: str) -> str:
        """Bind; returns the address with the port filled in.

        Raises:
            AddressError: not host:port, in use, or not of this machine.
        """
        host, port = split_address(address, unix=False)
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=MAX_HEAD_BYTES)
        except (OSError, UnicodeError) as error:  # UnicodeError: no host name has such a label
            busy = getattr(error, "errno", None) == errno.EADDRINUSE
            reason = "the port is in use" if busy else getattr(error, "strerror", None) or str(error)
            raise AddressError(
                f"wanted to listen on {address} for HTTP, got: {reason}; choose another --http"
            ) from None
        return f"{address.rpartition(':')[0]}:{self._server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        """Stop listening and cut off open connections; may be repeated."""
        if self._server is not None:
            self._server.close()
        for writer in self._open:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._open.add(writer)
        try:
            await _write(writer, await self._response(reader))
        except (asyncio.TimeoutError, asyncio.IncompleteReadError, OSError):
            pass  # the other side is slow or gone, and would not read an answer
        finally:
            self._open.discard(writer)
            writer.transport.abort()  # everything that will be read has been flushed

    async def _response(self, reader: asyncio.StreamReader) -> Response:
        try:
            request = parse_head(await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), READ_S))
        except asyncio.LimitOverrunError:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            return _plain(status, f"at most {MAX_HEAD_BYTES} bytes of request line and headers")
        except _BadRequestError as error:
            return _plain(error.status, str(error))
        try:
            return await self._handler(request)
        except Exception:
            logger.exception("GET %.200s failed", request.path)
            return _plain(HTTPStatus.INTERNAL_SERVER_ERROR, "failed; the server's log says why")


def parse_head(head: bytes) -> Request:
    """Parse a request line and headers, up to and with the empty line."""
    first, *lines = head.decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1.") or not parts[1].startswith("/"):
        raise _BadRequestError(HTTPStatus.BAD_REQUEST, "wanted a request line such as GET /metrics HTTP/1.1")
    if parts[0] != "GET":
        raise _BadRequestError(HTTPStatus.METHOD_NOT_ALLOWED, "only GET is answered here")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    try:
        # The scheme and host keep a path of two slashes from being taken for a host.
        target = urlsplit("http://host" + parts[1])
        query = dict(parse_qsl(target.query, keep_blank_values=True, max_num_fields=MAX_FIELDS))
    except ValueError:
        raise _BadRequestError(HTTPStatus.BAD_REQUEST, f"wanted at most {MAX_FIELDS} fields") from None
    return Request(unquote(target.path), query, headers)


async def _write(writer: asyncio.StreamWriter, response: Response) -> None:
    """Send, and wait until the other side's machine has taken all of it.

    Raises:
        TimeoutError, OSError: it did not.
    """
    headers = {
        "Content-Type": response.content_type,
        "Content-Length": str(len(response.content)),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Connection": "close",
        **({"Allow": "GET"} if response.status is HTTPStatus.METHOD_NOT_ALLOWED else {}),
        **response.headers,
    }
    lines = [f"HTTP/1.1 {response.status.value} {response.status.phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.transport.set_write_buffer_limits(0)  # so that drain waits for the last byte
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + response.content)
    await asyncio.wait_for(writer.drain(), WRITE_S)
    writer.close()
    await asyncio.wait_for(writer.wait_closed(), WRITE_S)


def _plain(status: HTTPStatus, message: str) -> Response:
    return Response(f"{message}\n".encode(), status=status)
