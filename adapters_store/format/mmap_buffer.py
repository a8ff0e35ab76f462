"""Memory for whole bundles: taken from the system and given back to it, past malloc's heaps."""

from __future__ import annotations

import mmap

# Bytes. Less stays in the heap, which such blocks fragment little: a process has some 65,000 mappings at most.
_FROM = 128 << 10


def writable_memory(nbytes: int) -> memoryview:
    """So many zero bytes; the system has them back when the last view of them is dropped.

    malloc keeps a heap for each thread, and after bundles of many sizes each would stay as large as its worst moment.
    """
    if nbytes < _FROM:
        return memoryview(bytearray(nbytes))
    return memoryview(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
