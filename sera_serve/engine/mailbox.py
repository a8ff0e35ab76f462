"""News of sequences from the engine's thread to an event loop: those of one step in one call."""

from __future__ import annotations

import asyncio
from collections import deque

from sera_serve.engine.generation import GenerationStream
from sera_serve.engine.sequences import SequenceUpdate


class Mailbox:
    """For one event loop; posts come from one thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._letters: deque[tuple[GenerationStream, SequenceUpdate]] = deque()
        self._called = False

    def post(self, stream: GenerationStream, update: SequenceUpdate) -> bool:
        """Have `stream.deliver` called on the loop; False if the loop is closed, and nobody waits for it any more."""
        if self.loop.is_closed():
            return False
        self._letters.append((stream, update))
        if not self._called:
            self._called = True
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # closed just now
                return False
        return True

    def _deliver(self) -> None:
        # Before the letters are taken: what is posted from now on calls again, if in vain.
        self._called = False
        while self._letters:
            stream, update = self._letters.popleft()
            stream.deliver(update)
