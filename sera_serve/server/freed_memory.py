"""Gives the memory of finished bodies back to the system.

glibc's malloc keeps freed pieces of up to some hundred KiB for later. 60 bodies of 1 MiB, received at the same time,
left the server 50 MiB larger for good.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

# A trim visits all of the heap's free pages: some milliseconds, for which few bytes are not worth it.
_WORTH_A_TRIM = 8 << 20
# The frames that call `release` still refer to the last body. A burst of bodies is worth one trim.
_DELAY_S = 1.0


class FreedMemory:
    """Counts the bytes that bodies hold, and trims the heap when many were held and few are left."""

    def __init__(self, trim: Callable[[], object] | None = None) -> None:
        """Hold nothing yet.

        Args:
            trim: Gives free memory back, on a worker thread. None is malloc's own function, if malloc has one.
        """
        self.held = 0
        self._most = 0
        self._trim = trim or _malloc_trim()
        self._under_way: asyncio.Task[None] | None = None

    def hold(self, count: int) -> None:
        """Count `count` more bytes."""
        self.held += count
        self._most = max(self._most, self.held)

    def release(self, count: int) -> None:
        """Count `count` bytes less. Call it on the event loop, when the bytes are free or about to be."""
        self.held -= count
        if self._trim is None or self._most < _WORTH_A_TRIM or self.held > self._most // 8:
            return
        self._most = self.held
        if self._under_way is None or self._under_way.done():
            self._under_way = asyncio.ensure_future(self._trim_soon(self._trim))

    @staticmethod
    async def _trim_soon(trim: Callable[[], object]) -> None:
        await asyncio.sleep(_DELAY_S)
        await asyncio.to_thread(trim)


def _malloc_trim() -> Callable[[], object] | None:
    """glibc's `malloc_trim`; it does not hold the interpreter's lock. None with another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return None if trim is None else lambda: trim(ctypes.c_size_t(0))
