"""Buffers for whole bundles, mapped from the system and outside of malloc's heaps."""

from __future__ import annotations

import mmap
from contextlib import suppress

# Bytes. Smaller buffers stay in the heap and fragment it little; a process has some 65,000 mappings at most.
_FROM = 128 << 10
# Bytes from which huge pages are asked for: each is zeroed at once instead of by 512 faults. Filling 7 MB takes 1.6 ms
# with them and 3.3 ms without (one core).
_HUGE_FROM = 4 << 20


def writable_memory(nbytes: int) -> memoryview:
    """A writable buffer of `nbytes` zero bytes; the system gets the memory back when its last view is dropped.

    malloc keeps a heap for each thread. After bundles of many sizes, each heap would stay as large as it ever was.
    """
    if nbytes < _FROM:
        return memoryview(bytearray(nbytes))
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE_FROM and hasattr(mmap, "MADV_HUGEPAGE"):
        # A system without them says so, and nothing else changes.
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)
