"""What surrounds every request: its id, its metrics, the limit of its body, and the last catch of unexpected errors."""

from __future__ import annotations

import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sera_serve.server.errors import BodyTooLarge, answer
from sera_serve.server.metrics import ServerMetrics

UPLOAD_PATH = "/v1/adapters"
# Multipart boundaries, part headers and the name field.
_FORM_OVERHEAD = 64 << 10


class RequestLifecycle:
    """Gives each request an id, counts it, and answers what nothing else caught."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # A client's own X-Request-Id is not used: it could forge another request's lines in the log.
        request_id = f"req-{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0
        begun = time.perf_counter()

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
            await answer(error, request_id)(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self.metrics.observe_request(scope["method"], route, status or 500, time.perf_counter() - begun)


class BodyLimit:
    """Stops reading a body at its route's limit, and refuses one that announces more before reading any of it.

    Starlette's own middleware answers an announced excess in plain text.
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
        remedy = "raise max_upload_mib" if upload else "send less at once, or raise max_body_mib"
        too_large = BodyTooLarge(f"the body exceeds {limit} bytes; {remedy}", param="bundle" if upload else None)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > limit:
            response = answer(too_large, scope["state"]["request_id"])
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
