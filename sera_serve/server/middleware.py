"""ASGI middleware: the request id, the metrics of each request, the body limit, and the last error handler."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sera_serve.errors import Overloaded, TenantOverloaded
from sera_serve.loop_turns import LoopTurns
from sera_serve.server.accounting import Meter, RequestRecord
from sera_serve.server.errors import BodyTooLarge, error_response, forget_frames
from sera_serve.server.loop_watch import LoopWatch, route_of
from sera_serve.server.metrics import ServerMetrics
from sera_serve.server.refusals import new_request_id
from sera_serve.server.request_log import RequestLog
from sera_serve.server.tracing import Tracing

UPLOAD_PATH = "/v1/adapters"
FILES_PATH = "/v1/files"
IMAGE_PATHS = ("/v1/classify", "/v1/embeddings")
UPLOAD_PATHS = (UPLOAD_PATH, FILES_PATH)
"""Paths whose POST takes a form with a file. The body goes to a disk, and has a limit of its own."""
# Bytes for multipart boundaries, part headers and the name field.
_FORM_OVERHEAD = 64 << 10
# All JSON bodies of the requests in progress together hold at most so many bytes, or so many of the longest bodies.
_MAX_HELD = 64 << 20
_MAX_HELD_BODIES = 16
_SHORT_BODY = 64 << 10


class RequestLifecycle:
    """Gives each request an id, counts and logs the request, and responds to errors that no other handler caught."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: ServerMetrics,
        watch: LoopWatch,
        log: RequestLog,
        turns: Callable[[], LoopTurns],
        tracing: Tracing | None = None,
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.watch = watch
        self.log = log
        self.turns = turns
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] == "http":
            await self.watch.request(scope, self._run(scope, receive, send))
        else:
            await self.app(scope, receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A client's own X-Request-Id is not used: a client could forge the log lines of another request.
        request_id = new_request_id()
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        record = state["record"] = RequestRecord()
        body = bytearray()
        spans = None
        if self.tracing is not None:
            spans = self.tracing.begin(scope, request_id)
            state["trace_id"] = spans.trace_id
        # The protocol class knows when the first byte came. Other ASGI servers do not say it.
        state.setdefault("received_at", time.monotonic())
        status = 0
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
                meter: Meter | None = state.get("meter")
                if meter is not None and (headers := meter.headers()):
                    message["headers"] = [*message["headers"], *headers]
            elif spans is not None and not message.get("more_body", False):
                # The request's span ends with the last part of the response.
                spans.describe(record)
            await send(message)

        try:
            await self.turns().short_turn(_sender_of(scope))
            await self.app(scope, self.log.listen(receive, body), send_with_id)
        except Exception as error:
            if status:
                raise
            response = error_response(error, request_id)
            await response(scope, receive, send_with_id)
            forget_frames(error, response.status_code)
        finally:
            seconds = time.perf_counter() - started
            self.metrics.observe_request(scope["method"], route_of(scope), status or 500, seconds)
            if spans is not None:
                spans.end(record)
            self.log.write(scope, record, status or 500, seconds, body)


def _sender_of(scope: Scope) -> bytes | str:
    """Who takes turns with others to begin requests, before the key is looked at: who shows it, or the address."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            key: bytes = value
            return key
    client = scope.get("client")
    return client[0] if client else ""


class _Limit(NamedTuple):
    """The most bytes of a body; the field that holds them, if it is a form's; and what to do beyond, for messages."""

    nbytes: int
    field: str | None
    remedy: str


class BodyLimit:
    """Refuses a body that is longer than the limit of its route, or for which all bodies leave no memory.

    A body whose announced length exceeds the limit is refused before any byte is read. Other bodies are refused when
    the bytes read exceed the limit. Starlette's own middleware would refuse an announced length in plain text.
    Many clients can send their bodies slowly at the same time, so the bytes of all bodies together have a limit too,
    and those of one tenant's keys half of it. A short body is never refused for it.
    """

    def __init__(
        self, app: ASGIApp, max_body: int, max_upload: int, max_file: int, max_image: int | None = None
    ) -> None:
        """Wrap an app.

        Args:
            app: The app.
            max_body: Bytes of a JSON body.
            max_upload: Bytes of an uploaded bundle.
            max_file: Bytes of an uploaded training file.
            max_image: Bytes of an image file, of a base that takes images; its base64 has a third more.
        """
        self.app = app
        self._texts = self._images = _Limit(max_body, None, "send less in one request, or raise max_body_mib")
        if max_image is not None:
            # Its base64, and what stands around it.
            image_body = -(-max_image // 3) * 4 + _FORM_OVERHEAD
            if image_body > max_body:
                remedy = "send fewer or smaller images in one request, or raise max_image_bytes or max_body_mib"
                self._images = _Limit(image_body, None, remedy)
        self._uploads = {
            UPLOAD_PATH: _Limit(max_upload + _FORM_OVERHEAD, "bundle", "raise max_upload_mib"),
            FILES_PATH: _Limit(max_file + _FORM_OVERHEAD, "file", "raise max_training_file_mib"),
        }
        self._max_held = max(_MAX_HELD, _MAX_HELD_BODIES * self._images.nbytes)
        # Bytes by the tenant of the key; None is those without a key.
        self._held: Counter[str | None] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        upload = self._uploads.get(scope["path"]) if scope["method"] == "POST" else None
        limit, field, remedy = upload or (self._images if scope["path"] in IMAGE_PATHS else self._texts)
        too_large = BodyTooLarge(f"the body exceeds {limit} bytes; {remedy}", param=field)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > limit:
            response = error_response(too_large, scope["state"]["request_id"])
            await response(scope, receive, send)
            return
        received = 0
        tenant = scope["state"]["caller"].tenant

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            count = len(message.get("body", b""))
            received += count
            self._held[tenant] += 0 if upload else count
            if received > limit:
                raise too_large
            if not upload and received > _SHORT_BODY:
                if self._held.total() > self._max_held:
                    raise Overloaded("the bodies of too many requests are under way; send the request again later")
                if tenant is not None and self._held[tenant] > self._max_held // 2:
                    raise TenantOverloaded(
                        f"the bodies of too many requests of tenant {tenant!r} are under way; send it again later"
                    )
            return message

        try:
            await self.app(scope, limited, send)
        finally:
            self._held[tenant] -= 0 if upload else received
            if not self._held[tenant]:
                del self._held[tenant]
