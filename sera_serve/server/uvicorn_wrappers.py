"""What uvicorn gets in place of a connection's own parts: the app, the flow control, and the transport."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

if TYPE_CHECKING:
    from sera_serve.server.protocol import BoundedHttpProtocol

# Such responses have no body, whatever their headers say.
_WITHOUT_BODY = (204, 304)


class UntilClose:
    """Runs an app for one request of HTTP/1.0, whose clients know no chunked encoding.

    uvicorn sends a response without a Content-Length in chunks, whatever the request's version. It closes the
    connection after each response to HTTP/1.0, which is how such a response ends (RFC 9112, 6.3).
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an app. `cycle` must be set before the app is run: uvicorn makes it later."""
        self.app = app
        self.cycle: RequestResponseCycle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request."""
        cycle = self.cycle
        assert cycle is not None
        until_close = False

        async def send_plain(message: Message) -> None:
            nonlocal until_close
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message.get("headers", ())}
                until_close = b"content-length" not in names and message["status"] not in _WITHOUT_BODY
                if until_close:
                    cycle.chunked_encoding = False
            elif until_close:
                # uvicorn compares the bytes with a Content-Length. Here the length is what comes.
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await self.app(scope, receive, send_plain)


class TimedFlow(FlowControl):
    """Counts the seconds for which the server did not read from its client."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self.paused_s = 0.0
        self._paused_at = 0.0

    def pause_reading(self) -> None:
        """Stop reading."""
        if not self.read_paused:
            self._paused_at = time.monotonic()
        super().pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        if self.read_paused:
            self.paused_s += time.monotonic() - self._paused_at
        super().resume_reading()


class Closer:
    """The transport that uvicorn sees: its `close` is the protocol's."""

    def __init__(self, transport: asyncio.Transport, protocol: BoundedHttpProtocol) -> None:
        self.write = transport.write
        self.protocol: BoundedHttpProtocol | None = protocol

    def close(self) -> None:
        """Have the protocol end the connection."""
        if self.protocol is not None:
            self.protocol.close()

    def is_closing(self) -> bool:
        """Whether nothing more may be sent."""
        return self.protocol is None or self.protocol.is_closing()
