"""Speaks HTTP by hand, as no client library would."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

# A stall of the event loop is a stall of every client.
MOST_LAG_S = 0.25


@dataclass
class RawResponse:
    """One response as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    def refused(self, status: int, code: str) -> dict[str, Any]:
        """Return the error of a refusal by the connection, and check its shape."""
        assert self.status == status, self.body
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["code"] == code
        assert self.headers["x-request-id"].startswith("req-")
        assert self.headers["connection"] == "close"
        assert ("retry-after" in self.headers) == (status == 503)
        return error


class RawClient:
    """One connection. `send` and the readers wait up to `timeout` seconds."""

    def __init__(self, url: str, timeout: float = 10, source: str | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self.socket = socket.create_connection(
            (parts.hostname, parts.port), timeout, source_address=(source, 0) if source else None
        )
        self._buffer = b""

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send bytes. The server may refuse to take them."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def send_forever(self, piece: bytes, most: int) -> int:
        """Send a piece again and again until the server ends the connection or takes no more; returns the bytes."""
        self.socket.settimeout(3)
        sent = 0
        with contextlib.suppress(OSError):
            while sent < most:
                sent += self.socket.send(piece)
        self.socket.settimeout(10)
        return sent

    def response(self) -> RawResponse:
        """Read one response. Raises ConnectionError if the server ends the connection instead."""
        while b"\r\n\r\n" not in self._buffer:
            self._read()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        length = int(headers.get("content-length", "0"))
        while len(self._buffer) < length:
            self._read()
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return RawResponse(int(lines[0].split(" ")[1]), headers, body)

    def ended(self) -> bool:
        """Wait for the server to end the connection; False if it sends more instead."""
        try:
            return not self._buffer and self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def _read(self) -> None:
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionError(f"the server ended the connection after {self._buffer[:200]!r}")
        self._buffer += data


@contextlib.contextmanager
def prompt_loop(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Check that no callback keeps an event loop, which runs in another thread, longer than MOST_LAG_S."""
    longest, last, watching = 0.0, time.monotonic(), True

    def beat() -> None:
        nonlocal longest, last
        now = time.monotonic()
        longest, last = max(longest, now - last), now
        if watching:
            loop.call_later(0.01, beat)

    loop.call_soon_threadsafe(beat)
    try:
        yield
    finally:
        watching = False
    assert longest < MOST_LAG_S, f"the event loop stood still for {longest:.2f} s"
