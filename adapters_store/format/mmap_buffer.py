"""Buffers for whole bundles, mapped from the system and outside of malloc's heaps."""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from contextlib import suppress

import numpy as np

# Bytes. Smaller buffers stay in the heap and fragment it little; a process has some 65,000 mappings at most.
_FROM = 128 << 10
# Bytes from which huge pages are asked for: each is zeroed at once instead of by 512 faults. Filling 7 MB takes 1.6 ms
# with them and 3.3 ms without (one core).
_HUGE_FROM = 4 << 20
# Bytes of the largest buffer that is kept to be used again, and how many are: 64 MiB at most.
_KEPT_TO = 16 << 20
# A deque, whose operations are atomic: a buffer comes back whenever its last view is dropped, in any thread, and in
# the middle of anything.
_kept: deque[mmap.mmap] = deque(maxlen=4)


def writable_memory(nbytes: int) -> memoryview:
    """A writable buffer of `nbytes` zero bytes; the system gets the memory back when its last view is dropped.

    malloc keeps a heap for each thread. After bundles of many sizes, each heap would stay as large as it ever was.
    """
    if nbytes < _FROM:
        return memoryview(bytearray(nbytes))
    return memoryview(_mapped(nbytes))


def reused_memory(nbytes: int) -> memoryview:
    """`writable_memory` that holds anything: the caller writes every byte. A few buffers are kept and used again.

    A new buffer costs a fault for each page, which the system fills with zeros: a third of the time of reading an
    adapter of 7 MB and packing it.
    """
    if not _FROM <= nbytes <= _KEPT_TO:
        return writable_memory(nbytes)
    memory = _take_kept(nbytes) or _mapped(nbytes)
    # All views refer to this array, and it is theirs alone.
    array = np.frombuffer(memory, np.uint8, nbytes)
    weakref.finalize(array, _kept.append, memory).atexit = False
    return array.data


def _take_kept(nbytes: int) -> mmap.mmap | None:
    for _ in range(len(_kept)):
        try:
            memory = _kept.popleft()
        except IndexError:  # another thread took it
            return None
        # A host cache counts the bytes that were asked for. Adapters of one kind differ by less.
        if nbytes <= len(memory) <= nbytes + nbytes // 16:
            return memory
        _kept.append(memory)
    return None


def _mapped(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE_FROM and hasattr(mmap, "MADV_HUGEPAGE"):
        # A system without them says so, and nothing else changes.
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
