"""When the heap is trimmed: after many bytes were held, and only then."""

from __future__ import annotations

import asyncio

import pytest

from sera_serve.server import freed_memory
from sera_serve.server.freed_memory import FreedMemory
from support.engine import until

MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed_memory, "_DELAY_S", 0.0)


def test_many_bytes_that_are_released_are_trimmed_once() -> None:
    async def main() -> None:
        trims: list[int] = []
        memory = FreedMemory(lambda: trims.append(memory.held))
        for _ in range(60):
            memory.hold(MEBIBYTE)
        assert memory.held == 60 * MEBIBYTE
        for _ in range(60):
            memory.release(MEBIBYTE)
        await until(lambda: bool(trims))
        await asyncio.sleep(0.05)
        assert trims == [0]
        # The next burst is worth a trim of its own.
        memory.hold(20 * MEBIBYTE)
        memory.release(20 * MEBIBYTE)
        await until(lambda: len(trims) == 2)

    asyncio.run(main())


def test_few_bytes_are_not_worth_a_trim() -> None:
    async def main() -> None:
        trims: list[None] = []
        memory = FreedMemory(lambda: trims.append(None))
        for _ in range(100):
            memory.hold(MEBIBYTE)
            memory.release(MEBIBYTE)
        await asyncio.sleep(0.05)
        assert not trims and memory.held == 0

    asyncio.run(main())


def test_the_heap_of_this_process_can_be_trimmed() -> None:
    trim = freed_memory._malloc_trim()
    if trim is not None:  # glibc
        assert trim() in (0, 1)
