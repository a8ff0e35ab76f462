"""One adapter's entry: where the adapter is, and which requests lease it, wait for it or expect it.

The states of an `AdapterEntry`:

    ABSENT    The adapter is in no memory. The entry exists only while requests wait for room, or hints are held.
    READING   A loader thread reads the adapter from the store, or will. Room on the device may be reserved already.
    ON_HOST   The packed adapter is in the host cache alone. It may wait for room on the device.
    COPYING   Room on the device is reserved. A thread copies the adapter there, or will.
    RESIDENT  The adapter is on the device. Leases are granted at once.
    DRAINING  The adapter is on the device, and no lease is granted: another adapter is overdue, that is, it was
              bypassed in the queue for room as often or as long as it may be, or by a tenant that was served more,
              and gets this adapter's room.
    DELETED   The adapter is on the device for the leases held on it, and its bundle was deleted: it leaves with the
              last lease.

`TRANSITIONS` has the states that may follow each, and docs/architecture.md draws what leads there. A deleted adapter
goes to ON_HOST only where requests still wait for it.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from sera_serve.residency.host_cache import HostCache
from sera_serve.residency.packing import AdapterLayout, PackedAdapter
from sera_serve.residency.pool import Placement
from sera_serve.residency.stats import Tier


class AdapterState(enum.Enum):
    """Where an adapter is; see the top of this file."""

    ABSENT = "absent"
    READING = "reading"
    ON_HOST = "on the host"
    COPYING = "copying"
    RESIDENT = "resident"
    DRAINING = "draining"
    DELETED = "deleted"

    # Members are singletons. The default hash goes through the name, in Python, at each of several look-ups a load.
    __hash__ = object.__hash__


ABSENT, READING, ON_HOST, COPYING, RESIDENT, DRAINING, DELETED = AdapterState
_ON_DEVICE = frozenset({RESIDENT, DRAINING, DELETED})

TRANSITIONS: dict[AdapterState, frozenset[AdapterState]] = {
    ABSENT: frozenset({READING}),
    READING: frozenset({ABSENT, ON_HOST, COPYING}),
    ON_HOST: frozenset({ABSENT, COPYING}),
    COPYING: frozenset({ABSENT, ON_HOST, RESIDENT, DELETED}),
    RESIDENT: frozenset({ABSENT, ON_HOST, DRAINING, DELETED}),
    DRAINING: frozenset({ABSENT, ON_HOST, RESIDENT, DELETED}),
    DELETED: frozenset({ABSENT, DRAINING}),
}
"""The legal transitions: the states that may follow each state."""


class Claim(NamedTuple):
    """For whom an adapter is asked for.

    Attributes:
        tenant: Whose turn it takes, for loads and for room.
        served: What a tenant was served so far, over its share. Only the figures of one function are compared. It is
            called under residency's lock: it takes no lock and is quick.
    """

    tenant: str
    served: Callable[[str], float]

    def is_ahead_of(self, other: Claim) -> bool:
        """Whether this tenant was served more than the other one, as far as the two can be compared."""
        return self.served == other.served and self.served(self.tenant) > self.served(other.tenant)


class Lease:
    """The right to use a resident adapter: while it is held, the adapter neither moves nor leaves the device.

    Attributes:
        placement: Where the adapter is on the device.
        claim: For whom it is held.
        held: The lease was not released yet.
    """

    __slots__ = ("_release", "claim", "entry", "held", "placement")

    def __init__(
        self, entry: AdapterEntry, placement: Placement, claim: Claim | None, release: Callable[[Lease], None]
    ) -> None:
        self.entry = entry
        self.claim = claim
        self.placement = placement
        self.held = True
        self._release = release

    @property
    def slot(self) -> int:
        """Slot of the adapter in the device tables; a batch names the adapter by it."""
        return self.placement.slot

    def release(self) -> None:
        """End the lease. Call it after the last forward pass that uses the slot. Idempotent."""
        self._release(self)


class PrefetchHint:
    """The announcement that a request will want an adapter: the adapter is loaded ahead, and kept where possible.

    Attributes:
        held: The hint was not released yet.
    """

    __slots__ = ("_release", "entry", "held")

    def __init__(self, entry: AdapterEntry, release: Callable[[PrefetchHint], None]) -> None:
        self.entry = entry
        self.held = True
        self._release = release

    def release(self) -> None:
        """Withdraw the hint, because the request has its lease or has ended. Idempotent."""
        self._release(self)


@dataclass(eq=False, slots=True)
class AdapterEntry:
    """One adapter. The caller holds the lock of `AdapterResidency` around every access.

    Attributes:
        digest: Content digest of the bundle.
        in_state: How many entries of the table are in each state; `move_to` keeps it.
        state: Where the adapter is.
        layout: What the packed adapter holds, once it was read.
        load_bytes: The most host memory that a load from the store takes, in bytes, once it was looked up.
        placement: The adapter's room on the device, from the moment that it is reserved.
        waiters: Futures of the requests that wait for a lease, and for whom they wait; some may be cancelled. Only the
            methods below change it.
        claims: How many of them wait for whom.
        leases: How many leases are held for whom.
        hints: Prefetch hints held.
        pinned: The adapter is never evicted.
        deleted: The bundle was deleted. Requests that wait are still served; nothing of the adapter is kept after them.
        queued_at: Leases that had been granted, to any request, when the adapter began to wait for room; None while
            it does not wait.
        queued_since: Seconds, `time.monotonic`, when it began to wait for room.
        is_outrun: A tenant that was served more asked for a lease while the adapter waited for room.
        outrun_from: Leases granted, to any request, before which it is not outrun again.
        readers: Owners of jobs that are to read the adapter, for a request.
        withdrawals: These take the jobs back that are to read the adapter, for a request or a hint.
        read_started: A loader thread has begun to read.
        found_in: Where the present load found the adapter.
        load_seconds: Time that the present load has spent reading.
    """

    digest: str
    in_state: Counter[AdapterState] = field(default_factory=Counter)
    state: AdapterState = ABSENT
    layout: AdapterLayout | None = None
    load_bytes: int | None = None
    placement: Placement | None = None
    waiters: dict[Future[Lease], Claim | None] = field(default_factory=dict)
    claims: Counter[Claim | None] = field(default_factory=Counter)
    leases: Counter[Claim | None] = field(default_factory=Counter)
    hints: int = 0
    pinned: bool = False
    deleted: bool = False
    queued_at: int | None = None
    queued_since: float = 0.0
    is_outrun: bool = False
    outrun_from: int = 0
    readers: set[str | None] = field(default_factory=set)
    withdrawals: list[Callable[[], None]] = field(default_factory=list)
    read_started: bool = False
    found_in: Tier | None = None
    load_seconds: float = 0.0

    def move_to(self, state: AdapterState) -> None:
        """Change the state; raises RuntimeError where `TRANSITIONS` does not have the edge."""
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"adapter {self.digest} cannot go from {self.state.value!r} to {state.value!r}")
        self.in_state[self.state] -= 1
        self.in_state[state] += 1
        self.state = state

    @property
    def on_device(self) -> bool:
        """Whether the device has the whole adapter."""
        return self.state in _ON_DEVICE

    @property
    def grantable(self) -> bool:
        """Whether a lease may be granted now."""
        return self.state is RESIDENT or self.state is DELETED

    @property
    def evictable(self) -> bool:
        """Whether the adapter is on the device and may leave it now."""
        return not self.leases and not self.pinned and self.state in _ON_DEVICE

    @property
    def queued(self) -> bool:
        """Whether the adapter waits for room on the device."""
        return self.queued_at is not None

    @property
    def loading(self) -> bool:
        """Whether the adapter is on its way to the device; waiting for room counts."""
        return self.state is READING or self.state is COPYING or self.queued_at is not None

    @property
    def wanted(self) -> bool:
        """Whether a request waits for the adapter or has announced itself: it is then dropped and evicted last."""
        return self.hints > 0 or self.loading

    def is_awaited(self) -> bool:
        """Whether a request waits that was not cancelled."""
        return any(not future.cancelled() for future in self.waiters)

    def owners(self) -> list[str | None]:
        """The tenants whose turns the adapter takes: each that waits for it, the first one first."""
        return list(dict.fromkeys(None if claim is None else claim.tenant for claim in self.claims))

    def is_behind(self, claim: Claim | None) -> bool:
        """Whether the tenant of `claim` was served more than one that waits for the adapter."""
        return claim is not None and any(waiting is not None and claim.is_ahead_of(waiting) for waiting in self.claims)

    def add_waiter(self, future: Future[Lease], claim: Claim | None) -> None:
        """Have a future wait for a lease."""
        self.waiters[future] = claim
        self.claims[claim] += 1

    def drop_waiter(self, future: Future[Lease]) -> None:
        """Forget a future that was cancelled, if it still waits here."""
        if future in self.waiters:
            claim = self.waiters.pop(future)
            self.claims[claim] -= 1
            if not self.claims[claim]:
                del self.claims[claim]

    def take_waiters(self) -> list[tuple[Future[Lease], Claim | None]]:
        """Take off the waiting futures, without the cancelled ones. None of them can be cancelled any more."""
        waiters, self.waiters = self.waiters, {}
        self.claims.clear()
        return [(future, claim) for future, claim in waiters.items() if future.set_running_or_notify_cancel()]

    def start_reading(self) -> None:
        """Have the calling thread alone read the adapter."""
        self.read_started = True
        self.withdraw_reads()

    def withdraw_reads(self) -> None:
        """Take back the jobs that were to read the adapter: large ones that wait for memory hold up others."""
        while self.withdrawals:
            self.withdrawals.pop()()

    def check_invariants(self) -> None:
        """Raise RuntimeError where the fields contradict the state."""
        for what in self._faults():
            raise RuntimeError(f"adapter {self.digest}, {self.state.value}: {what}")

    def _faults(self) -> Iterator[str]:
        on_device = self.on_device
        placed = on_device or self.state is COPYING
        has_room = self.placement is not None
        if (self.leases and min(self.leases.values()) < 1) or self.hints < 0:
            yield "a lease or a hint was released twice"
        if (self.waiters or self.claims) and Counter(self.waiters.values()) != self.claims:
            yield "its requests wait for others"
        if self.leases and not on_device:
            yield "it is leased and not on the device"
        if placed and not has_room:
            yield "it has no room on the device"
        if has_room and not placed and self.state is not READING:
            yield "it has room that it does not need"
        if self.placement is not None and self.placement.adapter.digest != self.digest:
            yield "it has the room of another adapter"
        if self.waiters and not self.loading:
            yield "requests wait for it, and it is not loaded"
        if self.queued and (self.grantable or self.state in (READING, COPYING)):
            yield "it waits for room that it has"
        if self.pinned and not on_device:
            yield "it is pinned and not on the device"
        if self.pinned and self.deleted:
            yield "it is pinned and deleted"
        if self.deleted and self.state is RESIDENT:
            yield "it is deleted and not in the state for it"
        if not self.deleted and self.state is DELETED:
            yield "it is in the state for deleted ones"
        if self.deleted and not self.leases and not self.loading:
            yield "it is deleted and was kept"
        if self.state is ABSENT and not self.queued and not self.hints:
            yield "nothing needs its entry"


class AdapterTable:
    """The entries by digest, and the host cache. The caller holds the lock of `AdapterResidency`.

    An entry is here while its adapter is anywhere but absent, waits for room, or has hints.

    Attributes:
        entries: The entries by digest.
        host_cache: The packed adapters in host memory.
        in_state: How many entries are in each state.
    """

    def __init__(self, host_cache: HostCache) -> None:
        """Begin without entries; `host_cache` is empty and owned by this object."""
        self.entries: dict[str, AdapterEntry] = {}
        self.host_cache = host_cache
        self.in_state: Counter[AdapterState] = Counter()

    def open(self, digest: str) -> AdapterEntry:
        """The adapter's entry; a new one, ABSENT, if there is none."""
        entry = self.entries.get(digest)
        if entry is None:
            entry = self.entries[digest] = AdapterEntry(digest, self.in_state)
            self.in_state[ABSENT] += 1
        return entry

    def keep(self, packed: PackedAdapter) -> None:
        """Put an adapter into the host cache, if the cache has room for it beside the wanted ones."""
        for digest in self.host_cache.put(packed, self.is_wanted):
            if self.entries[digest].state is ON_HOST:
                self.settle(self.entries[digest])

    def settle(self, entry: AdapterEntry) -> None:
        """Put an adapter that is neither on the device nor being loaded into ON_HOST or ABSENT.

        An adapter that waits for room keeps its waiters, and its data if the host cache has it. Of any other one
        nothing is left but what the host cache has, and nothing at all where the bundle was deleted.
        """
        if not entry.queued:
            entry.take_waiters()
            entry.found_in, entry.load_seconds = None, 0.0
            if entry.deleted:
                self.host_cache.drop(entry.digest)
                entry.deleted = False
        entry.read_started = False
        entry.readers.clear()
        state = ON_HOST if entry.digest in self.host_cache else ABSENT
        if entry.state is not state:
            entry.move_to(state)
        self.close_if_unused(entry)

    def close_if_unused(self, entry: AdapterEntry) -> None:
        """Take the entry out of the table if nothing needs it."""
        if entry.state is ABSENT and not entry.queued and not entry.hints:
            del self.entries[entry.digest]
            self.in_state[ABSENT] -= 1

    def is_wanted(self, digest: str) -> bool:
        """Whether a request waits for an adapter or has announced itself."""
        return self.entries[digest].wanted

    def check_invariants(self) -> None:
        """Raise RuntimeError where entries contradict themselves, the host cache or the counts."""
        self.host_cache.check_invariants()
        for digest, entry in self.entries.items():
            entry.check_invariants()
            cached = digest in self.host_cache
            if digest != entry.digest or (entry.state is ON_HOST and not cached) or (entry.state is ABSENT and cached):
                raise RuntimeError(f"adapter {digest}, {entry.state.value}: the host cache says otherwise")
            if cached and entry.deleted and not entry.loading:
                raise RuntimeError(f"deleted adapter {digest} is still in the host cache")
        if not self.host_cache.digests() <= self.entries.keys():
            raise RuntimeError("an adapter is in the host cache and has no entry")
        if +self.in_state != Counter(entry.state for entry in self.entries.values()):
            raise RuntimeError("the count of entries by state is wrong")
