"""Answers to those who wait for a lease, decided under a lock and given without it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from sera_serve.residency.handles import Lease


class Answers:
    """Leases and errors on their way to the futures they are for: an answer runs its receiver's callbacks."""

    def __init__(self) -> None:
        self._decided: deque[tuple[Future[Lease], Lease | Exception]] = deque()

    def decide(self, future: Future[Lease], answer: Callable[[], Lease | Exception]) -> bool:
        """Make the answer and keep it for `deliver`, unless the receiver has given up. The caller holds the lock."""
        if not future.set_running_or_notify_cancel():
            return False
        self._decided.append((future, answer()))
        return True

    def deliver(self) -> None:
        """Give every answer decided so far; by any thread that does not hold the lock."""
        while self._decided:
            try:
                future, answer = self._decided.popleft()
            except IndexError:  # another thread took the last one
                return
            if isinstance(answer, Lease):
                future.set_result(answer)
            else:
                future.set_exception(answer)
