"""An adapter on its way to the device, with everyone who waits for it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from sera_serve.residency.handles import Lease
from sera_serve.residency.packing import AdapterLayout
from sera_serve.residency.pool import Placement
from sera_serve.residency.stats import Tier


@dataclass(eq=False)
class Loading:
    """One load, shared by all who ask for the adapter meanwhile: it is read, finds room or waits for it, is copied.

    Attributes:
        futures: Who waits; none, if it is only prefetched.
        started: A loader thread has taken it up.
        tier: Where the adapter was found, once it was.
        placement: Where it is being copied to, once there is room.
        doomed: It was deleted meanwhile: who waits is served, and nothing of it is kept.
        seconds: Time spent reading so far.
    """

    digest: str
    futures: list[Future[Lease]] = field(default_factory=list)
    started: bool = False
    tier: Tier | None = None
    placement: Placement | None = None
    doomed: bool = False
    seconds: float = 0.0

    def is_awaited(self) -> bool:
        """Whether a request waits that has not given up."""
        return any(not future.cancelled() for future in self.futures)


@dataclass(frozen=True)
class Waiting:
    """A load in the line for room. Its data is in the host cache, or else is read again: a line takes no memory.

    Attributes:
        granted_before: Leases that had been granted to anyone when it began to wait.
    """

    loading: Loading
    layout: AdapterLayout
    granted_before: int
