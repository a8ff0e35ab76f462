"""The line of adapters that were read and find no room in the pool."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from sera_serve.residency.loading import Loading, Waiting
from sera_serve.residency.packing import AdapterLayout
from sera_serve.residency.pool import Placement
from sera_serve.residency.residents import Residents
from sera_serve.residency.stats import Tier

# How many adapters that find no room are tried before the rest of the line is left for later.
_WINDOW = 16


class Outcome(enum.Enum):
    """Why one in line waits for room no more, where it is not that there is some."""

    ABANDONED = enum.auto()
    RESIDENT = enum.auto()
    NEVER = enum.auto()


class Line:
    """Who waits for room, in the order they came. Not thread-safe: the caller holds a lock.

    Others may pass the first in line until `patience` leases have been granted over its head; then nobody does, and
    resident adapters retire until it fits.
    """

    def __init__(
        self, residents: Residents, is_wanted: Callable[[str], bool], granted: Counter[Tier], patience: int
    ) -> None:
        """Begin empty; `granted` counts the leases granted so far, and is kept by others."""
        self._residents = residents
        self._is_wanted = is_wanted
        self._granted = granted
        self._patience = patience
        self._waiting: dict[str, Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def is_awaited(self) -> bool:
        """Whether a request waits for any of them."""
        return any(waiting.loading.is_awaited() for waiting in self._waiting.values())

    def join(self, loading: Loading, layout: AdapterLayout) -> None:
        """Go to the end of the line."""
        self._waiting[loading.digest] = Waiting(loading, layout, self._granted.total())

    def leave(self, digest: str) -> None:
        """Wait no more. Idempotent."""
        self._waiting.pop(digest, None)

    def is_impatient(self) -> bool:
        """Whether the first in line has been passed as often as it may be."""
        return any(self._has_waited_long(waiting) for waiting in list(self._waiting.values())[:1])

    def settle(self) -> Iterator[tuple[Loading, Placement | Outcome]]:
        """Those who need not wait any more, each with its room or the reason; the caller has them leave the line."""
        self._residents.retire_none()
        blocked = 0
        for waiting in list(self._waiting.values()):
            outcome = self._outcome(waiting)
            if outcome is not None:
                yield waiting.loading, outcome
                continue
            blocked += 1
            if blocked == 1 and self._has_waited_long(waiting):
                self._residents.retire_for(waiting.layout)
                return
            if blocked == _WINDOW:
                return

    def check_invariants(self, loadings: Mapping[str, Loading]) -> None:
        """Raise RuntimeError where one in line is not under way, or has its room already."""
        for digest, waiting in self._waiting.items():
            if loadings.get(digest) is not waiting.loading or waiting.loading.placement is not None:
                raise RuntimeError(f"adapter {digest} waits for room that it does not need")

    def _outcome(self, waiting: Waiting) -> Placement | Outcome | None:
        if not waiting.loading.is_awaited():
            return Outcome.ABANDONED
        if self._residents.usable(waiting.loading.digest):
            return Outcome.RESIDENT
        placement = self._residents.reserve(waiting.layout, self._is_wanted)
        if placement is None and not self._residents.could_fit(waiting.layout):
            return Outcome.NEVER
        return placement

    def _has_waited_long(self, waiting: Waiting) -> bool:
        return self._granted.total() - waiting.granted_before >= self._patience
