"""Which adapters are where: leases on the device pool, loads beside decoding, least-recently-used eviction."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from adapters_store import AdapterBundle
from sera_serve.errors import AdapterTooLarge
from sera_serve.residency.host_cache import HostCache
from sera_serve.residency.packing import PackedAdapter, pack
from sera_serve.residency.pool import DevicePool, Placement


class Lease:
    """The right to use a resident adapter: while it is held, the adapter neither moves nor leaves the device."""

    def __init__(self, placement: Placement, release: Callable[[str], None]) -> None:
        self.placement = placement
        self._release: Callable[[str], None] | None = release

    @property
    def slot(self) -> int:
        """Slot that a batch names the adapter by."""
        return self.placement.slot

    def release(self) -> None:
        """Give the right back; only after no forward pass will use the slot for this lease. Idempotent."""
        release, self._release = self._release, None
        if release is not None:
            release(self.placement.adapter.digest)


@dataclass
class _Resident:
    placement: Placement
    leases: int = 0
    doomed: bool = False


class AdapterResidency:
    """Moves adapters store -> host cache -> device pool on demand, and back out when others need the room.

    Every public method may be called from any thread and returns at once: reading and copying are done by loader
    threads, so a request waits for its own adapter only.
    """

    def __init__(
        self,
        load: Callable[[str], AdapterBundle],
        pool: DevicePool,
        host_cache: HostCache,
        module_index: Mapping[str, int],
        loader_threads: int = 2,
    ) -> None:
        """Start with an empty pool.

        Args:
            load: Reads a bundle by digest and raises a typed error where it cannot be had or does not fit the base.
            pool: Device memory; owned by this object from now on.
            host_cache: Host memory; likewise.
            module_index: Row of each adaptable module in the pool's tables.
            loader_threads: How many loads run at once.
        """
        self.pool = pool
        self.host_cache = host_cache
        self._load_bundle = load
        self._module_index = dict(module_index)
        # Re-entrant: granting a lease may run a callback that releases it at once.
        self._lock = threading.RLock()
        # Least recently used first.
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        self._waiters: dict[str, list[Future[Lease]]] = {}
        self._without_room: deque[PackedAdapter] = deque()
        # Calls of _place_waiting that are queued or running: while there are any, waiting adapters will be looked at.
        self._placers = 0
        self._closed = False
        # One CPU thread each: a pool of OpenMP threads for every loader would end the spinning of the engine's own pool,
        # which waits for little else between two layers (measured: forward passes of half the speed).
        self._loaders = ThreadPoolExecutor(
            loader_threads, "adapter-loader", initializer=torch.set_num_threads, initargs=(1,)
        )

    async def lease(self, digest: str) -> Lease:
        """Wait until the adapter is on the device, and hold it there. Cancelling the wait leaves nothing held.

        Raises:
            AdapterTooLarge: It is larger than the whole pool.
            Exception: Whatever `load` raised.
        """
        future = self.acquire(digest)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            # The lease may have been granted just before; it must not outlive the request.
            future.add_done_callback(_release_if_granted)
            raise

    def acquire(self, digest: str) -> Future[Lease]:
        """`lease` for threads without an event loop. Concurrent calls for one adapter share one load."""
        future: Future[Lease] = Future()
        with self._lock:
            resident = self._residents.get(digest)
            if resident is not None:
                resident.doomed = False
                self._grant(resident, future)
            elif digest in self._waiters:
                self._waiters[digest].append(future)
            else:
                self._waiters[digest] = [future]
                self._loaders.submit(self._load, digest)
        return future

    def forget(self, digest: str) -> None:
        """Give back the memory of an adapter that was deleted: the host's now, the device's after its last lease."""
        with self._lock:
            self.host_cache.drop(digest)
            resident = self._residents.get(digest)
            if resident is not None:
                resident.doomed = True
                self._evict_if_doomed(digest)
                self._retry_waiting()

    def resident_digests(self) -> list[str]:
        """Digests of the adapters on the device, least recently used first."""
        with self._lock:
            return list(self._residents)

    def leases(self) -> int:
        """How many leases are held."""
        with self._lock:
            return sum(resident.leases for resident in self._residents.values())

    def check_integrity(self) -> None:
        """Raise RuntimeError where the books do not balance: pool, host cache, leases."""
        with self._lock:
            self.pool.check_integrity()
            self.host_cache.check_integrity()
            if any(resident.leases < 0 for resident in self._residents.values()):
                raise RuntimeError("a lease was released twice")
            if any(resident.doomed and not resident.leases for resident in self._residents.values()):
                raise RuntimeError("a deleted adapter is still on the device")
            held = any(resident.leases for resident in self._residents.values())
            if self._without_room and not held and not self._placers:
                raise RuntimeError("an adapter waits for room although nothing is in use")

    def close(self) -> None:
        """Stop the loader threads; waiting requests are cancelled."""
        self._closed = True
        self._loaders.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            waiters, self._waiters = self._waiters, {}
        for futures in waiters.values():
            for future in futures:
                future.cancel()

    def _load(self, digest: str) -> None:
        try:
            with self._lock:
                packed = self.host_cache.get(digest)
            if packed is None:
                pinned = self.pool.data.is_cuda
                packed = pack(self._load_bundle(digest), self._module_index, self.pool.data.dtype, pinned)
            if packed.data.numel() > self.pool.capacity:
                pool_bytes = self.pool.capacity * self.pool.data.element_size()
                raise AdapterTooLarge(
                    f"the adapter takes {packed.nbytes} bytes, the device pool has {pool_bytes}; raise pool_mib",
                    param="adapter",
                )
        except Exception as error:  # noqa: BLE001 - it is delivered to every request that waits for this load
            with self._lock:
                futures = self._waiters.pop(digest, [])
            for future in futures:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            return
        with self._lock:
            self.host_cache.put(packed)
            self._without_room.append(packed)
            self._placers += 1
        self._place_waiting()

    def _place_waiting(self) -> None:
        """Place loaded adapters in the order they came, until the next one finds no room."""
        while True:
            with self._lock:
                if not self._without_room:
                    self._placers -= 1
                    return
                packed = self._without_room[0]
                if all(future.cancelled() for future in self._waiters[packed.digest]):
                    self._without_room.popleft()
                    del self._waiters[packed.digest]
                    continue
                placement = self._make_room(packed)
                if placement is None:
                    self._placers -= 1
                    return
                self._without_room.popleft()
            self.pool.fill(placement)
            with self._lock:
                resident = _Resident(placement)
                self._residents[packed.digest] = resident
                for future in self._waiters.pop(packed.digest, []):
                    self._grant(resident, future)

    def _make_room(self, packed: PackedAdapter) -> Placement | None:
        """Reserve room, evicting adapters that nobody holds, least recently used first. Lock held."""
        while (placement := self.pool.reserve(packed)) is None:
            victim = next((digest for digest, resident in self._residents.items() if not resident.leases), None)
            if victim is None:
                return None
            self.pool.remove(self._residents.pop(victim).placement)
        return placement

    def _grant(self, resident: _Resident, future: Future[Lease]) -> None:
        if future.set_running_or_notify_cancel():
            resident.leases += 1
            self._residents.move_to_end(resident.placement.adapter.digest)
            future.set_result(Lease(resident.placement, self._release))

    def _release(self, digest: str) -> None:
        with self._lock:
            self._residents[digest].leases -= 1
            self._evict_if_doomed(digest)
            self._retry_waiting()

    def _retry_waiting(self) -> None:
        if self._without_room and not self._closed:
            self._placers += 1
            self._loaders.submit(self._place_waiting)

    def _evict_if_doomed(self, digest: str) -> None:
        resident = self._residents[digest]
        if resident.doomed and not resident.leases:
            self.pool.remove(self._residents.pop(digest).placement)


def _release_if_granted(future: Future[Lease]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()
