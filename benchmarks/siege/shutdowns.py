"""The end of a server under load: what each request gets, how long the end takes, and the exit status."""

from __future__ import annotations

import asyncio
import os
import signal

from benchmarks.siege.wire import (
    NO_ANSWER,
    Outcome,
    Reply,
    Sender,
    Target,
    endless,
    multipart_start,
    multipart_type,
    read_reply,
    request_head,
    together,
)


async def in_flight(target: Target, size: int, outcome: Outcome) -> None:
    """Send SIGTERM with `size` generations under way, half of them streams, longer than the grace time."""
    sender = Sender(target)
    asyncio.get_running_loop().call_later(5, os.kill, target.pid, signal.SIGTERM)

    async def ask(index: int) -> None:
        # A token's time apart, and all are sent well before the signal.
        await asyncio.sleep(index * 0.002)
        stream = index % 2 == 0
        body = {"prompt": "Once upon a time", "max_new_tokens": 480, "temperature": 1, "seed": index, "stream": stream}
        one = Outcome()
        reply = await sender.ask(one, "POST", "/v1/generate", body)
        end = next(iter(one.counts)) if reply is None else how_ended(reply)
        outcome.counts[("stream: " if stream else "plain: ") + end] += 1

    await together(size, ask)


async def half_upload(target: Target, size: int, outcome: Outcome) -> None:
    """Send SIGTERM while `size` uploads are half sent."""
    sender = Sender(target)
    head = request_head("POST", "/v1/adapters", f"{multipart_type()}Content-Length: {64 << 20}\r\n")

    async def upload(index: int) -> None:
        label = NO_ANSWER
        try:
            async with sender.connection() as (reader, writer):
                writer.writelines([head, multipart_start("attack/half"), *endless(b"\0", 1 << 20)])
                await writer.drain()
                label = (await read_reply(reader)).label
        except asyncio.IncompleteReadError:
            label = "closed"
        except OSError as error:
            label = type(error).__name__
        finally:
            outcome.counts[label] += 1

    asyncio.get_running_loop().call_later(1, os.kill, target.pid, signal.SIGTERM)
    await together(size, upload)


async def idle_server(target: Target, size: int, outcome: Outcome) -> None:
    """Send SIGTERM when nothing is under way."""
    os.kill(target.pid, signal.SIGTERM)


def how_ended(reply: Reply) -> str:
    """Say how a generation ended: whole, cut, or with which error."""
    if reply.status != 200:
        return reply.label
    last = reply.body.rstrip().rpartition(b"\n\n")[2]
    if last.startswith(b'data: {"error"'):
        return "error event"
    streamed = reply.body.startswith(b"data: ")
    return "whole" if reply.whole and (not streamed or last == b"data: [DONE]") else "cut"
