"""What a request holds of an adapter: a wish that it be brought near, then the right to use it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from sera_serve.residency.pool import Placement


class Lease:
    """The right to use a resident adapter: while it is held, the adapter neither moves nor leaves the device."""

    def __init__(self, placement: Placement, release: Callable[[Lease], None]) -> None:
        self.placement = placement
        self.held = True
        self._release = release

    @property
    def slot(self) -> int:
        """Slot that a batch names the adapter by."""
        return self.placement.slot

    def release(self) -> None:
        """Give the right back; only when the last forward pass that uses the slot for it has ended. Idempotent."""
        self._release(self)


class PrefetchHint:
    """A wish of a request that is not yet admitted: its adapter is brought near, and kept there where possible."""

    def __init__(self, digest: str, release: Callable[[PrefetchHint], None]) -> None:
        self.digest = digest
        self.held = True
        self._release = release

    def release(self) -> None:
        """Drop the wish: the request has its lease, or is gone. Idempotent."""
        self._release(self)


class Wishes:
    """Which adapters are wished for. The caller holds the lock; only a release takes it itself."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._counts: Counter[str] = Counter()

    def __contains__(self, digest: str) -> bool:
        return digest in self._counts

    def add(self, digest: str) -> PrefetchHint:
        """One more wish for an adapter."""
        self._counts[digest] += 1
        return PrefetchHint(digest, self._drop)

    def check_invariants(self) -> None:
        """Raise RuntimeError where a wish was counted off twice."""
        if min(self._counts.values(), default=1) < 1:
            raise RuntimeError("a prefetch was released twice")

    def _drop(self, wish: PrefetchHint) -> None:
        with self._lock:
            if wish.held:
                wish.held = False
                self._counts[wish.digest] -= 1
                if not self._counts[wish.digest]:
                    del self._counts[wish.digest]
