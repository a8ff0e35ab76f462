"""Futures that are decided under residency's lock and settled without it: settling runs callbacks of others."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future

from sera_serve.residency.entry import Lease


class CompletionQueue:
    """Futures with what they will be given: decided under the lock, settled without it."""

    def __init__(self) -> None:
        self._decided: deque[tuple[Future[Lease], Lease | Exception]] = deque()
        self._here = threading.local()

    def add(self, future: Future[Lease], outcome: Lease | Exception) -> None:
        """Have a future settled by the next `settle`; it is running, so that it cannot be cancelled any more."""
        self._decided.append((future, outcome))

    def settle(self) -> None:
        """Settle all futures added so far. This runs their callbacks: the calling thread holds no lock.

        A callback may give a lease back, which settles further futures: those are left to the call that runs it. Nested
        calls would go as deep as requests wait.
        """
        if getattr(self._here, "settles", False):
            return
        self._here.settles = True
        try:
            while self._decided:
                try:
                    future, outcome = self._decided.popleft()
                except IndexError:  # another thread took the last one
                    return
                if isinstance(outcome, Lease):
                    future.set_result(outcome)
                else:
                    future.set_exception(outcome)
        finally:
            self._here.settles = False
