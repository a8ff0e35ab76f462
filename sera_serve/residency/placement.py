"""Room on the device: which adapters wait for it, who is evicted for them, and who drains."""

from __future__ import annotations

import enum
import time
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain, islice

from sera_serve.errors import CannotPin
from sera_serve.residency.entry import DELETED, DRAINING, RESIDENT, AdapterEntry, AdapterTable, Claim
from sera_serve.residency.packing import AdapterLayout
from sera_serve.residency.pool import DevicePool, Extent, Placement, place
from sera_serve.residency.stats import Tier
from sera_serve.residency.turns import TurnQueue

# How many adapters that find no room are tried before the rest of the queue is left for later.
_WINDOW = 16
# For so many adapters that were looked at in vain, to drain for one that is outrun, a lease is granted before the next
# look: so what a lease costs does not grow with the adapters on the device.
_LOOKS_PER_LEASE = 32


class Outcome(enum.Enum):
    """Why an adapter leaves the queue for room."""

    PLACED = enum.auto()
    """Room is reserved for it."""
    ON_DEVICE = enum.auto()
    """It is on the device and leases on it may be granted: it was draining, and drains no more."""
    CANCELLED = enum.auto()
    """All requests for it were cancelled."""
    NEVER_FITS = enum.auto()
    """It does not fit beside the pinned adapters."""


