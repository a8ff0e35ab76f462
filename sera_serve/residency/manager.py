"""Adapter residency: leases on adapters in device memory, loads beside decoding, least-recently-used eviction.

Lock discipline. There is one lock, `AdapterResidency._lock`, and only this file takes it.

- It guards everything that changes: the entries, the host cache, the placement queue, the counts, and the pool's free
  room. `AdapterTable`, `HostCache`, `PlacementQueue` and `DevicePool` have no lock of their own.
- The public methods, the two jobs (`_read`, `_copy`) and the releases of handles take it. The caller must not hold it.
- The methods whose names end in `_locked` need it held.
- It is held neither while the store is read nor while an adapter is copied to the device: a thread that does so owns
  the entry in state READING or COPYING, and only that thread moves the entry on.
- No future is settled under it, because that runs callbacks of others: what was decided goes to the `CompletionQueue`,
  and whoever held the lock settles what is there afterwards.
- Under it only the lock inside `LoaderThreads` is taken, and the one inside a future.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import torch

from sera_serve.errors import AdapterTooLarge, EngineUnavailable
from sera_serve.residency.completions import CompletionQueue
from sera_serve.residency.entry import (
    ABSENT,
    COPYING,
    ON_HOST,
    READING,
    AdapterEntry,
    AdapterTable,
    Claim,
    Lease,
    PrefetchHint,
)
from sera_serve.residency.host_cache import HostCache
from sera_serve.residency.loader import AdapterLoader, LoaderThreads, Loading, LoadSize
from sera_serve.residency.packing import PackedAdapter
from sera_serve.residency.placement import Outcome, PlacementQueue
from sera_serve.residency.pool import DevicePool
from sera_serve.residency.stats import LoadCounts, Presence, ResidencyStats, Tier

# Priorities of jobs: adapters that have room on the device, then those that requests wait for, then hints.
_HAS_ROOM, _AWAITED, _HINTED = range(3)
# Host memory that large loads may always take side by side, bytes: without a host cache, some must still run at once.
_LEAST_LOAD_BYTES = 64 << 20


class AdapterResidency:
    """Moves adapters store -> host cache -> device pool on demand, and evicts them when others need the room.

    Every public method but `close` may be called from any thread and returns at once: loader threads read and copy, so
    that a request waits for its own adapter only. (On a CPU the caller itself copies a small adapter from the host
    cache, which is quicker than to wake a thread.) Adapters that find no room wait in a queue. Tenants take
    turns there. Others may bypass an adapter until `max_bypasses` leases have been granted since it came, it has waited
    for `max_wait_s`, or a tenant that was served more asks for a lease. Then nothing bypasses it, and adapters on the
    device drain until it fits.

    Loads take turns by tenant. Host memory is the host cache, and what the loader threads hold at the moment: each of
    large and of small loads as much as the host cache may, and at least `_LEAST_LOAD_BYTES`, or a single larger load.
    """

    def __init__(
        self,
        loading: Loading,
        pool: DevicePool,
        host_cache: HostCache,
        module_index: Mapping[str, int],
        loader_threads: LoaderThreads | None = None,
        max_bypasses: int = 64,
        pin_share: float = 0.5,
        size_of: Callable[[str], LoadSize] | None = None,
        max_wait_s: float = 6.0,
    ) -> None:
        """Start with an empty pool.

        Args:
            loading: Reads a bundle.
            pool: Device memory; owned by this object from now on.
            host_cache: Host memory; owned likewise.
            module_index: Row of each adaptable module in the pool's tables.
            loader_threads: The threads to load with, owned likewise; two loads at once if None.
            max_bypasses: Leases that may be granted while an adapter waits for room, before nothing bypasses it.
            pin_share: The part of the pool's bytes, and of its slots, that pinned adapters may take.
            size_of: What `loading` takes for a bundle, without reading its tensors; raises what `loading` raises.
                Without it, every load counts as small.
            max_wait_s: Seconds for which others may bypass an adapter that waits for room.
        """
        self.pool = pool
        self.host_cache = host_cache
        self._lock = threading.Lock()
        self._table = AdapterTable(host_cache)
        self._counts = LoadCounts()
        self._placement = PlacementQueue(pool, self._table, self._counts.granted, max_bypasses, pin_share, max_wait_s)
        self._completions = CompletionQueue()
        self._loader = AdapterLoader(loading, module_index, pool, size_of)
        self._threads = loader_threads or LoaderThreads(at_once=2, max_bytes=max(_LEAST_LOAD_BYTES, host_cache.limit))
        # Something has happened since the last idle check.
        self._unchecked = False
        self._closed = False

    # What requests ask for.

    def acquire(self, digest: str, claim: Claim | None = None) -> Future[Lease]:
        """Lease an adapter once it is on the device. Concurrent calls for one adapter share one load.

        Args:
            digest: Digest of the adapter.
            claim: For whom; all that ask without one share a turn, and are behind nobody.

        Returns:
            The future lease; to cancel it before it is done ends the wait. It raises AdapterTooLarge where the adapter
            is larger than the whole pool or than what pinned adapters leave of it, EngineUnavailable where residency
            is closed, and whatever `loading` raised.
        """
        future: Future[Lease] = Future()
        lease = packed = None
        with self._lock:
            self._unchecked = True
            if self._closed:
                future.set_exception(_closed())
                return future
            if self._placement.must_drain(claim):
                self._place_waiting_locked()
            entry = self._table.open(digest)
            if entry.grantable:
                lease = self._lease_locked(entry, "device", claim)
            else:
                packed = self._request_locked(entry, future, claim)
        if lease is not None:
            # Settled directly: nobody else has this future yet.
            future.set_result(lease)
        elif packed is not None:
            self._copy(entry, packed, is_retried=True)
        self._completions.settle()
        if not future.done():
            future.add_done_callback(partial(self._after_cancel, entry))
        return future

    def prefetch(self, digest: str, claim: Claim | None = None) -> PrefetchHint:
        """Begin to load an adapter for a request that is not admitted yet; its `acquire` is told of a failure.

        The adapter goes to the host cache. It goes to the device if no request waits for room there and nothing that
        is leased, pinned or wanted by another request has to leave for it. While the hint is held, no other load
        drops the adapter from the host cache, no other prefetch evicts it from the device, and the adapters of other
        requests evict it last.
        """
        with self._lock:
            self._unchecked = True
            entry = self._table.open(digest)
            entry.hints += 1
            if not self._closed and not entry.queued:
                if entry.state is ABSENT:
                    self._read_on_thread_locked(entry, _HINTED, None if claim is None else claim.tenant)
                elif entry.state is ON_HOST and self._reserve_hinted_locked(entry):
                    self._threads.submit(_HAS_ROOM, partial(self._copy, entry))
        return PrefetchHint(entry, self._release_hint)

    # What operators ask for.

    def pin(self, digest: str) -> Future[None]:
        """Load an adapter to the device and keep it there until `unpin` or `mark_deleted`. Idempotent.

        The future raises CannotPin where pinned adapters would take too much of the pool, and whatever `acquire` does.
        A future that is cancelled before it is done pins nothing.
        """
        result: Future[None] = Future()

        def pin_leased(leased: Future[Lease]) -> None:
            if not result.set_running_or_notify_cancel():
                if not leased.cancelled() and leased.exception() is None:
                    leased.result().release()
                return
            try:
                lease = leased.result()
                try:
                    with self._lock:
                        self._placement.pin(lease.entry)
                finally:
                    lease.release()
            except Exception as error:  # noqa: BLE001 - it is delivered to the caller, who holds the future
                result.set_exception(error)
            else:
                result.set_result(None)

        self.acquire(digest).add_done_callback(pin_leased)
        return result

    def unpin(self, digest: str) -> None:
        """Let an adapter be evicted again. Idempotent."""
        with self._lock:
            entry = self._table.entries.get(digest)
            if entry is not None:
                self._placement.unpin(entry)
            self._place_waiting_locked()
        self._completions.settle()

    def mark_deleted(self, digest: str) -> None:
        """Give back the memory of an adapter whose bundle was deleted: the host's now, the device's after its leases.

        Requests that wait for the adapter already are still served.
        """
        with self._lock:
            self._unchecked = True
            entry = self._table.entries.get(digest)
            if entry is not None:
                if entry.on_device:
                    self._placement.mark_deleted(entry)
                else:
                    entry.deleted = True
                    if not entry.loading:
                        self._table.settle(entry)
            self._place_waiting_locked()
        self._completions.settle()

    def digests(self) -> list[str]:
        """Digests of the adapters that are anywhere in memory, or on their way there."""
        with self._lock:
            return list(self._table.entries)

    def resident_digests(self) -> list[str]:
        """Digests of the adapters on the device, least recently used first."""
        with self._lock:
            return list(self._placement.on_device)

    def ready_and_wanted(self) -> tuple[list[str], list[str]]:
        """Digests of adapters whose leases are granted at once, those used last first, and of those waited for."""
        with self._lock:
            ready = [digest for digest, entry in self._placement.on_device.items() if entry.grantable]
            wanted = [entry.digest for entry in self._table.entries.values() if entry.wanted and not entry.grantable]
        return ready[::-1], wanted

    def pinned_digests(self) -> list[str]:
        """Digests of the pinned adapters."""
        with self._lock:
            return sorted(self._placement.pinned)

    def presence(self, digests: Sequence[str]) -> list[Presence]:
        """Where each of these adapters is now. What is not in memory is taken to be in the store."""
        with self._lock:
            on_device, pinned, on_host = self._placement.on_device, self._placement.pinned, self.host_cache
            return [
                Presence(
                    "device" if digest in on_device else "host" if digest in on_host else "store", digest in pinned
                )
                for digest in digests
            ]

    def leases(self) -> int:
        """How many leases are held."""
        with self._lock:
            return self._leases_locked()

    def stats(self) -> ResidencyStats:
        """Figures for metrics."""
        with self._lock:
            itemsize = self.pool.data.element_size()
            return ResidencyStats(
                resident=len(self._placement.on_device),
                pinned=len(self._placement.pinned),
                leases=self._leases_locked(),
                loading=self._loading_locked(),
                waiting=len(self._placement),
                device_bytes=self.pool.used * itemsize,
                device_limit=self.pool.capacity * itemsize,
                host_bytes=self.host_cache.used,
                host_limit=self.host_cache.limit,
                granted={tier: self._counts.granted[tier] for tier in ("device", "host", "store")},
                loads=dict(self._counts.times),
                failed_loads=dict(self._counts.failed),
                evictions=self._placement.evictions,
                copies=self.pool.copies,
            )

    def idle_check(self) -> bool:
        """Check the invariants if nothing is leased or loading and something has happened since the last check.

        Engines call it when they have nothing to do. Returns whether it checked; raises as `check_invariants`. Where
        the device has no memory for the check, the next call checks.
        """
        with self._lock:
            if not self._unchecked or self._loading_locked() or self._leases_locked():
                return False
            self._unchecked = False
        try:
            self.check_invariants()
        except torch.OutOfMemoryError:
            # A RuntimeError, which says nothing about the adapters.
            self._unchecked = True
            return False
        return True

    def check_invariants(self) -> None:
        """Raise RuntimeError where entries, host cache, queue, leases, pins, pool and tables do not agree."""
        with self._lock:
            self._table.check_invariants()
            self._placement.check_invariants()

    def close(self, timeout_s: float = 5.0) -> None:
        """Refuse waiting and coming requests with EngineUnavailable, and stop the loader threads.

        A load that takes longer than `timeout_s` goes on alone, and its result is dropped.
        """
        with self._lock:
            self._closed = True
            for entry in list(self._table.entries.values()):
                self._refuse_locked(entry, _closed())
                # No thread has begun with this one, and none will.
                if entry.state is READING and not entry.read_started:
                    self._placement.free(entry)
            for entry in self._placement.clear():
                self._left_queue_locked(entry)
        self._completions.settle()
        self._threads.close(timeout_s)

    # The two jobs: loader threads run them, or the thread that asks for a small adapter.

    def _read(self, entry: AdapterEntry, priority: int, owner: str | None, is_sized: bool) -> None:
        """Read an adapter from the store, and copy it to the device if it finds room at once.

        A large one is submitted again, with its size, which is looked up first. `is_sized` says that this was done, so
        that the loader threads count its memory; `priority` and `owner` are as of `LoaderThreads.submit`.
        """
        with self._lock:
            # An adapter that was only hinted, or that several tenants ask for, is submitted more than once.
            if entry.state is not READING or entry.read_started:
                return
            is_worth_it = self._is_worth_reading_locked(entry)
            if is_worth_it and is_sized:
                entry.start_reading()
            elif not is_worth_it:
                self._give_up_reading_locked(entry)
        if not is_worth_it:
            self._completions.settle()
            return
        began = time.monotonic()
        try:
            if not is_sized and not self._begin_sized(entry, priority, owner):
                return
            packed = self._loader.read(entry.digest)
        except Exception as error:  # noqa: BLE001 - it is delivered to every request that waits for this load
            self._fail(entry, error)
            return
        with self._lock:
            entry.load_seconds += time.monotonic() - began
            entry.found_in = entry.found_in or "store"
            self._after_read_locked(entry, packed)
            has_room = entry.state is COPYING
        if has_room:
            self._copy(entry, packed)
        else:
            self._completions.settle()

    def _begin_sized(self, entry: AdapterEntry, priority: int, owner: str | None) -> bool:
        """Look the size of a load up, and begin to read if it is small. Raises what the look-up raised."""
        with self._lock:
            # Another job may have looked it up since this one was submitted.
            nbytes = entry.load_bytes
        try:
            if nbytes is None:
                nbytes = self._loader.load_bytes(entry.digest)
        except Exception:
            with self._lock:
                if entry.state is not READING or entry.read_started:
                    return False
                entry.start_reading()
            raise
        with self._lock:
            if entry.state is not READING or entry.read_started:
                return False
            entry.load_bytes = nbytes
            if nbytes > self._threads.small_bytes:
                self._read_on_thread_locked(entry, priority, owner)
                return False
            entry.start_reading()
            return True

    def _copy(self, entry: AdapterEntry, packed: PackedAdapter | None = None, is_retried: bool = False) -> None:
        """Copy an adapter to the room reserved for it, and grant the leases on it.

        Args:
            entry: In state COPYING, owned by the calling thread.
            packed: The adapter's data; None takes it from the host cache, which never drops a wanted adapter.
            is_retried: Have a loader thread try again if this fails.
        """
        began = time.monotonic()
        try:
            if packed is None:
                with self._lock:
                    packed = self.host_cache.get(entry.digest)
            if packed is None or entry.placement is None:
                raise RuntimeError(f"adapter {entry.digest} is to be copied without data or without room")
            self.pool.fill(entry.placement, packed.data)
        except Exception as error:  # noqa: BLE001 - it is delivered to every request that waits for this load
            if is_retried:
                self._threads.submit(_HAS_ROOM, partial(self._copy, entry))
            else:
                self._fail(entry, error)
            return
        with self._lock:
            tier: Tier = entry.found_in or "host"
            self._counts.add_load(tier, entry.load_seconds + time.monotonic() - began)
            self._placement.arrive(entry)
            self._grant_locked(entry, tier)
            if entry.deleted:
                self._placement.mark_deleted(entry)
            self._place_waiting_locked()
        self._completions.settle()

    def _fail(self, entry: AdapterEntry, error: Exception) -> None:
        """End a load that failed, and tell every request that waits for it."""
        with self._lock:
            # What was only hinted is loaded again when a request asks for it, and is counted then.
            if entry.is_awaited():
                self._counts.add_failure(error)
            self._refuse_locked(entry, error)
            self._placement.free(entry)
            self._place_waiting_locked()
        self._completions.settle()

    # What handles and futures call.

    def _release_lease(self, lease: Lease) -> None:
        with self._lock:
            if not lease.held:
                return
            lease.held = False
            self._placement.end_lease(lease.entry, lease.claim)
            self._place_waiting_locked()
        self._completions.settle()

    def _release_hint(self, hint: PrefetchHint) -> None:
        with self._lock:
            if hint.held:
                hint.held = False
                hint.entry.hints -= 1
                self._table.close_if_unused(hint.entry)
                self._give_up_unwanted_locked(hint.entry)
        self._completions.settle()

    def _after_cancel(self, entry: AdapterEntry, future: Future[Lease]) -> None:
        """Serve the others in the queue: a request that was cancelled may have stood before them."""
        if future.cancelled():
            with self._lock:
                entry.drop_waiter(future)
                self._placement.leave_turns(entry)
                self._give_up_unwanted_locked(entry)
                self._place_waiting_locked()
            self._completions.settle()

    # The lock is held.

    def _request_locked(self, entry: AdapterEntry, future: Future[Lease], claim: Claim | None) -> PackedAdapter | None:
        """Have a future wait for a lease. Returns the data if the caller itself has to copy the adapter."""
        entry.add_waiter(future, claim)
        owner = None if claim is None else claim.tenant
        if entry.queued or entry.on_device:
            # It waits for room, from now on in this owner's turn too. Or it drains: its room is promised to another.
            self._placement.join(entry)
        elif entry.state is ABSENT:
            self._read_on_thread_locked(entry, _AWAITED, owner)
        elif entry.state is READING and not entry.read_started and owner not in entry.readers:
            # It was only hinted, or has the turn of another tenant, which may have many loads before it.
            self._read_on_thread_locked(entry, _AWAITED, owner)
        elif entry.state is ON_HOST:
            packed = self.host_cache.get(entry.digest)
            # Nobody is bypassed on the way.
            is_at_once = packed is not None and not len(self._placement) and self.pool.fills_at_once(packed)
            self._join_locked(entry, is_at_once)
            if is_at_once and entry.state is COPYING:
                return packed
        return None

    def _join_locked(self, entry: AdapterEntry, is_copied_here: bool) -> None:
        """Have an adapter wait for room, unless it finds some at once; by choice the caller then copies it itself."""
        self._placement.join(entry)
        self._take_up_locked(self._placement.place_last(entry), entry if is_copied_here else None)

    def _place_waiting_locked(self) -> None:
        """Find room for adapters in the queue; called whenever there may be some."""
        if len(self._placement):
            self._take_up_locked(self._placement.place_waiting())

    def _take_up_locked(self, placed: Iterable[tuple[AdapterEntry, Outcome]], own: AdapterEntry | None = None) -> None:
        """Go on with adapters that left the queue. The caller itself copies `own`; loader threads load the others."""
        for entry, outcome in placed:
            if outcome is not Outcome.PLACED:
                if outcome is Outcome.ON_DEVICE:
                    self._grant_locked(entry, "device")
                elif outcome is Outcome.NEVER_FITS:
                    self._refuse_locked(entry, _never_fits())
                self._left_queue_locked(entry)
            elif entry.state is ABSENT:
                for owner in entry.owners():
                    self._read_on_thread_locked(entry, _HAS_ROOM, owner)
            else:
                entry.move_to(COPYING)
                if entry is not own:
                    self._threads.submit(_HAS_ROOM, partial(self._copy, entry))

    def _read_on_thread_locked(self, entry: AdapterEntry, priority: int, owner: str | None) -> None:
        """Have a loader thread read an adapter, in its owner's turn; once for each owner that waits for it."""
        if entry.state is ABSENT:
            entry.move_to(READING)
        if priority != _HINTED:
            entry.readers.add(owner)
        job = partial(self._read, entry, priority, owner, entry.load_bytes is not None)
        submitted = self._threads.submit(priority, job, owner, entry.load_bytes or 0)
        entry.withdrawals.append(partial(self._threads.withdraw, submitted))

    def _give_up_reading_locked(self, entry: AdapterEntry) -> None:
        """End a load that no thread has begun to read; it may have room already, which others wait for."""
        entry.withdraw_reads()
        self._placement.free(entry)
        self._place_waiting_locked()

    def _give_up_unwanted_locked(self, entry: AdapterEntry) -> None:
        """Do so where no request wants the adapter any more."""
        if entry.state is READING and not (entry.read_started or entry.hints or entry.is_awaited()):
            self._give_up_reading_locked(entry)

    def _left_queue_locked(self, entry: AdapterEntry) -> None:
        """End the wait of an adapter that got no room."""
        if not entry.on_device:
            self._table.settle(entry)
            return
        entry.take_waiters()
        if entry.deleted:
            self._placement.mark_deleted(entry)

    def _after_read_locked(self, entry: AdapterEntry, packed: PackedAdapter) -> None:
        """Bring an adapter that was read to COPYING, to the queue, or no further than the host cache."""
        entry.layout = packed.layout
        if entry.placement is not None:
            # Its room was found before its data was read again.
            entry.move_to(COPYING)
            return
        if not self._closed:
            self._table.keep(packed)
            if entry.is_awaited():
                self._join_locked(entry, is_copied_here=True)
            else:
                self._reserve_hinted_locked(entry)
        if entry.state is READING:
            self._table.settle(entry)

    def _reserve_hinted_locked(self, entry: AdapterEntry) -> bool:
        """Reserve room for an adapter that only hints want, if there is room to spare; it is COPYING then."""
        if not entry.hints or entry.deleted or len(self._placement):
            return False
        if not self._placement.reserve(entry, spare_wanted=True):
            return False
        entry.move_to(COPYING)
        return True

    def _is_worth_reading_locked(self, entry: AdapterEntry) -> bool:
        """Whether a request waits for the adapter, or a hint wants it and it could be kept."""
        if entry.is_awaited():
            return True
        if not entry.hints or entry.deleted:
            return False
        has_spare_room = not len(self._placement) and self._placement.has_spare_room()
        return has_spare_room or self.host_cache.has_room(self._table.is_wanted)

    def _grant_locked(self, entry: AdapterEntry, tier: Tier) -> None:
        for future, claim in entry.take_waiters():
            self._completions.add(future, self._lease_locked(entry, tier, claim))

    def _lease_locked(self, entry: AdapterEntry, tier: Tier, claim: Claim | None) -> Lease:
        self._counts.granted[tier] += 1
        return Lease(entry, self._placement.add_lease(entry, claim), claim, self._release_lease)

    def _refuse_locked(self, entry: AdapterEntry, error: Exception) -> None:
        for future, _ in entry.take_waiters():
            self._completions.add(future, error)

    def _leases_locked(self) -> int:
        return sum(entry.leases.total() for entry in self._placement.on_device.values())

    def _loading_locked(self) -> int:
        return self._table.in_state[READING] + self._table.in_state[COPYING] + len(self._placement)


def _closed() -> EngineUnavailable:
    return EngineUnavailable("the server is shutting down; send the request again when it is back")


def _never_fits() -> AdapterTooLarge:
    return AdapterTooLarge(
        "the adapter does not fit beside the pinned ones; unpin some, or raise pool_mib", param="adapter"
    )
