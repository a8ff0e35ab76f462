"""Attacks on what reads bytes: HTTP heads, URIs, trailers, pipelines and archives."""

from __future__ import annotations

import asyncio
import itertools

from benchmarks.siege.wire import Outcome, Sender, Target, digits_tar, endless, request_head

# The server answers to its own names alone.
_UNENDED_GET = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"
_ANSWER = b"HTTP/1.1 200 OK"


async def pax_digits(target: Target, size: int, outcome: Outcome) -> None:
    """Upload a tar whose pax header is `size` digits."""
    await Sender(target).publish(outcome, "attack/pax", digits_tar(size))


async def endless_header(target: Target, size: int, outcome: Outcome) -> None:
    """Send one header of `size` bytes that never ends."""
    await Sender(target).send(itertools.chain([_UNENDED_GET + b"X: "], endless(b"a", size)), outcome)


async def endless_uri(target: Target, size: int, outcome: Outcome) -> None:
    """Send a path of `size` bytes that never ends."""
    await Sender(target).send(itertools.chain([b"GET /"], endless(b"a", size)), outcome)


async def endless_trailer(target: Target, size: int, outcome: Outcome) -> None:
    """Send a chunked body, then a trailer of `size` bytes that never ends."""
    head = request_head("POST", "/v1/generate", "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n")
    start = head + b"2\r\n{}\r\n0\r\nX: "
    await Sender(target).send(itertools.chain([start], endless(b"a", size)), outcome)


async def many_headers(target: Target, size: int, outcome: Outcome) -> None:
    """Send `size` bytes of small headers."""
    await Sender(target).send(itertools.chain([_UNENDED_GET], endless(b"a: b\r\n", size)), outcome)


async def pipelined(target: Target, size: int, outcome: Outcome) -> None:
    """Send `size` requests on one connection, read the answers afterwards, and count them."""
    request = _UNENDED_GET + b"\r\n"
    async with Sender(target).connection() as (reader, writer):

        async def send() -> None:
            for piece in endless(request, size * len(request)):
                writer.write(piece)
                await writer.drain()

        async def receive() -> None:
            await asyncio.sleep(2)
            tail = b""
            while data := await reader.read(1 << 20):
                data = tail + data
                outcome.counts["200"] += data.count(_ANSWER)
                # One answer may be in two pieces; no whole one is in so few bytes.
                tail = data[1 - len(_ANSWER) :]
            outcome.counts["closed"] += 1

        try:
            async with asyncio.timeout(target.seconds):
                await asyncio.gather(send(), receive())
        except (ConnectionError, TimeoutError) as error:
            outcome.counts[type(error).__name__] += 1
