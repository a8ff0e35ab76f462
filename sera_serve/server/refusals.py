"""Refusals of the connection itself: errors that a client gets before any route sees its request."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from sera_serve.random_bytes import random_hex
from sera_serve.server.errors import error_content

logger = logging.getLogger("sera_serve.server")
_LOG_SECONDS = 1.0


class Refusal(Exception):
    """A request, or a connection, that the server does not serve. The connection is closed after the response."""

    def __init__(self, status: int, code: str, message: str) -> None:
        """Describe a refusal.

        Args:
            status: HTTP status.
            code: Stable identifier, one of docs/http.md.
            message: What is wrong, and the remedy.
        """
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message

    def response(self, request_id: str, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """Return the bytes of the whole response. `headers` are the server's own, such as the date."""
        body = json.dumps(error_content(self.status, self.message, self.code), ensure_ascii=False).encode()
        own = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", request_id.encode()),
            (b"connection", b"close"),
        ]
        if self.status == 503:
            own.append((b"retry-after", b"1"))
        lines = [name + b": " + value + b"\r\n" for name, value in (*headers, *own)]
        return b"".join([STATUS_LINE[self.status], *lines, b"\r\n", body])


class RefusalLog:
    """Counts refusals, and logs them: at most one line a second for each code, whatever clients send."""

    def __init__(self, count: Callable[[str], None]) -> None:
        """Count each refusal with `count`, by its code."""
        self._count = count
        self._logged_at: dict[str, float] = {}
        self._unlogged: dict[str, int] = {}

    def note(self, refusal: Refusal, request_id: str, client: str) -> None:
        """Count and log one refusal."""
        code, now = refusal.code, time.monotonic()
        self._count(code)
        if now - self._logged_at.get(code, -_LOG_SECONDS) < _LOG_SECONDS:
            self._unlogged[code] = self._unlogged.get(code, 0) + 1
            return
        self._logged_at[code] = now
        more = self._unlogged.pop(code, 0)
        logger.warning(
            "request %s from %s was refused: %d %s: %s%s",
            request_id,
            client,
            refusal.status,
            code,
            refusal.message,
            f" ({more} more since the last such line)" if more else "",
        )


def new_request_id() -> str:
    """Return a name for a request."""
    return f"req-{random_hex(8)}"


def bad_request(message: str) -> Refusal:
    """The request breaks a rule of HTTP."""
    return Refusal(400, "bad_request", message)


def malformed(error: httptools.HttpParserError) -> Refusal:
    """The parser cannot read the request."""
    # What a callback of the parser raised has no reason that a client could use.
    reason = "" if isinstance(error, httptools.HttpParserCallbackError) else f": {error}"
    return bad_request(f"the request is not valid HTTP/1.1{reason}")


def trailers() -> Refusal:
    """Headers follow a chunked body."""
    return bad_request("headers after a chunked body are not supported; send them before it")


def late(message: str) -> Refusal:
    """The client sends too slowly."""
    return Refusal(408, "request_timeout", f"{message}; send the request faster, or in smaller parts")


def uri_too_long(most: int) -> Refusal:
    """The URI has more than `most` bytes."""
    return Refusal(414, "uri_too_long", f"the URI exceeds {most} bytes; send long values in a body")


def too_many_headers(most: int) -> Refusal:
    """There are more than `most` headers."""
    return Refusal(431, "headers_too_large", f"the request has more than {most} headers; send fewer")


def headers_too_large(most: int) -> Refusal:
    """Line and headers have more than `most` bytes."""
    return Refusal(
        431, "headers_too_large", f"line and headers exceed {most} bytes; send less, or raise max_header_kib"
    )


def too_many_connections(reason: str) -> Refusal:
    """There are as many connections as there may be."""
    return Refusal(503, "too_many_connections", reason)


def too_many_pipelined(most: int) -> Refusal:
    """More than `most` requests wait behind another on one connection."""
    return Refusal(
        503,
        "too_many_pipelined",
        f"more than {most} requests wait behind another on this connection; wait for responses before sending more",
    )


def stopping() -> Refusal:
    """The server stops before the request can be answered."""
    return Refusal(503, "engine_unavailable", "the server is stopping; send the request again when it is back")
