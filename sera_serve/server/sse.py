"""Server-sent events: the response that streams the deltas of a generation."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from sera_serve.engine import GenerationResult, TokenDelta
from sera_serve.errors import EngineUnavailable
from sera_serve.server.deps import TokenStream
from sera_serve.server.disconnect import ClientDisconnected, cancel_on_disconnect
from sera_serve.server.errors import describe
from sera_serve.server.metrics import ServerMetrics

logger = logging.getLogger("sera_serve.server")
DONE = b"data: [DONE]\n\n"


def encode_event(content: dict[str, Any]) -> bytes:
    """Encode one event. The JSON has no line breaks, so the event is one `data:` line."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n\n"


class EventStream(Response):
    """Streams one generation as server-sent events, `data: [DONE]` last.

    The response admits the request when the response is sent. A refusal is therefore an ordinary error with its own
    status. A later failure is the event `{"error": ...}`, and this event is the last. A disconnect of the client
    cancels the request.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        admit: Callable[[], Awaitable[TokenStream]],
        delta_event: Callable[[TokenStream, TokenDelta], dict[str, Any]],
        final_event: Callable[[TokenStream, GenerationResult], dict[str, Any]],
        metrics: ServerMetrics,
    ) -> None:
        """Prepare the response.

        Args:
            admit: Sends the request to the engine. Called once.
            delta_event: Returns the JSON of an event that adds text or tokens.
            final_event: Returns the JSON of the last event before `[DONE]`.
            metrics: Counts the tokens at the end.
        """
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._admit = admit
        self._delta_event = delta_event
        self._final_event = final_event
        self._metrics = metrics
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the generation ends or the client disconnects."""
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
        try:
            async for delta in stream:
                if delta.text or delta.token_ids:
                    yield encode_event(self._delta_event(stream, delta))
            if stream.result is None:
                raise EngineUnavailable("the generation was closed before it finished; send the request again")
        except Exception as error:  # noqa: BLE001 - the status 200 is sent already: the error becomes an event and a log line
            content = describe(error, request_id)[1]
            self._metrics.count_refusal(content["error"]["code"])
            yield encode_event(content)
            return
        self._metrics.count_generation(stream.result)
        yield encode_event(self._final_event(stream, stream.result))
        yield DONE
