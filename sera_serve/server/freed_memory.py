"""Gives memory that requests have freed back to the system.

glibc's malloc keeps freed pieces of up to some hundred KiB for later. 60 bodies of 1 MiB, received at the same time,
left the server 50 MiB larger for good.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

# A trim visits all free pages of all heaps: some milliseconds, for which few bytes are not worth it.
_WORTH_A_TRIM = 8 << 20
_EVERY_S = 15.0
# Heaps of malloc in all, those of the main thread and of the engine's among them.
_MOST_HEAPS = 4
# `M_ARENA_MAX` in glibc's malloc.h.
_HEAPS_PARAMETER = -8


def limit_heaps() -> None:
    """Let threads share a few heaps, unless the environment has `MALLOC_ARENA_MAX`. Call it before threads begin.

    glibc gives each new thread a heap of its own, up to eight for each core. The free end of such a heap is not given
    back, not even by a trim: 16 heaps kept 3 to 6 MiB each after a siege, all of it free.
    """
    parameter = getattr(ctypes.CDLL(None), "mallopt", None)
    if parameter is not None and "MALLOC_ARENA_MAX" not in os.environ:
        parameter(_HEAPS_PARAMETER, _MOST_HEAPS)


class MemoryTrimmer:
    """Trims the heaps from time to time, when malloc has come to hold more free memory than after the last trim.

    The size of the process is no measure: freed memory stays a part of it. A trim that ran while many bodies were under
    way found their memory in use. When the bodies were freed later, the process kept its size.
    """

    def __init__(self, trim: Callable[[], object] | None = None, free: Callable[[], int] | None = None) -> None:
        """Set up.

        Args:
            trim: Gives free memory back. None is malloc's own function, if malloc has one.
            free: Bytes that malloc holds free, given back or not. None asks malloc, if it tells.
        """
        self._trim = trim or _malloc_trim()
        self._free = free or _free_bytes()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Trim while the block runs."""
        if self._trim is None or self._free is None:
            yield
            return
        task = asyncio.ensure_future(self._watch(self._trim, self._free))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _watch(self, trim: Callable[[], object], free: Callable[[], int]) -> None:
        # Pages that a trim gave back count as free still; so the least since then is the measure.
        least = await asyncio.to_thread(free)
        while True:
            await asyncio.sleep(_EVERY_S)
            now = await asyncio.to_thread(free)
            if now - least > _WORTH_A_TRIM:
                await asyncio.to_thread(trim)
                now = least = await asyncio.to_thread(free)
            # What was used again without a trim must not hide the next pieces that are freed.
            least = min(least, now)


def _malloc_trim() -> Callable[[], object] | None:
    """glibc's `malloc_trim`; it does not hold the interpreter's lock. None with another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return None if trim is None else lambda: trim(ctypes.c_size_t(0))


def _free_bytes() -> Callable[[], int] | None:
    """Bytes free in all heaps, by glibc's `mallinfo2`, or by `mallinfo` before glibc 2.33. None with another library.

    It visits the free pieces of all heaps. It does not hold the interpreter's lock.
    """
    library = ctypes.CDLL(None)
    info = getattr(library, "mallinfo2", None)
    number: type[ctypes.c_size_t] | type[ctypes.c_uint] = ctypes.c_size_t
    if info is None:
        # Its fields are C's int, and wrap beyond 4 GiB.
        info, number = getattr(library, "mallinfo", None), ctypes.c_uint
    if info is None:
        return None
    names = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
    info.restype = type("_MallocInfo", (ctypes.Structure,), {"_fields_": [(name, number) for name in names]})
    return lambda: int(info().fordblks)
