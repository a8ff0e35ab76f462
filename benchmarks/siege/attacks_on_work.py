"""Attacks by requests that are well-formed HTTP and much work."""

from __future__ import annotations

import asyncio
from functools import cache

from benchmarks.siege.wire import NO_ANSWER, Outcome, Sender, Target, request_head, together

# Of the 1 MiB that a body may have, less what is around the long field.
LONGEST = (1 << 20) - 64


async def long_prompts(target: Target, size: int, outcome: Outcome) -> None:
    """Send 16 prompts of `size` digits at once."""
    sender = Sender(target)
    body = b'{"prompt":"' + b"1" * min(size, LONGEST) + b'"}'
    await together(16, lambda index: sender.ask(outcome, "POST", "/v1/generate", body))


async def listings(target: Target, size: int, outcome: Outcome) -> None:
    """Ask for `size` pages of the list, read none, then generate with an adapter."""
    sender = Sender(target)

    async def ask(index: int) -> None:
        async with sender.connection() as (_, writer):
            writer.write(request_head("GET", "/v1/adapters?limit=1000", ""))
            await writer.drain()
            await asyncio.sleep(0.3)
        outcome.counts["left"] += 1

    await together(size, ask)
    begun = asyncio.get_running_loop().time()
    body = {"adapter": "siege/other", "prompt": "Once", "max_new_tokens": 1}
    try:
        await sender.ask(outcome, "POST", "/v1/generate", body)
    finally:
        outcome.figures["generate_s"] = round(asyncio.get_running_loop().time() - begun, 2)


async def invalid_tokens(target: Target, size: int, outcome: Outcome) -> None:
    """Four clients send 1 MiB of invalid token ids `size` times each, the next when the last is answered."""
    sender = Sender(target)

    async def client(index: int) -> None:
        for _ in range(size):
            await sender.ask(outcome, "POST", "/v1/generate", _invalid_tokens())

    await together(4, client)


async def deep_nesting(target: Target, size: int, outcome: Outcome) -> None:
    """Send `size` bodies of each kind of deep JSON."""
    depth = LONGEST // 5
    await _bodies(
        target,
        size,
        outcome,
        b"[" * LONGEST,
        b'{"prompt":' + b"[" * LONGEST,
        b'{"a":' * depth,
        b'{"stop":' + b"[" * (LONGEST // 2 - 8) + b"]" * (LONGEST // 2 - 8) + b"}",
    )


async def huge_numbers(target: Target, size: int, outcome: Outcome) -> None:
    """Send `size` bodies of each kind of huge number."""
    await _bodies(
        target,
        size,
        outcome,
        b'{"prompt":"x","max_new_tokens":' + b"9" * LONGEST + b"}",
        b'{"prompt":"x","temperature":0.' + b"1" * LONGEST + b"}",
        b'{"prompt":"x","temperature":1e' + b"9" * LONGEST + b"}",
        b'{"prompt":"x","timeout_s":1e400}',
        b'{"token_ids":[' + b"9" * (LONGEST - 20) + b"]}",
        b'{"token_ids":[' + b"1e9," * (LONGEST // 4 - 8) + b"1]}",
    )


async def _bodies(target: Target, size: int, outcome: Outcome, *bodies: bytes) -> None:
    sender = Sender(target)
    for _ in range(size):
        for body in bodies:
            await sender.ask(outcome, "POST", "/v1/generate", body)


@cache
def _invalid_tokens() -> bytes:
    count = LONGEST // 3 - 8
    return b'{"token_ids":[' + b"-1," * count + b"-1]}"


async def store_locked(target: Target, size: int, outcome: Outcome) -> None:
    """Hold the writers' lock of the store for `size` seconds beside deletes, and generate with `timeout_s` 2."""
    import fcntl

    sender = Sender(target)
    loop = asyncio.get_running_loop()
    with (target.store / "locks" / "writers").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        deletes = [
            asyncio.ensure_future(sender.ask(outcome, "DELETE", f"/v1/adapters/spare/{index:02d}"))
            for index in range(20)
        ]
        await asyncio.sleep(0.5)
        free = loop.call_later(size, fcntl.flock, lock, fcntl.LOCK_UN)
        begun = loop.time()
        body = {"adapter": "siege/other", "prompt": "Once", "max_new_tokens": 1, "timeout_s": 2}
        reply = await sender.ask(outcome, "POST", "/v1/generate", body)
        outcome.figures["generate"] = reply.label if reply else NO_ANSWER
        outcome.figures["generate_s"] = round(loop.time() - begun, 2)
        await asyncio.gather(*deletes)
        free.cancel()
