"""Responses of unknown length to clients of HTTP/1.0, which know no chunked encoding: the connection's end is theirs.

It is a file of its own because `protocol.py` is full.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

# Such responses have no body, whatever their headers say.
_WITHOUT_BODY = (204, 304)


class UntilClose:
    """Runs an app for one request of HTTP/1.0.

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
