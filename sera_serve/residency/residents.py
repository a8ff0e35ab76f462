"""The adapters on the device: who holds them, who may be evicted, and who has to make room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, filterfalse

from sera_serve.errors import CannotPin
from sera_serve.residency.packing import AdapterLayout, PackedAdapter
from sera_serve.residency.pool import DevicePool, Placement


@dataclass
class _Resident:
    placement: Placement
    leases: int = 0
    doomed: bool = False


class Residents:
    """Adapters whose fill is complete, least recently used first. Not thread-safe: the caller holds a lock.

    An adapter that is leased or pinned is never evicted. One that is doomed (its bundle was deleted) leaves with its
    last lease. One that is retiring is given to nobody any more, so that its room comes free for an adapter that
    has waited too long.

    Attributes:
        evictions: Adapters that left for others' sake so far.
    """

    def __init__(self, pool: DevicePool, pin_share: float) -> None:
        """Own a pool, of whose bytes and slots pins may take the part `pin_share`."""
        self.pool = pool
        self.evictions = 0
        self._pin_share = pin_share
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        self._pins: set[str] = set()
        self._retiring: set[str] = set()
        # Elements of the residents that may be evicted: counted, because every load asks for it.
        self._idle_elements = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._residents

    def __len__(self) -> int:
        return len(self._residents)

    def digests(self) -> list[str]:
        """Digests, least recently used first."""
        return list(self._residents)

    def pins(self) -> list[str]:
        """Digests of the pinned adapters."""
        return sorted(self._pins)

    def leases(self) -> int:
        """How many leases are held."""
        return sum(resident.leases for resident in self._residents.values())

    def usable(self, digest: str) -> bool:
        """Whether the adapter is here and leases on it may be given."""
        return digest in self._residents and digest not in self._retiring

    def add(self, placement: Placement) -> None:
        """Take in an adapter whose fill is complete, as the most recently used."""
        self._residents[placement.adapter.digest] = _Resident(placement)
        self._idle_elements += placement.adapter.elements

    def copy_in(self, packed: PackedAdapter, is_wanted: Callable[[str], bool]) -> bool:
        """Reserve, fill and add under the caller's lock; False, and nothing changed but evictions, if it fails."""
        placement = self.reserve(packed.layout, is_wanted)
        if placement is None:
            return False
        try:
            self.pool.fill(placement, packed.data)
        except Exception:  # noqa: BLE001 - a loader thread tries again, and tells who waits
            self.pool.remove(placement)
            return False
        self.add(placement)
        return True

    def lease(self, digest: str) -> Placement:
        """Count one more lease; the adapter is now the most recently used."""
        resident = self._residents[digest]
        with self._counting(digest):
            resident.leases += 1
        self._residents.move_to_end(digest)
        return resident.placement

    def release(self, digest: str) -> None:
        """Count one lease less."""
        with self._counting(digest):
            self._residents[digest].leases -= 1
        self._remove_if_doomed(digest)

    def doom(self, digest: str) -> None:
        """Have a deleted adapter leave as soon as nobody holds it; it is no longer pinned."""
        self.unpin(digest)
        if digest in self._residents:
            self._residents[digest].doomed = True
            self._remove_if_doomed(digest)

    def pin(self, digest: str) -> None:
        """Never evict this resident adapter until it is unpinned.

        Raises:
            CannotPin: Pins would take too much of the pool, or the adapter is doomed.
        """
        if digest in self._pins:
            return
        if self._residents[digest].doomed:
            raise CannotPin("the adapter is being deleted; if it was published anew, pin it again", param="adapter")
        elements = self._residents[digest].placement.adapter.elements
        if (
            sum(p.adapter.elements for p in self._pinned()) + elements > self._pin_share * self.pool.capacity
            or len(self._pins) + 1 > self._pin_share * self.pool.slots
        ):
            raise CannotPin(
                f"pinned adapters may take {self._pin_share:.0%} of the pool and {len(self._pins)} are pinned; "
                "unpin one, or raise pool_mib and max_resident",
                param="adapter",
            )
        with self._counting(digest):
            self._pins.add(digest)

    def unpin(self, digest: str) -> None:
        """Let the adapter be evicted again. Idempotent."""
        with self._counting(digest):
            self._pins.discard(digest)

    def reserve(
        self, adapter: AdapterLayout, is_wanted: Callable[[str], bool], spare_wanted: bool = False
    ) -> Placement | None:
        """Room in the pool, evicting if that gives enough of it; otherwise nobody is evicted.

        Adapters that no request waits for leave first, the least recently used before others; then those that some
        request will want, the latest of them first, or none with `spare_wanted`.
        """
        placement = self.pool.reserve(adapter)
        victims = None if placement is not None else self._victims(adapter, is_wanted, spare_wanted)
        for digest in victims or ():
            self._remove(digest)
            self.evictions += 1
            placement = self.pool.reserve(adapter)
            if placement is not None:
                break
        return placement

    def could_fit(self, adapter: AdapterLayout) -> bool:
        """Whether there would be room if everything left that is not pinned."""
        if not self._pins:
            return adapter.elements <= self.pool.capacity
        others = [p for p in self.pool.placements() if p.adapter.digest not in self._pins]
        return self.pool.would_fit(adapter, others)

    def has_spare_room(self, is_wanted: Callable[[str], bool]) -> bool:
        """Whether an adapter of the average size may find room without evicting one that is leased or wanted."""
        if any(self._evictable(digest) and not is_wanted(digest) for digest in self._residents):
            return True
        placed = len(self.pool.placements())
        return placed < self.pool.slots and (self.pool.capacity - self.pool.used) * max(1, placed) >= self.pool.used

    def retire_for(self, adapter: AdapterLayout) -> None:
        """Give no more leases on adapters whose leaving makes room for `adapter`: idle ones, then the least used."""
        candidates = [digest for digest in self._residents if digest not in self._pins]
        # Stable: within each group the least recently used come first.
        candidates.sort(key=lambda digest: self._residents[digest].leases > 0)
        leaving: list[Placement] = []
        missing = adapter.elements - (self.pool.capacity - self.pool.used)
        for digest in candidates:
            self._retiring.add(digest)
            leaving.append(self._residents[digest].placement)
            missing -= leaving[-1].adapter.elements
            if missing <= 0 and self.pool.would_fit(adapter, leaving):
                return

    def are_retiring(self) -> bool:
        """Whether some adapters are given to nobody."""
        return bool(self._retiring)

    def retire_none(self) -> None:
        """Give leases on every adapter again."""
        self._retiring.clear()

    def check_invariants(self) -> None:
        """Raise RuntimeError where residents, leases and pins do not agree with each other and the pool."""
        self.pool.check_invariants()
        placed = {placement.slot: placement for placement in self.pool.placements()}
        for digest, resident in self._residents.items():
            if placed.get(resident.placement.slot) is not resident.placement:
                raise RuntimeError(f"adapter {digest} is resident without a place in the pool")
            if resident.placement.adapter.digest != digest:
                raise RuntimeError(f"adapter {digest} is in the place of another")
            if resident.leases < 0:
                raise RuntimeError(f"a lease on adapter {digest} was released twice")
            if resident.doomed and (not resident.leases or digest in self._pins):
                raise RuntimeError(f"deleted adapter {digest} is still on the device")
        idle = [resident.placement for digest, resident in self._residents.items() if self._evictable(digest)]
        if sum(placement.adapter.elements for placement in idle) != self._idle_elements:
            raise RuntimeError("the count of what may be evicted is wrong")
        if not self._pins | self._retiring <= self._residents.keys():
            raise RuntimeError("an adapter is pinned or retiring that is not resident")
        if sum(p.adapter.elements for p in self._pinned()) > self._pin_share * self.pool.capacity:
            raise RuntimeError("pinned adapters take more of the pool than they may")

    def _victims(
        self, adapter: AdapterLayout, is_wanted: Callable[[str], bool], spare_wanted: bool
    ) -> list[str] | None:
        """Whom to evict, in this order, until there is room for `adapter`; None if that would not give enough."""
        missing = adapter.elements - (self.pool.capacity - self.pool.used)
        if missing > self._idle_elements:
            return None
        idle = filter(self._evictable, self._residents)
        latest = () if spare_wanted else filter(self._evictable, reversed(self._residents))
        victims: list[str] = []
        leaving: list[Placement] = []
        # Whether they are enough is asked again each time they have doubled: holes are costly to go through.
        ask_at = 1
        for digest in chain(filterfalse(is_wanted, idle), filter(is_wanted, latest)):
            victims.append(digest)
            leaving.append(self._residents[digest].placement)
            missing -= leaving[-1].adapter.elements
            if missing <= 0 and len(victims) >= ask_at:
                if self.pool.would_fit(adapter, leaving):
                    return victims
                ask_at = 2 * len(victims)
        return victims if self.pool.would_fit(adapter, leaving) else None

    def _remove(self, digest: str) -> None:
        """Take an adapter that nobody holds off the device."""
        placement = self._residents.pop(digest).placement
        self._idle_elements -= placement.adapter.elements
        self.pool.remove(placement)

    @contextmanager
    def _counting(self, digest: str) -> Iterator[None]:
        """Keep the count of evictable elements over a change to one adapter."""
        before = self._evictable(digest)
        yield
        if digest in self._residents:
            change = self._evictable(digest) - before
            self._idle_elements += change * self._residents[digest].placement.adapter.elements

    def _pinned(self) -> list[Placement]:
        return [self._residents[digest].placement for digest in self._pins]

    def _evictable(self, digest: str) -> bool:
        return digest in self._residents and not self._residents[digest].leases and digest not in self._pins

    def _remove_if_doomed(self, digest: str) -> None:
        resident = self._residents[digest]
        if resident.doomed and not resident.leases:
            self._retiring.discard(digest)
            self._remove(digest)
