"""Clients that read their streams fast, slowly, or not at all, and what each of them has read."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import dataclass, field
from typing import Any, cast

import httptools

# A small buffer of the client's system: what it cannot hold stays with the server.
_RECEIVE_BYTES = 4096
# Of a segment. Segments of 64 KiB, as on a loopback interface, let the server's system buffer megabytes.
_SEGMENT_BYTES = 536


@dataclass(frozen=True)
class Reading:
    """How so many clients read a stream each.

    Attributes:
        host, port: Address of the server.
        adapter: What every stream asks of; None is the base model.
        streams: How many there are; each is of another prompt and another seed.
        new_tokens: Tokens of a stream.
        logprobs: Log-probabilities with each token; they make the stream large.
        opened_per_s: How many connections begin in a second.
        pause_s: Seconds of rest after each read of some kilobytes; 0 reads as fast as it comes.
        stops: Read the first piece, and then nothing until `held_s` have passed.
        held_s: Seconds after the last connection began until clients that stopped look at their connections again.
    """

    host: str
    port: int
    adapter: str | None
    streams: int
    new_tokens: int = 128
    logprobs: int = 20
    opened_per_s: float = 400
    pause_s: float = 0.0
    stops: bool = False
    held_s: float = 0.0


@dataclass(eq=False)
class StreamRead:
    """What one client has read.

    Attributes:
        status: HTTP status; 0 where the connection ended before there was one.
        tokens: Token ids, in the order in which they came.
        text: The text.
        complete: The stream came to its regular end.
        error: Code of a refusal or a failure.
        received: Bytes of the response's body.
        seconds: From the connection's beginning to its end.
    """

    status: int = 0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    complete: bool = False
    error: str | None = None
    received: int = 0
    seconds: float = 0.0


def read_streams(reading: Reading) -> list[StreamRead]:
    """Open the streams, read them to their ends, and return what came. Blocks."""
    return asyncio.run(_read_all(reading))


def request_of(reading: Reading, index: int) -> dict[str, Any]:
    """The body of one stream's request."""
    return {
        "adapter": reading.adapter,
        "prompt": f"Once upon a time, number {index}",
        "max_new_tokens": reading.new_tokens,
        "temperature": 0.8,
        "seed": index,
        "logprobs": reading.logprobs,
        "stream": True,
    }


async def _read_all(reading: Reading) -> list[StreamRead]:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    opened = begun + reading.streams / reading.opened_per_s

    async def one(index: int) -> StreamRead:
        await asyncio.sleep(max(0.0, begun + index / reading.opened_per_s - loop.time()))
        read = StreamRead()
        done: asyncio.Future[None] = loop.create_future()
        started = time.perf_counter()
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if reading.pause_s or reading.stops:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT_BYTES)
        connection.setblocking(False)
        await loop.sock_connect(connection, (reading.host, reading.port))
        client = _Client(reading, request_of(reading, index), read, done, opened + reading.held_s)
        transport, _ = await loop.create_connection(lambda: client, sock=connection)
        await done
        transport.close()
        read.seconds = time.perf_counter() - started
        return read

    return list(await asyncio.gather(*map(one, range(reading.streams))))


class _Client(asyncio.Protocol):
    """One connection, with one request."""

    def __init__(
        self, reading: Reading, body: dict[str, Any], read: StreamRead, done: asyncio.Future[None], look_at: float
    ) -> None:
        self._reading, self._body, self._read, self._done, self._look_at = reading, body, read, done, look_at
        self._parser = httptools.HttpResponseParser(self)
        self._buffer = b""
        self._stopped = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        body = json.dumps(self._body).encode()
        head = (
            f"POST /v1/generate HTTP/1.1\r\nHost: {self._reading.host}\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._transport.write(head.encode() + body)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)
        loop = asyncio.get_running_loop()
        if self._done.done():
            return
        if self._reading.stops and not self._stopped:
            self._stopped = True
            self._transport.pause_reading()
            loop.call_at(self._look_at, self._resume)
        elif self._reading.pause_s:
            self._transport.pause_reading()
            loop.call_later(self._reading.pause_s, self._resume)

    def connection_lost(self, error: Exception | None) -> None:
        self._finish()

    def on_headers_complete(self) -> None:
        self._read.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._read.received += len(body)
        *events, self._buffer = (self._buffer + body).split(b"\n\n")
        for event in events:
            self._take(event.removeprefix(b"data: "))

    def on_message_complete(self) -> None:
        if self._read.status != 200:
            self._read.error = json.loads(self._buffer)["error"]["code"]
        self._finish()

    def _take(self, data: bytes) -> None:
        if data == b"[DONE]":
            self._read.complete = True
            return
        event = json.loads(data)
        if "error" in event:
            self._read.error = event["error"]["code"]
        elif "token_ids" in event:
            self._read.tokens += event["token_ids"]
            self._read.text += event["text"]

    def _resume(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def _finish(self) -> None:
        if not self._done.done():
            self._done.set_result(None)
