"""When the heaps are trimmed: after memory was freed, and only then."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys

import pytest

from sera_serve.server import freed_memory
from sera_serve.server.freed_memory import MemoryTrimmer
from support.engine import until

MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed_memory, "_EVERY_S", 0.005)


class Heap:
    """Free memory of a heap, which the test sets. A trim gives back what is free; it counts as free still."""

    def __init__(self) -> None:
        self.kept, self.given_back, self.looks, self.trims = 0, 20 * MEBIBYTE, 0, 0

    def free(self) -> int:
        self.looks += 1
        return self.kept + self.given_back

    def trim(self) -> None:
        self.trims += 1
        self.kept, self.given_back = 0, self.kept + self.given_back

    def use(self, size: int) -> None:
        """Take memory; what was given back comes first."""
        again = min(size, self.given_back)
        self.given_back -= again
        self.kept = max(0, self.kept - (size - again))

    def let_go(self, size: int) -> None:
        self.kept += size

    async def several_looks(self) -> None:
        before = self.looks
        await until(lambda: self.looks > before + 4)


def test_the_heaps_are_trimmed_once_for_each_release() -> None:
    async def main() -> None:
        heap = Heap()
        async with MemoryTrimmer(heap.trim, heap.free).running():
            await heap.several_looks()
            assert heap.trims == 0
            heap.let_go(60 * MEBIBYTE)
            await until(lambda: heap.trims == 1)
            await heap.several_looks()
            heap.let_go(4 * MEBIBYTE)
            await heap.several_looks()
            assert heap.trims == 1, "4 MiB are not worth a trim"
            # Memory in use is no reason for a trim, and a reason when it is freed: what it took was in the count.
            heap.use(50 * MEBIBYTE)
            await heap.several_looks()
            assert heap.trims == 1
            heap.let_go(50 * MEBIBYTE)
            await until(lambda: heap.trims == 2)
            await heap.several_looks()
            assert heap.trims == 2

    asyncio.run(main())


def test_what_was_in_use_at_a_trim_is_given_back_when_it_is_freed() -> None:
    async def main() -> None:
        heap = Heap()
        async with MemoryTrimmer(heap.trim, heap.free).running():
            await heap.several_looks()
            # 60 MiB are under way, beside 10 MiB that were freed.
            heap.use(60 * MEBIBYTE)
            await heap.several_looks()
            heap.let_go(10 * MEBIBYTE)
            await until(lambda: heap.trims == 1)
            await heap.several_looks()
            heap.let_go(60 * MEBIBYTE)
            await until(lambda: heap.trims == 2)
            assert heap.kept == 0

    asyncio.run(main())


def test_nothing_is_looked_at_after_the_end() -> None:
    async def main() -> None:
        heap = Heap()
        async with MemoryTrimmer(heap.trim, heap.free).running():
            await heap.several_looks()
        seen = heap.looks
        await asyncio.sleep(0.05)
        assert heap.looks == seen

    asyncio.run(main())


def test_the_heap_of_this_process_tells_what_it_frees() -> None:
    trim, free = freed_memory._malloc_trim(), freed_memory._free_bytes()
    if trim is None or free is None:  # no glibc
        return
    # Alternate pieces stay, so that none of the others is at the end of the heap, from where it would go at once.
    held = [bytes(60 << 10) for _ in range(1000)]
    before = free()
    del held[::2]
    assert free() - before > 20 * MEBIBYTE
    assert trim() in (0, 1)


# Twelve threads hold memory of malloc at the same time; then malloc tells how many heaps there are.
HEAPS_OF_TWELVE_THREADS = """
import ctypes, runpy, sys, tempfile, threading

runpy.run_path(sys.argv[1])["limit_heaps"]()
library, barrier = ctypes.CDLL(None), threading.Barrier(12)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]

def hold():
    library.malloc(100_000)
    barrier.wait()

threads = [threading.Thread(target=hold) for _ in range(12)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
library.fdopen.restype = ctypes.c_void_p
with tempfile.NamedTemporaryFile() as file:
    stream = ctypes.c_void_p(library.fdopen(file.file.fileno(), b"w"))
    library.malloc_info(0, stream)
    library.fflush(stream)
    print(open(file.name).read().count("<heap "))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="needs glibc's malloc")
@pytest.mark.parametrize(("variables", "most"), [({}, 4), ({"MALLOC_ARENA_MAX": "6"}, 6)])
def test_threads_share_a_few_heaps(variables: dict[str, str], most: int) -> None:
    # The file alone: its package imports all of the server.
    command = [sys.executable, "-c", HEAPS_OF_TWELVE_THREADS, freed_memory.__file__]
    environment = {key: value for key, value in os.environ.items() if key != "MALLOC_ARENA_MAX"} | variables
    counted = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(counted.stdout) == most
