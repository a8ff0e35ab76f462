"""How long one callback of an event loop keeps the loop from all others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass
class LoopLag:
    """The most seconds of processor time that the loop's thread spent between two turns of the loop.

    Processor time, because a test machine may give the thread's core to others.
    """

    seconds: float = 0.0


@asynccontextmanager
async def watched_loop() -> AsyncIterator[LoopLag]:
    """Measure the running event loop while the block runs."""
    lag = LoopLag()
    watcher = asyncio.ensure_future(_watch(lag))
    await asyncio.sleep(0)
    try:
        yield lag
        # What came last is measured too.
        await asyncio.sleep(0.01)
    finally:
        watcher.cancel()


async def _watch(lag: LoopLag) -> None:
    while True:
        before = time.thread_time()
        await asyncio.sleep(0.001)
        lag.seconds = max(lag.seconds, time.thread_time() - before)
