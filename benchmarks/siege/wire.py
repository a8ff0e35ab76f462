"""What attackers send with: connections from chosen addresses, raw bytes, and a count of what came back."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import tarfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httptools

PIECE = 256 << 10
NO_ANSWER = "no answer"
_BOUNDARY = "siege"


@dataclass(frozen=True)
class Target:
    """What an attacker knows of a server.

    Attributes:
        pid: For attacks that are signals.
        store: Folder of the store; for attacks that are an operator's mishap.
        bundles: Folder of the files to upload.
        sources: Loopback addresses that connections come from, in turn.
        seconds: How long the attack may last.
    """

    host: str
    port: int
    pid: int
    store: Path
    bundles: Path
    sources: tuple[str, ...]
    seconds: float


@dataclass
class Outcome:
    """What the attacker got: how many of each answer, and figures of the attack's own."""

    counts: Counter[str] = field(default_factory=Counter)
    figures: dict[str, Any] = field(default_factory=dict)


Attack = Callable[[Target, int, Outcome], Awaitable[None]]


@dataclass(frozen=True)
class Reply:
    """One response. `code` is that of an error body, or `plain text` where the body of an error is no JSON."""

    status: int
    code: str
    body: bytes
    whole: bool

    @property
    def label(self) -> str:
        """Status and code, to be counted."""
        return f"{self.status} {self.code}".strip() + ("" if self.whole else ", cut")


class Sender:
    """Opens connections to one target, from its addresses in turn."""

    def __init__(self, target: Target) -> None:
        """Prepare."""
        self._target = target
        self._sources: Iterator[str] = itertools.cycle(target.sources)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Open a connection; it is closed hard at the end, whatever is still unsent or unread."""
        reader, writer = await asyncio.open_connection(
            self._target.host, self._target.port, local_addr=(next(self._sources), 0)
        )
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def send(self, pieces: Iterable[bytes], outcome: Outcome) -> Reply | None:
        """Send a request on a connection of its own until it is answered, and count what came.

        Returns:
            The response, or None where the connection ended without one.
        """
        label = NO_ANSWER
        try:
            async with self.connection() as (reader, writer):
                answer = asyncio.ensure_future(read_reply(reader))
                try:
                    with contextlib.suppress(ConnectionError):
                        for piece in pieces:
                            if answer.done():
                                break
                            writer.write(piece)
                            await writer.drain()
                    reply = await answer
                finally:
                    answer.cancel()
            label = reply.label
            return reply
        except (OSError, asyncio.IncompleteReadError, httptools.HttpParserError) as error:
            label = "closed" if isinstance(error, asyncio.IncompleteReadError) else type(error).__name__
            # Whoever tries again at once must not spin.
            await asyncio.sleep(0.05)
            return None
        finally:
            outcome.counts[label] += 1

    async def ask(self, outcome: Outcome, method: str, path: str, body: Any = None, headers: str = "") -> Reply | None:
        """Send a well-formed request with a JSON body, or with ready bytes and their `headers`."""
        content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "Content-Type: application/json\r\n" if content and "Content-Type" not in headers else ""
        head = request_head(method, path, f"{kind}{headers}Connection: close\r\nContent-Length: {len(content)}\r\n")
        return await self.send([head, *cut(content)], outcome)

    async def publish(self, outcome: Outcome, name: str, bundle: bytes, headers: str = "") -> Reply | None:
        """Upload a bundle."""
        form = multipart(name, bundle)
        return await self.ask(outcome, "POST", "/v1/adapters", form, f"{multipart_type()}{headers}")


def request_head(method: str, path: str, headers: str) -> bytes:
    """A request's line and headers."""
    # An own Host among the headers replaces the right one.
    host = "" if "Host:" in headers else "Host: 127.0.0.1\r\n"
    return f"{method} {path} HTTP/1.1\r\n{host}{headers}\r\n".encode()


def cut(data: bytes) -> Iterator[bytes]:
    """Pieces of some bytes."""
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]


def endless(filler: bytes, size: int) -> Iterator[bytes]:
    """About `size` bytes of repetitions, in pieces."""
    piece = filler * (PIECE // len(filler))
    for _ in range(size // len(piece) + 1):
        yield piece


class _Parsed:
    """Collects one response for httptools' parser."""

    def __init__(self) -> None:
        self.body = b""
        self.begun = self.whole = False

    def on_headers_complete(self) -> None:
        self.begun = True

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.whole = True


async def read_reply(reader: asyncio.StreamReader) -> Reply:
    """Read one response; it is not whole where the connection ended in the middle of its body.

    Raises:
        asyncio.IncompleteReadError, ConnectionError: The connection ended before.
        httptools.HttpParserError: It is no response.
    """
    parsed = _Parsed()
    parser = httptools.HttpResponseParser(parsed)
    while not parsed.whole:
        try:
            data = await reader.read(PIECE)
        except ConnectionError:
            if not parsed.begun:
                raise
            data = b""
        if not data:
            break
        parser.feed_data(data)
    if not parsed.begun:
        raise asyncio.IncompleteReadError(b"", None)
    status = parser.get_status_code()
    code = ""
    if status >= 400:
        try:
            code = str(json.loads(parsed.body)["error"]["code"])
        except (ValueError, KeyError, TypeError):
            code = "plain text"
    return Reply(status, code, parsed.body, parsed.whole)


def multipart_type(parameters: str = "") -> str:
    """The header of a form."""
    return f"Content-Type: multipart/form-data; boundary={_BOUNDARY}{parameters}\r\n"


def multipart(name: str, bundle: bytes) -> bytes:
    """The form of an upload."""
    return multipart_start(name) + bundle + f"\r\n--{_BOUNDARY}--\r\n".encode()


def multipart_start(name: str) -> bytes:
    """The form of an upload up to the bundle's first byte."""
    return (
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="name"\r\n\r\n{name}\r\n'
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="bundle"; filename="b"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    ).encode()


@cache
def digits_tar(digits: int) -> bytes:
    """A tar whose first member is a pax header of nothing but so many digits."""
    info = tarfile.TarInfo("p")
    info.type, info.size = tarfile.XHDTYPE, digits
    archive = io.BytesIO()
    archive.write(info.tobuf(tarfile.USTAR_FORMAT))
    archive.write(b"1" * digits + b"\0" * (-digits % tarfile.BLOCKSIZE))
    return archive.getvalue()


async def together(count: int, work: Callable[[int], Coroutine[Any, Any, object]]) -> None:
    """Run so many at once; the failure of one ends all."""
    async with asyncio.TaskGroup() as group:
        for index in range(count):
            group.create_task(work(index))
