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
from pathlib import Path

# A trim visits all free pages of all heaps: some milliseconds, for which few bytes are not worth it.
_WORTH_A_TRIM = 8 << 20
_EVERY_S = 15.0
_STATM = Path("/proc/self/statm")


class MemoryTrimmer:
    """Trims the heaps from time to time, when the process has grown since the last trim.

    What stays after a trim is in use, and is the measure for the next one. So a server that needs more memory is
    trimmed once for each step of its growth, and an idle one never.
    """

    def __init__(self, trim: Callable[[], object] | None = None, resident: Callable[[], int] | None = None) -> None:
        """Set up.

        Args:
            trim: Gives free memory back. None is malloc's own function, if malloc has one.
            resident: Bytes of the process in memory. None reads them from the system, if it tells.
        """
        self._trim = trim or _malloc_trim()
        self._resident = resident or (_resident_bytes if _STATM.exists() else None)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Trim while the block runs."""
        if self._trim is None or self._resident is None:
            yield
            return
        task = asyncio.ensure_future(self._watch(self._trim, self._resident))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _watch(self, trim: Callable[[], object], resident: Callable[[], int]) -> None:
        least = resident()
        while True:
            await asyncio.sleep(_EVERY_S)
            now = resident()
            if now - least > _WORTH_A_TRIM:
                await asyncio.to_thread(trim)
                now = resident()
                least = now
            # What was given back without a trim must not hide the next growth.
            least = min(least, now)


def _resident_bytes() -> int:
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _malloc_trim() -> Callable[[], object] | None:
    """glibc's `malloc_trim`; it does not hold the interpreter's lock. None with another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return None if trim is None else lambda: trim(ctypes.c_size_t(0))
