"""ASGI middleware: the request id, the metrics of each request, the body limit, and the last error handler."""

from __future__ import annotations

import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sera_serve.server.errors import BodyTooLarge, error_response
from sera_serve.server.metrics import ServerMetrics

UPLOAD_PATH = "/v1/adapters"
# Bytes for multipart boundaries, part headers and the name field.
_FORM_OVERHEAD = 64 << 10


class RequestLifecycle:
    """Gives each request an id, counts the request, and responds to errors that no other handler caught."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # A client's own X-Request-Id is not used: a client could forge the log lines of another request.
        request_id = f"req-{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            if status:
                raise
            await error_response(error, request_id)(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self.metrics.observe_request(scope["method"], route, status or 500, time.perf_counter() - started)


class BodyLimit:
    """Refuses a body that is longer than the limit of its route.

    A body whose announced length exceeds the limit is refused before any byte is read. Other bodies are refused when
    the bytes read exceed the limit. Starlette's own middleware would refuse an announced length in plain text.
    """

    def __init__(self, app: ASGIApp, max_body: int, max_upload: int) -> None:
        """Wrap an app.

        Args:
            app: The app.
            max_body: Bytes of a JSON body.
            max_upload: Bytes of an uploaded bundle.
        """
        self.app = app
        self.max_body = max_body
        self.max_upload = max_upload + _FORM_OVERHEAD

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        upload = scope["method"] == "POST" and scope["path"] == UPLOAD_PATH
        limit = self.max_upload if upload else self.max_body
        remedy = "raise max_upload_mib" if upload else "send less in one request, or raise max_body_mib"
        too_large = BodyTooLarge(f"the body exceeds {limit} bytes; {remedy}", param="bundle" if upload else None)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > limit:
            response = error_response(too_large, scope["state"]["request_id"])
            await response(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise too_large
            return message

        await self.app(scope, limited, send)
