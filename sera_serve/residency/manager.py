"""Which adapters are where: leases on the device pool, loads beside decoding, least-recently-used eviction."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from adapters_store import AdapterBundle
from sera_serve.errors import EngineUnavailable
from sera_serve.residency.answers import Answers
from sera_serve.residency.handles import Lease, PrefetchHint
from sera_serve.residency.host_cache import HostCache
from sera_serve.residency.loader_threads import LoaderThreads
from sera_serve.residency.loads import Loads
from sera_serve.residency.pool import DevicePool
from sera_serve.residency.reading import AdapterReader
from sera_serve.residency.residents import Residents
from sera_serve.residency.stats import ResidencyStats


class AdapterResidency:
    """Moves adapters store -> host cache -> device pool on demand, and back out when others need the room.

    Every public method but `close` may be called from any thread and returns at once: reading and copying are done by
    loader threads, so a request waits for its own adapter only. (On a CPU the caller itself copies a small adapter from
    the host cache, which is quicker than to wake a thread.) Adapters that find no room wait in a line. Others
    may pass the first in line until `patience` leases have been granted over its head; then nobody passes it, and
    resident adapters retire until it fits.

    Host memory is the host cache, and what each loader thread at work is reading.
    """

    def __init__(
        self,
        load: Callable[[str], AdapterBundle],
        pool: DevicePool,
        host_cache: HostCache,
        module_index: Mapping[str, int],
        loader_threads: LoaderThreads | None = None,
        patience: int = 64,
        pin_share: float = 0.5,
    ) -> None:
        """Start with an empty pool.

        Args:
            load: Reads a bundle by digest and raises a typed error where it cannot be had or does not fit the base.
            pool: Device memory; owned by this object from now on.
            host_cache: Host memory; likewise.
            module_index: Row of each adaptable module in the pool's tables.
            loader_threads: Likewise; two loads at once if None.
            patience: Leases that may be granted while an adapter waits for room, before it goes first.
            pin_share: The part of the pool's bytes, and of its slots, that pinned adapters may take.
        """
        self.pool = pool
        self.host_cache = host_cache
        self._threads = loader_threads or LoaderThreads(at_once=2)
        self._lock = threading.Lock()
        self._residents = Residents(pool, pin_share)
        self._answers = Answers()
        self._loads = Loads(
            self._lock,
            AdapterReader(load, module_index, pool, host_cache, self._lock),
            self._residents,
            host_cache,
            self._threads,
            patience,
            self._answers,
            self._release_lease,
        )
        self._unchecked = False
        self._closed = False

    async def lease(self, digest: str) -> Lease:
        """Wait until the adapter is on the device, and hold it there. Cancelling the wait leaves nothing held.

        Raises:
            AdapterTooLarge: It is larger than the whole pool, or than what pinned adapters leave of it.
            EngineUnavailable: Residency is closed.
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
            self._unchecked = True
            if self._closed:
                future.set_exception(_closed())
            else:
                self._loads.request(digest, future)
        self._answers.deliver()
        if not future.done():
            future.add_done_callback(self._after_cancel)
        return future

    def prefetch(self, digest: str) -> PrefetchHint:
        """Begin to bring an adapter near for a request that is not admitted yet; failures are left to its `lease`.

        It goes to the host cache, and to the device if nobody waits for room there and nothing that is leased, pinned
        or wanted by another request has to leave for it. Until the wish is released, no other load drops it from the
        host cache, no other prefetch evicts it from the device, and other requests' adapters evict it last.
        """
        with self._lock:
            self._unchecked = True
            wish = self._loads.wishes.add(digest)
            if not self._closed:
                self._loads.prefetch(digest)
        return wish

    def pin(self, digest: str) -> Future[None]:
        """Bring an adapter to the device and keep it there until `unpin` or `mark_deleted`. Idempotent.

        The future raises CannotPin where pins would take too much of the pool, and whatever `lease` raises. Cancelled
        before it is done, it pins nothing.
        """
        result: Future[None] = Future()

        def pin_leased(leased: Future[Lease]) -> None:
            if not result.set_running_or_notify_cancel():
                _release_if_granted(leased)
                return
            try:
                lease = leased.result()
                try:
                    with self._lock:
                        self._residents.pin(digest)
                finally:
                    lease.release()
            except Exception as error:  # noqa: BLE001 - it is delivered to whoever asked for the pin
                result.set_exception(error)
            else:
                result.set_result(None)

        self.acquire(digest).add_done_callback(pin_leased)
        return result

    def unpin(self, digest: str) -> None:
        """Let an adapter be evicted again. Idempotent."""
        with self._lock:
            self._residents.unpin(digest)
            self._loads.serve_line()
        self._answers.deliver()

    def mark_deleted(self, digest: str) -> None:
        """Give back the memory of an adapter that was deleted: the host's now, the device's after its last lease.

        Requests that wait for it already are still served.
        """
        with self._lock:
            self._unchecked = True
            loading = self._loads.get(digest)
            if loading is not None:
                loading.doomed = True
            else:
                self.host_cache.drop(digest)
            self._residents.doom(digest)
            self._loads.serve_line()
        self._answers.deliver()

    def resident_digests(self) -> list[str]:
        """Digests of the adapters on the device, least recently used first."""
        with self._lock:
            return self._residents.digests()

    def pinned_digests(self) -> list[str]:
        """Digests of the pinned adapters."""
        with self._lock:
            return self._residents.pins()

    def leases(self) -> int:
        """How many leases are held."""
        with self._lock:
            return self._residents.leases()

    def stats(self) -> ResidencyStats:
        """Figures for metrics."""
        with self._lock:
            itemsize = self.pool.data.element_size()
            counts = self._loads.counts
            return ResidencyStats(
                resident=len(self._residents),
                pinned=len(self._residents.pins()),
                leases=self._residents.leases(),
                loading=len(self._loads),
                waiting=len(self._loads.line),
                device_bytes=self.pool.used * itemsize,
                device_limit=self.pool.capacity * itemsize,
                host_adapters=len(self.host_cache),
                host_bytes=self.host_cache.used,
                host_limit=self.host_cache.limit,
                granted={tier: counts.granted[tier] for tier in ("device", "host", "store")},
                loads=dict(counts.times),
                failed_loads=counts.failed,
                evictions=self._residents.evictions,
                copies=self.pool.copies,
            )

    def idle_check(self) -> bool:
        """Check the books if nothing is leased or loading and something has happened since the last time.

        For engines to call when they have nothing to do. Returns whether it checked; raises as `check_invariants`.
        """
        with self._lock:
            if not self._unchecked or len(self._loads) or self._residents.leases():
                return False
            self._unchecked = False
        self.check_invariants()
        return True

    def check_invariants(self) -> None:
        """Raise RuntimeError where the books do not balance: pool, tables, host cache, leases, pins, loads, line."""
        with self._lock:
            self._residents.check_invariants()
            self.host_cache.check_invariants()
            self._loads.check_invariants()

    def close(self, timeout_s: float = 5.0) -> None:
        """Refuse who waits and who comes with EngineUnavailable, and stop the loader threads.

        A load that takes longer than `timeout_s` is left to itself, and its result is dropped.
        """
        with self._lock:
            self._closed = True
            self._loads.refuse_all(_closed())
        self._answers.deliver()
        self._threads.close(timeout_s)

    def _release_lease(self, lease: Lease) -> None:
        with self._lock:
            if lease.held:
                lease.held = False
                self._residents.release(lease.placement.adapter.digest)
                self._loads.serve_line()
        self._answers.deliver()

    def _after_cancel(self, future: Future[Lease]) -> None:
        """One who gave up may have stood before others in the line."""
        if future.cancelled():
            with self._lock:
                self._loads.serve_line()
            self._answers.deliver()


def _closed() -> EngineUnavailable:
    return EngineUnavailable("the server is shutting down; send the request again when it is back")


def _release_if_granted(future: Future[Lease]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()
