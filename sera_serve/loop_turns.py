"""Long work on the event loop, such as parsing a large body: one piece at a time, with rests, owners in turn.

The loop runs whatever is ready before it looks at the network again. 256 bodies of 1 MiB whose last bytes come at once
would be parsed one after the other, and everybody else would wait for all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

# Work that is followed by a rest. Timers count milliseconds: rests after shorter pieces would be longer than those.
_STRETCH_S = 0.005
# The longest rest. A piece takes some milliseconds; a process that was held up in one, by its host, goes on soon.
_LONGEST_REST_S = 0.1
# Short work that is done at once, in one turn of the event loop.
_AT_ONCE_S = 0.01


class LoopTurns:
    """Who may work for long on the event loop. Only the event loop's thread may use it."""

    def __init__(self) -> None:
        self._is_taken = False
        # Seconds of work that no rest has followed yet.
        self._worked_s = 0.0
        # When the first short work of this turn of the event loop began.
        self._short_since: float | None = None
        # By owner; the owner whose turn is next comes first.
        self._waiting: dict[Hashable, deque[asyncio.Future[None]]] = {}
        self._short_waiting: dict[Hashable, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def turn(self, owner: Hashable) -> AsyncIterator[None]:
        """Do a piece of work in the block, without a suspension in it, when it is the owner's turn.

        After some milliseconds of pieces the loop is left to others for as long as the pieces took, each with what
        follows it up to the next suspension of the task. Who comes then waits for no piece but those of this owner and
        one of each other one.
        """
        loop = asyncio.get_running_loop()
        if self._is_taken:
            granted = loop.create_future()
            self._waiting.setdefault(owner, deque()).append(granted)
            try:
                await granted
            except asyncio.CancelledError:
                if not granted.cancelled():
                    # It was cancelled with the turn in its hand.
                    self._next()
                raise
        self._is_taken = True
        began = time.monotonic()
        try:
            yield
        finally:
            loop.call_soon(self._rest, began)

    async def short_turn(self, owner: Hashable) -> None:
        """Return when a piece of short work may be done, in what follows up to the next suspension of the task.

        That is at once, unless others wait, or much was done in this turn of the event loop: 256 requests that come at
        once take a third of a millisecond or more each. Who waits has a turn of the loop of its own, the owners in
        turn, before anyone who comes later: without a pause, later ones would fill every turn of the loop.
        """
        if not self._short_waiting and self._has_time():
            return
        loop = asyncio.get_running_loop()
        if not self._short_waiting:
            loop.call_soon(self._next_short)
        granted = loop.create_future()
        self._short_waiting.setdefault(owner, deque()).append(granted)
        await granted

    def _has_time(self) -> bool:
        """Whether more short work may be done in this turn of the event loop."""
        now = time.monotonic()
        if self._short_since is None:
            self._short_since = now
            # Until the next turn of the event loop begins.
            asyncio.get_running_loop().call_soon(setattr, self, "_short_since", None)
        return now - self._short_since < _AT_ONCE_S

    def _next_short(self) -> None:
        """Let the next one do its short work in the next turn of the event loop."""
        granted = _first(self._short_waiting)
        if granted is not None:
            granted.set_result(None)
        if self._short_waiting:
            asyncio.get_running_loop().call_soon(self._next_short)

    def _rest(self, began: float) -> None:
        self._worked_s += time.monotonic() - began
        if self._worked_s < _STRETCH_S:
            self._next()
            return
        asyncio.get_running_loop().call_later(min(self._worked_s, _LONGEST_REST_S), self._next)
        self._worked_s = 0.0

    def _next(self) -> None:
        """Give the turn to the next owner who waits."""
        granted = _first(self._waiting)
        self._is_taken = granted is not None
        if granted is not None:
            granted.set_result(None)


def _first(waiting: dict[Hashable, deque[asyncio.Future[None]]]) -> asyncio.Future[None] | None:
    """Take out the first future of the owner whose turn is next, or None if all who waited have left."""
    while waiting:
        owner = next(iter(waiting))
        own = waiting.pop(owner)
        while own:
            granted = own.popleft()
            if not granted.done():
                if own:
                    # Behind the other owners.
                    waiting[owner] = own
                return granted
    return None
