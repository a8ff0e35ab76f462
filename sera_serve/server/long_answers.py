"""The bytes of an answer that may be long, written without keeping the event loop for long.

An answer of a megabyte takes its writer some 10 ms, and one call may ask for 20 MB. Many answers may be ready at once.
"""

from __future__ import annotations

import io
import time
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator

from sera_serve.loop_turns import LoopTurns

_SLICE_S = 0.002

Write = Callable[[Iterable[str]], Awaitable[bytes]]
"""Joins the pieces of an answer, as UTF-8."""


async def written(pieces: Iterable[str], turns: LoopTurns, owner: Hashable) -> bytes:
    """Join the pieces of an answer, as UTF-8. Each is made when its time comes, and let go of.

    Args:
        pieces: Each is made in a millisecond or so.
        turns: What takes longer than a slice is written in slices, one a turn.
        owner: Whose turn it is.
    """
    # A long answer is there once: joined text by text, it would be there twice.
    content = io.BytesIO()
    left = iter(pieces)
    await turns.short_turn(owner)
    is_whole = _write_slice(left, content)
    while not is_whole:
        async with turns.turn(owner):
            is_whole = _write_slice(left, content)
    return content.getvalue()


def _write_slice(left: Iterator[str], content: io.BytesIO) -> bool:
    """Write pieces for as long as a slice is; whether none is left."""
    end = time.monotonic() + _SLICE_S
    for piece in left:
        content.write(piece.encode())
        if time.monotonic() >= end:
            return False
    return True
