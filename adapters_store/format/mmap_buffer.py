"""Buffers for whole bundles, mapped from the system and outside of malloc's heaps."""

from __future__ import annotations

import mmap

# Bytes. Smaller buffers stay in the heap and fragment it little; a process has some 65,000 mappings at most.
_FROM = 128 << 10


def writable_memory(nbytes: int) -> memoryview:
    """A writable buffer of `nbytes` zero bytes; the system gets the memory back when its last view is dropped.

    malloc keeps a heap for each thread. After bundles of many sizes, each heap would stay as large as it ever was.
    """
    if nbytes < _FROM:
        return memoryview(bytearray(nbytes))
    return memoryview(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
