"""What a request holds of an adapter: a wish that it be brought near, then the right to use it."""

from __future__ import annotations

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


class Prefetch:
    """A wish of a request that is not yet admitted: its adapter is brought near, and kept there where possible."""

    def __init__(self, digest: str, release: Callable[[Prefetch], None]) -> None:
        self.digest = digest
        self.held = True
        self._release = release

    def release(self) -> None:
        """Drop the wish: the request has its lease, or is gone. Idempotent."""
        self._release(self)
