"""Attacks by connections that are opened and left: nothing sent, or half a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

import httptools

from benchmarks.siege.wire import (
    Outcome,
    Sender,
    Target,
    cut,
    endless,
    multipart_start,
    multipart_type,
    read_reply,
    request_head,
)

STILL_OPEN = "still open"
REOPENED_AFTER_S = 2.0
BODY, SENT = 1_000_000, 900_000
UPLOAD, UPLOADED = 64 << 20, 2 << 20
Pieces = Callable[[], Iterable[bytes]]


async def idle(target: Target, size: int, outcome: Outcome) -> None:
    """Open `size` connections and send nothing."""
    await _hold(target, size, outcome, lambda: iter(()))


async def half_headers(target: Target, size: int, outcome: Outcome) -> None:
    """Open `size` connections and send half a request's headers on each."""
    await _hold(target, size, outcome, lambda: iter([b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Half: "]))


async def half_bodies(target: Target, size: int, outcome: Outcome) -> None:
    """Open `size` connections and send most of a JSON body on each."""
    head = request_head("POST", "/v1/generate", f"Content-Type: application/json\r\nContent-Length: {BODY}\r\n")
    await _hold(target, size, outcome, lambda: iter([head, *cut(b'{"prompt":"' + b"a" * SENT)]))


async def half_uploads(target: Target, size: int, outcome: Outcome) -> None:
    """Open `size` connections and send the first 2 MiB of an upload on each."""
    head = request_head("POST", "/v1/adapters", f"{multipart_type()}Content-Length: {UPLOAD}\r\n")

    def pieces() -> Iterator[bytes]:
        yield head + multipart_start("attack/half")
        yield from endless(b"\0", UPLOADED)

    await _hold(target, size, outcome, pieces)


async def unread_answers(target: Target, size: int, outcome: Outcome) -> None:
    """Open `size` connections, ask on each for the list again and again, and read nothing."""
    request = request_head("GET", "/v1/adapters?limit=1000", "")
    await _hold(target, size, outcome, lambda: endless(request, 1 << 16), reads=False)


async def _hold(target: Target, size: int, outcome: Outcome, pieces: Pieces, reads: bool = True) -> None:
    """Hold so many connections until the attack's time is over, open the ended ones again, count how each ended."""
    sender = Sender(target)
    loop = asyncio.get_running_loop()
    end = loop.time() + target.seconds - 1

    async def once() -> str:
        try:
            async with asyncio.timeout_at(end), sender.connection() as (reader, writer):
                for piece in pieces():
                    writer.write(piece)
                    await writer.drain()
                if not reads:
                    await asyncio.sleep(target.seconds)
                return (await read_reply(reader)).label
        except TimeoutError:
            return STILL_OPEN
        except asyncio.IncompleteReadError:
            return "closed"
        except (OSError, httptools.HttpParserError) as error:
            return type(error).__name__

    async def hold(index: int) -> None:
        # Not all in one moment: the backlog of the listening socket is a limit of its own.
        await asyncio.sleep(index * 0.002)
        while loop.time() < end:
            outcome.counts[await once()] += 1
            await asyncio.sleep(min(REOPENED_AFTER_S, max(0.0, end - loop.time())))

    async with asyncio.TaskGroup() as group:
        for index in range(size):
            group.create_task(hold(index))
