"""Server-sent events: a generation's deltas as they come."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from sera_serve.errors import EngineUnavailable
from sera_serve.server.disconnect import ClientDisconnected, cancel_on_disconnect
from sera_serve.server.errors import describe
from sera_serve.server.interfaces import TokenStream
from sera_serve.server.metrics import ServerMetrics
from sera_serve.server.schemas import GenerateEvent, GenerateResponse

logger = logging.getLogger("sera_serve.server")
DONE = b"data: [DONE]\n\n"


def encode_event(content: dict[str, Any]) -> bytes:
    """One event; JSON has no line breaks, so it is one `data:` line."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n\n"


class GenerationEvents(Response):
    """The response to a streamed generation.

    The request is admitted when the response is sent, so that a refusal is still an ordinary error with its own
    status. A failure later is an event `{"error": ...}`, the last one. A client that goes away cancels the request.
    """

    media_type = "text/event-stream"

    def __init__(self, admit: Callable[[], Awaitable[TokenStream]], metrics: ServerMetrics) -> None:
        """Prepare.

        Args:
            admit: Puts the request into the engine; called once.
            metrics: Counts the tokens at the end.
        """
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._admit = admit
        self._metrics = metrics
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the generation ends or the client goes away."""
        request_id = scope["state"]["request_id"]
        try:
            await cancel_on_disconnect(receive, self._send_events(send, request_id))
        except ClientDisconnected:
            if not self._started:
                raise

    async def _send_events(self, send: Send, request_id: str) -> None:
        stream = await self._admit()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._started = True
            async for event in self._events(stream, request_id):
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._metrics.observe_waits(stream.waited_s, stream.first_token_s)
            await stream.aclose()

    async def _events(self, stream: TokenStream, request_id: str) -> AsyncIterator[bytes]:
        identity: dict[str, Any] = {"id": stream.id, "adapter": stream.adapter, "version": stream.version}
        try:
            async for delta in stream:
                if delta.text or delta.token_ids:
                    event = GenerateEvent(**identity, text=delta.text, token_ids=delta.token_ids)
                    yield encode_event(event.model_dump(exclude={"usage"}))
            if stream.result is None:
                raise EngineUnavailable("the generation was closed before it finished; send the request again")
        except Exception as error:  # noqa: BLE001 - the status is sent already: it is told and logged, here
            content = describe(error, request_id)[1]
            self._metrics.count_refusal(content["error"]["code"])
            yield encode_event(content)
            return
        usage = GenerateResponse.of(stream.result).usage
        last = GenerateEvent(**identity, text="", token_ids=[], finish_reason=stream.result.finish_reason, usage=usage)
        self._metrics.count_generation(stream.result)
        yield encode_event(last.model_dump())
        yield DONE