class PlacementQueue:
    """The adapters on the device, and in order of arrival those that wait for room. The caller holds the lock.

    Tenants take turns: the first in the queue is of the tenant whose last turn is longest ago. Others may bypass an
    adapter until it is overdue. Then nothing bypasses it: adapters on the device drain until it fits, and it goes
    first. An adapter is overdue in three cases:

    - `max_bypasses` leases have been granted since it came.
    - It has waited for `max_wait_s`.
    - A tenant asks for a lease that was served more than one that waits. Then only adapters drain that no request
      uses, or only requests of tenants that were served more. Where these give too little room, it is not overdue, and
      with many adapters on the device some leases go by before they are looked through again.

    Where several tenants wait for an adapter, it takes the first turn of any, and the least served of them counts.
    A leased or pinned adapter is never evicted.

    Attributes:
        on_device: The adapters on the device by digest, least recently used first.
        pinned: Of these, the pinned ones.
        evictions: Adapters that left the device for others so far.
    """

    def __init__(
        self,
        pool: DevicePool,
        table: AdapterTable,
        granted: Counter[Tier],
        max_bypasses: int,
        pin_share: float,
        max_wait_s: float,
    ) -> None:
        """Begin empty.

        Args:
            pool: Device memory.
            table: The entries, of which evicted ones are settled.
            granted: Leases granted so far; others count them.
            max_bypasses: Leases that may be granted while an adapter waits.
            pin_share: The part of the pool's bytes, and of its slots, that pinned adapters may take.
            max_wait_s: Seconds for which an adapter may be bypassed.
        """
        self.on_device: OrderedDict[str, AdapterEntry] = OrderedDict()
        self.pinned: dict[str, AdapterEntry] = {}
        self.evictions = 0
        self._pool = pool
        self._table = table
        self._granted = granted
        self._max_bypasses = max_bypasses
        self._pin_share = pin_share
        self._max_wait_s = max_wait_s
        self._queue: TurnQueue[AdapterEntry] = TurnQueue()
        # The overdue adapter that others drain for, or drained for: it is tried before all others.
        self._favoured: AdapterEntry | None = None
        self._draining: dict[str, AdapterEntry] = {}
        # There may be room or a request that there was not when adapters began to drain.
        self._has_changed = False
        # Elements of the evictable adapters: counted, because every load asks for them.
        self._evictable_elements = 0
        # The holes that there would be beside the pinned adapters alone; None since these have changed.
        self._beside_pins: list[Extent] | None = None

    def __len__(self) -> int:
        return len(self._queue)

    def join(self, entry: AdapterEntry) -> None:
        """Go to the end of the queue of each tenant that waits for it; where it is in one, it stays where it is."""
        if not entry.queued:
            entry.queued_at, entry.queued_since = self._granted.total(), time.monotonic()
            entry.is_outrun, entry.outrun_from = False, 0
        self._queue.share(entry.owners(), entry)
        self._has_changed = True

    def leave_turns(self, entry: AdapterEntry) -> None:
        """Leave the queues of tenants that wait for it no more; with the last of them, `place_waiting` takes it out."""
        if entry.queued and entry.claims:
            self._queue.share(entry.owners(), entry)
        self._has_changed = True

    def clear(self) -> list[AdapterEntry]:
        """Empty the queue, and return the adapters that left it; nothing drains any more."""
        self._end_draining()
        entries = list(self._queue)
        for entry in entries:
            self._leave(entry)
        return entries

    def must_drain(self, claim: Claim | None) -> bool:
        """Whether an adapter in the queue is overdue, and none drains for it yet, as a lease is asked for.

        Args:
            claim: For whom the lease is asked.
        """
        if not len(self._queue) or self._draining:
            return False
        granted = self._granted.total()
        is_any = False
        for entry in islice(self._queue, _WINDOW):
            if granted >= entry.outrun_from and entry.is_behind(claim):
                entry.is_outrun = True
            # All are looked at: where too few may drain for the first, there may be enough for another.
            is_any = is_any or self._is_overdue(entry)
        return is_any

    def place_waiting(self) -> Iterator[tuple[AdapterEntry, Outcome]]:
        """Find room for adapters in the queue, and give each that need not wait any more; those have left the queue.

        Call it whenever there may be room. Where there is none for an adapter that is overdue, others drain for it, and
        all behind it stay in the queue.
        """
        if self._draining and not self._has_changed:
            # Nothing goes before the one that others drain for, and it still finds no room.
            return
        self._has_changed = False
        drained = self._end_draining()
        blocked = 0
        first = () if self._favoured is None else (self._favoured,)
        # A copy, each once: those that are placed leave the queue.
        for entry in dict.fromkeys((*first, *self._queue)):
            if not entry.queued:
                continue
            outcome = self._place(entry)
            if outcome is not None:
                yield entry, outcome
                continue
            blocked += 1
            if self._is_overdue(entry) and self._drain_for(entry):
                break
            if blocked == _WINDOW:
                break
        for entry in drained:
            # It need not leave any more, wherever in the queue the requests for it stand.
            if entry.queued and entry.grantable and (outcome := self._place(entry)) is not None:
                yield entry, outcome

    def place_last(self, last: AdapterEntry) -> Iterator[tuple[AdapterEntry, Outcome]]:
        """`place_waiting` for an adapter that has just joined: since the others were tried, no room came free."""
        is_overdue = self._is_overdue(next(iter(self._queue)))
        if len(self._queue) == 1 or (is_overdue and not self._draining):
            # One that became overdue with time has others drain for it now, and is not bypassed.
            yield from self.place_waiting()
        elif len(self._queue) <= _WINDOW and self._favoured is None:
            outcome = self._place(last)
            if outcome is not None:
                yield last, outcome

    def reserve(self, entry: AdapterEntry, spare_wanted: bool = False) -> bool:
        """Reserve room for an adapter, evicting others where that gives enough; else none is evicted.

        Adapters that no request wants are evicted first, the least recently used before others. Then follow those
        that some request will want, the latest of them first; none of these with `spare_wanted`.
        """
        layout = _layout(entry)
        entry.placement = self._pool.reserve(layout)
        if entry.placement is None:
            for victim in self._victims(layout, spare_wanted):
                self.remove(victim)
                self.evictions += 1
                entry.placement = self._pool.reserve(layout)
                if entry.placement is not None:
                    break
        return entry.placement is not None

    def has_spare_room(self) -> bool:
        """Whether an adapter of the average size may find room without evicting a leased, pinned or wanted one."""
        if any(entry.evictable and not entry.wanted for entry in self.on_device.values()):
            return True
        placed = len(self._pool.placements())
        free = self._pool.capacity - self._pool.used
        return placed < self._pool.slots and free * placed >= self._pool.used

    def arrive(self, entry: AdapterEntry) -> None:
        """Take in an adapter whose copy is complete, as the most recently used."""
        entry.move_to(DELETED if entry.deleted else RESIDENT)
        entry.found_in, entry.load_seconds = None, 0.0
        self.on_device[entry.digest] = entry
        self._evictable_elements += _layout(entry).elements
        self._has_changed = True

    def remove(self, entry: AdapterEntry) -> None:
        """Take an adapter without leases off the device."""
        del self.on_device[entry.digest]
        self._draining.pop(entry.digest, None)
        if entry.evictable:
            self._evictable_elements -= _layout(entry).elements
        self.free(entry)

    def free(self, entry: AdapterEntry) -> None:
        """Give back an adapter's room, and settle its entry."""
        if entry.placement is not None:
            self._pool.remove(entry.placement)
            entry.placement = None
            self._has_changed = True
        self._table.settle(entry)

    def add_lease(self, entry: AdapterEntry, claim: Claim | None) -> Placement:
        """Count a lease on an adapter on the device, now the most recently used."""
        if entry.placement is None or not entry.grantable:
            raise RuntimeError(f"a lease on adapter {entry.digest}, which is {entry.state.value}")
        if not entry.leases and not entry.pinned:
            self._evictable_elements -= entry.placement.adapter.elements
        entry.leases[claim] += 1
        self.on_device.move_to_end(entry.digest)
        return entry.placement

    def end_lease(self, entry: AdapterEntry, claim: Claim | None) -> None:
        """Count a lease less. With its last lease, a deleted adapter leaves the device."""
        entry.leases[claim] -= 1
        if not entry.leases[claim]:
            del entry.leases[claim]
        if not entry.leases:
            self._has_changed = True
            if not entry.pinned:
                self._evictable_elements += _layout(entry).elements
            if entry.deleted:
                self.remove(entry)

    def mark_deleted(self, entry: AdapterEntry) -> None:
        """Have an adapter on the device leave it as soon as no lease is held; it is not pinned any more."""
        self.unpin(entry)
        entry.deleted = True
        self._has_changed = True
        if not entry.queued:
            self._table.host_cache.drop(entry.digest)
        if not entry.leases:
            self.remove(entry)
        elif entry.state is RESIDENT:
            entry.move_to(DELETED)

    def pin(self, entry: AdapterEntry) -> None:
        """Never evict an adapter on the device until it is unpinned. Idempotent.

        Raises:
            CannotPin: Pinned adapters would take too much of the pool, or the adapter is deleted.
        """
        if entry.pinned:
            return
        if entry.deleted:
            raise CannotPin("the adapter is being deleted; if it was published anew, pin it again", param="adapter")
        if (
            self._pinned_elements() + _layout(entry).elements > self._pin_share * self._pool.capacity
            or len(self.pinned) + 1 > self._pin_share * self._pool.slots
        ):
            raise CannotPin(
                f"pinned adapters may take {self._pin_share:.0%} of the pool and {len(self.pinned)} are pinned; "
                "unpin one, or raise pool_mib and max_resident",
                param="adapter",
            )
        if not entry.leases:
            self._evictable_elements -= _layout(entry).elements
        entry.pinned = True
        self.pinned[entry.digest] = entry
        self._has_changed, self._beside_pins = True, None

    def unpin(self, entry: AdapterEntry) -> None:
        """Let an adapter be evicted again. Idempotent."""
        if self.pinned.pop(entry.digest, None) is not None:
            entry.pinned = False
            self._has_changed, self._beside_pins = True, None
            if not entry.leases:
                self._evictable_elements += _layout(entry).elements

    def check_invariants(self) -> None:
        """Raise RuntimeError where entries, queue, draining, pins and the pool do not agree."""
        self._pool.check_invariants()
        entries = self._table.entries
        indexes = {
            "on the device": (self.on_device, {d: e for d, e in entries.items() if e.on_device}),
            "waiting for room": ({e.digest: e for e in self._queue}, {d: e for d, e in entries.items() if e.queued}),
            "draining": (self._draining, {d: e for d, e in entries.items() if e.state is DRAINING}),
            "pinned": (self.pinned, {d: e for d, e in entries.items() if e.pinned}),
        }
        for what, (index, found) in indexes.items():
            # `dict.__eq__` of an OrderedDict and a dict does not compare the order; entries compare by identity.
            if index != found:
                raise RuntimeError(f"the adapters {what} are not those whose entries say so")
        placements = [entry.placement for entry in entries.values() if entry.placement is not None]
        if {id(placement) for placement in placements} != {id(placement) for placement in self._pool.placements()}:
            raise RuntimeError("an adapter has room in the pool and is neither on the device nor on its way there")
        evictable = sum(_layout(entry).elements for entry in self.on_device.values() if entry.evictable)
        if evictable != self._evictable_elements:
            raise RuntimeError("the count of evictable elements is wrong")
        if self._pinned_elements() > self._pin_share * self._pool.capacity:
            raise RuntimeError("pinned adapters take more of the pool than they may")
        if self._beside_pins not in (None, self._pool.room_beside(map(_placement, self.pinned.values()))):
            raise RuntimeError("the room beside the pinned adapters is not what was counted")
        if self._draining and (self._favoured is None or not self._favoured.queued):
            raise RuntimeError("adapters drain and none waits for room")
        if any(entry.claims and self._queue.owners(entry) != set(entry.owners()) for entry in self._queue):
            raise RuntimeError("an adapter waits for room in the turn of a tenant that does not wait for it")
        in_use = len(placements) > len(self.on_device) or any(entry.leases for entry in self.on_device.values())
        if not in_use and any(entry.is_awaited() for entry in self._queue):
            raise RuntimeError("an adapter waits for room although nothing is in use")

    def _place(self, entry: AdapterEntry) -> Outcome | None:
        """Take an adapter out of the queue if it need not wait any more."""
        if not entry.is_awaited():
            outcome = Outcome.CANCELLED
        elif entry.grantable:
            outcome = Outcome.ON_DEVICE
        elif self.reserve(entry):
            outcome = Outcome.PLACED
        elif not self._could_fit(_layout(entry)):
            outcome = Outcome.NEVER_FITS
        else:
            return None
        self._leave(entry, is_turn=outcome is Outcome.PLACED)
        return outcome

    def _leave(self, entry: AdapterEntry, is_turn: bool = False) -> None:
        entry.queued_at = None
        self._queue.remove(entry, is_turn)
        if self._favoured is entry:
            self._favoured = None

    def _is_overdue(self, entry: AdapterEntry) -> bool:
        return entry.is_outrun or self._was_bypassed(entry)

    def _was_bypassed(self, entry: AdapterEntry) -> bool:
        """Whether it was bypassed as often or as long as it may be."""
        if entry.queued_at is None:
            return False
        is_often = self._granted.total() - entry.queued_at >= self._max_bypasses
        return is_often or time.monotonic() - entry.queued_since >= self._max_wait_s

    def _could_fit(self, layout: AdapterLayout) -> bool:
        """Whether there would be room if every adapter that is not pinned left."""
        if self._beside_pins is None:
            # Kept: an attempt that asks anew sorts the extents of all pinned adapters.
            self._beside_pins = self._pool.room_beside(map(_placement, self.pinned.values()))
        return len(self.pinned) < self._pool.slots and place(self._beside_pins, layout.chunks) is not None

    def _drain_for(self, overdue: AdapterEntry) -> bool:
        """Drain adapters whose leaving makes room for an overdue one; False if there are too few that may.

        Idle ones drain first, then those of tenants that were served more, then others; of each the least recently
        used. The others drain only for an adapter that was bypassed too often or too long.
        """
        layout, are_all = _layout(overdue), self._was_bypassed(overdue)
        candidates, is_enough = self._first_enough(layout, self._drain_order(overdue, are_all))
        if is_enough:
            fewest = bisect_left(
                range(1, len(candidates)), True, key=lambda count: self._would_fit(layout, candidates[:count])
            )
            candidates = candidates[: fewest + 1]
        elif not are_all:
            # It is set again when a tenant that was served more asks for a lease.
            overdue.is_outrun = False
            overdue.outrun_from = self._granted.total() + len(self.on_device) // _LOOKS_PER_LEASE
            if self._favoured is overdue:
                self._favoured = None
            return False
        for entry in candidates:
            entry.move_to(DRAINING)
            self._draining[entry.digest] = entry
        self._favoured = overdue
        return True

    def _drain_order(self, overdue: AdapterEntry, are_all: bool) -> Iterator[AdapterEntry]:
        """Adapters that may drain for an overdue one, in this order; `are_all` says whether the others may."""
        if self._evictable_elements:
            yield from (entry for entry in self.on_device.values() if entry.evictable)
        # Tenants have many adapters, and are compared once.
        is_ahead = cache(overdue.is_behind)
        others: list[AdapterEntry] = []
        for entry in self.on_device.values():
            if entry.leases and not entry.pinned:
                if all(map(is_ahead, entry.leases)):
                    yield entry
                else:
                    others.append(entry)
        if are_all:
            yield from others

    def _end_draining(self) -> list[AdapterEntry]:
        drained = list(self._draining.values())
        for entry in drained:
            entry.move_to(DELETED if entry.deleted else RESIDENT)
        self._draining.clear()
        return drained

    def _victims(self, layout: AdapterLayout, spare_wanted: bool) -> list[AdapterEntry]:
        """Whom to evict, in this order, until there is room for `layout`; none if that would not give enough."""
        missing = layout.elements - (self._pool.capacity - self._pool.used)
        if missing > self._evictable_elements:
            return []
        entries = self.on_device.values()
        unwanted = (entry for entry in entries if entry.evictable and not entry.wanted)
        latest = () if spare_wanted else reversed(entries)
        wanted = (entry for entry in latest if entry.evictable and entry.wanted)
        victims, is_enough = self._first_enough(layout, chain(unwanted, wanted))
        return victims if is_enough else []

    def _first_enough(self, layout: AdapterLayout, order: Iterable[AdapterEntry]) -> tuple[list[AdapterEntry], bool]:
        """The first of these adapters, at least one, whose leaving makes room, up to twice as many as must leave.

        Returns them and True, or all of them and False where they are too few.
        """
        missing = layout.elements - (self._pool.capacity - self._pool.used)
        chosen: list[AdapterEntry] = []
        # Whether they are enough is asked again each time they have doubled: holes are costly to go through.
        ask_at = 1
        for entry in order:
            chosen.append(entry)
            missing -= _placement(entry).adapter.elements
            if missing <= 0 and len(chosen) >= ask_at:
                if self._would_fit(layout, chosen):
                    return chosen, True
                ask_at = 2 * len(chosen)
        return chosen, missing <= 0 and self._would_fit(layout, chosen)

    def _would_fit(self, layout: AdapterLayout, leaving: Iterable[AdapterEntry]) -> bool:
        return self._pool.would_fit(layout, map(_placement, leaving))

    def _pinned_elements(self) -> int:
        return sum(_layout(entry).elements for entry in self.pinned.values())


def _layout(entry: AdapterEntry) -> AdapterLayout:
    if entry.layout is None:
        raise RuntimeError(f"adapter {entry.digest} was not read yet")
    return entry.layout


def _placement(entry: AdapterEntry) -> Placement:
    if entry.placement is None:
        raise RuntimeError(f"adapter {entry.digest} has no room on the device")
    return entry.placement
