"""Clients that read their streams fast, slowly, or not at all, and what each of them has read."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass, field
from typing import Any

from benchmarks.http_load import Exchange

# A small buffer of the client's system: what it cannot hold stays with the server.
_RECEIVE_BYTES = 4096
# Of a segment. Segments of 64 KiB, as on a loopback interface, let the server's system buffer megabytes.
_SEGMENT_BYTES = 536
# Log-probabilities with each token; they make the stream large.
_LOGPROBS = 20
# Connections that begin in a second.
_OPENED_PER_S = 400


@dataclass(frozen=True)
class Reading:
    """How so many clients read a stream each.

    Attributes:
        host, port: Address of the server.
        adapter: What every stream asks of; None is the base model.
        streams: How many there are; each is of another prompt and another seed.
        new_tokens: Tokens of a stream.
        pause_s: Seconds of rest after each read of some kilobytes; 0 reads as fast as it comes.
        stops: Read the first piece, and then nothing until `held_s` have passed.
        held_s: Seconds after the last connection began until clients that stopped look at their connections again.
    """

    host: str
    port: int
    adapter: str | None
    streams: int
    new_tokens: int = 128
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
    """

    status: int = 0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    complete: bool = False
    error: str | None = None
    received: int = 0


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
        "logprobs": _LOGPROBS,
        "stream": True,
    }


async def _read_all(reading: Reading) -> list[StreamRead]:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    opened = begun + reading.streams / _OPENED_PER_S

    async def one(index: int) -> StreamRead:
        await asyncio.sleep(max(0.0, begun + index / _OPENED_PER_S - loop.time()))
        read = StreamRead()
        done: asyncio.Future[None] = loop.create_future()
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if reading.pause_s or reading.stops:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT_BYTES)
        connection.setblocking(False)
        await loop.sock_connect(connection, (reading.host, reading.port))
        client = _Client(reading, index, read, done, opened + reading.held_s)
        transport, _ = await loop.create_connection(lambda: client, sock=connection)
        await done
        transport.close()
        return read

    return list(await asyncio.gather(*map(one, range(reading.streams))))


class _Client(Exchange):
    """Reads with rests, or stops."""

    def __init__(self, reading: Reading, index: int, read: StreamRead, done: asyncio.Future[None], look: float) -> None:
        super().__init__(reading.host, request_of(reading, index), read, done)
        self._reading, self._read, self._look_at = reading, read, look
        self._stopped = False

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
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

    def on_body(self, body: bytes) -> None:
        self._read.received += len(body)
        super().on_body(body)

    def _keep(self, event: dict[str, Any]) -> None:
        self._read.tokens += event["token_ids"]
        self._read.text += event["text"]

    def _resume(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()
