"""When the heaps are trimmed: after the process has grown, and only then."""

from __future__ import annotations

import asyncio

import pytest

from sera_serve.server import freed_memory
from sera_serve.server.freed_memory import MemoryTrimmer
from support.engine import until

MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed_memory, "_EVERY_S", 0.005)


class Process:
    """A process whose size the test sets; a trim gives back what is free."""

    def __init__(self) -> None:
        self.used, self.free, self.looks, self.trims = 100 * MEBIBYTE, 0, 0, 0

    def resident(self) -> int:
        self.looks += 1
        return self.used + self.free

    def trim(self) -> None:
        self.trims += 1
        self.free = 0

    async def several_looks(self) -> None:
        before = self.looks
        await until(lambda: self.looks > before + 4)


def test_the_heaps_are_trimmed_once_for_each_growth() -> None:
    async def main() -> None:
        process = Process()
        async with MemoryTrimmer(process.trim, process.resident).running():
            await process.several_looks()
            assert process.trims == 0
            process.free = 60 * MEBIBYTE
            await until(lambda: process.trims == 1)
            await process.several_looks()
            process.free = 4 * MEBIBYTE
            await process.several_looks()
            assert process.trims == 1, "4 MiB are not worth a trim"
            # What is in use stays, and is no reason for another trim.
            process.used += 50 * MEBIBYTE
            await until(lambda: process.trims == 2)
            await process.several_looks()
            assert process.trims == 2
            # It goes, and what comes next is a growth again.
            process.used -= 50 * MEBIBYTE
            await process.several_looks()
            process.free = 9 * MEBIBYTE
            await until(lambda: process.trims == 3)

    asyncio.run(main())


def test_nothing_is_looked_at_after_the_end() -> None:
    async def main() -> None:
        process = Process()
        async with MemoryTrimmer(process.trim, process.resident).running():
            await process.several_looks()
        seen = process.looks
        await asyncio.sleep(0.05)
        assert process.looks == seen

    asyncio.run(main())


def test_the_heap_of_this_process_can_be_trimmed() -> None:
    trim = freed_memory._malloc_trim()
    if trim is not None:  # glibc
        assert trim() in (0, 1)
        assert freed_memory._resident_bytes() > MEBIBYTE
