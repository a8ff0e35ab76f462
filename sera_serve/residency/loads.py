"""Loads under way: reading, the line for room in the pool, copying, and the answers to those who wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from sera_serve.errors import AdapterTooLarge
from sera_serve.residency.answers import Answers
from sera_serve.residency.handles import Lease, Wishes
from sera_serve.residency.host_cache import HostCache
from sera_serve.residency.line import Line, Outcome
from sera_serve.residency.loader_threads import LoaderThreads
from sera_serve.residency.loading import Loading
from sera_serve.residency.packing import PackedAdapter
from sera_serve.residency.pool import Placement
from sera_serve.residency.reading import AdapterReader
from sera_serve.residency.residents import Residents
from sera_serve.residency.stats import LoadCounts, Tier

# Priorities of loader jobs: what has room in the pool, then what a request waits for, then what one will want.
_FILL, _LOAD, _PREFETCH = range(3)


class Loads:
    """Brings adapters to the device and grants leases on them.

    The caller holds `lock` around every public method, and delivers the answers after it has released the lock.

    Attributes:
        wishes: What requests that are not admitted yet wish for.
        line: Those that were read and find no room.
        counts: What was loaded and granted so far.
    """

    def __init__(
        self,
        lock: threading.Lock,
        reader: AdapterReader,
        residents: Residents,
        host_cache: HostCache,
        threads: LoaderThreads,
        patience: int,
        answers: Answers,
        release: Callable[[Lease], None],
    ) -> None:
        """Begin without any.

        Args:
            lock: Guards `residents`, `host_cache` and this.
            reader: Reads adapters from there or from the store.
            residents: The device tier.
            host_cache: The host tier.
            threads: Threads to load with.
            patience: Leases that may be granted over the head of the first in line.
            answers: Where the answers go.
            release: What `Lease.release` of a granted lease does.
        """
        self.wishes = Wishes(lock)
        self.counts = LoadCounts()
        self._lock = lock
        self._reader = reader
        self._residents = residents
        self._host_cache = host_cache
        self._threads = threads
        self._answers = answers
        self._release = release
        self._loadings: dict[str, Loading] = {}
        self.line = Line(residents, self._is_wanted, self.counts.granted, patience)

    def __len__(self) -> int:
        return len(self._loadings)

    def get(self, digest: str) -> Loading | None:
        """The load of an adapter, if there is one."""
        return self._loadings.get(digest)

    def request(self, digest: str, future: Future[Lease]) -> None:
        """Grant a lease now or when the adapter is there; all who ask meanwhile share one load."""
        if not self._residents.are_retiring() and self.line.is_impatient():
            self.serve_line()
        if self._residents.usable(digest):
            self._grant(digest, [future], "device")
            return
        loading = self._loadings.get(digest)
        if loading is None:
            if self._copy_now(digest):
                self._grant(digest, [future], "host")
                return
            loading = self._loadings[digest] = Loading(digest)
        if not loading.started and not loading.futures:
            # A load that was a mere prefetch is in the queue twice now; whichever comes later finds it started.
            self._threads.submit(_LOAD, lambda: self._load(loading))
        loading.futures.append(future)

    def prefetch(self, digest: str) -> None:
        """Begin to bring an adapter near, if it is not."""
        if digest not in self._residents and digest not in self._loadings:
            loading = self._loadings[digest] = Loading(digest)
            self._threads.submit(_PREFETCH, lambda: self._load(loading))

    def serve_line(self, arriving: Loading | None = None) -> None:
        """Find room for those who wait; called whenever there may be some. The caller itself fills `arriving`."""
        for loading, outcome in self.line.settle():
            if outcome is Outcome.ABANDONED:
                self._end(loading)
            elif outcome is Outcome.RESIDENT:
                self._grant(loading.digest, loading.futures, "device")
                self._end(loading)
            elif outcome is Outcome.NEVER:
                self._refuse(
                    loading,
                    AdapterTooLarge(
                        "the adapter does not fit beside the pinned ones; unpin some, or raise pool_mib",
                        param="adapter",
                    ),
                )
            else:
                self.line.leave(loading.digest)
                loading.placement = outcome
                if loading is not arriving:
                    self._threads.submit(_FILL, partial(self._load_placed, loading, outcome))

    def refuse_all(self, error: Exception) -> None:
        """Answer everyone who waits with `error`, and begin nothing more."""
        for loading in list(self._loadings.values()):
            self._refuse(loading, error)

    def check_invariants(self) -> None:
        """Raise RuntimeError where loads, line and wishes do not agree with each other and the pool."""
        copying = [loading for loading in self._loadings.values() if loading.placement is not None]
        if len(self._residents.pool.placements()) != len(self._residents) + len(copying):
            raise RuntimeError("an adapter has a place in the pool and is neither resident nor being copied")
        self.line.check_invariants(self._loadings)
        if self.line.is_awaited() and not copying and not self._residents.leases():
            raise RuntimeError("an adapter waits for room although nothing is in use")
        self.wishes.check_invariants()

    def _copy_now(self, digest: str) -> bool:
        """Bring an adapter over from the host cache at once, where that takes less than to wake a loader thread."""
        packed = self._host_cache.get(digest)
        if packed is None or self.line or not self._residents.pool.fills_at_once(packed):
            return False
        began = time.monotonic()
        copied = self._residents.copy_in(packed, self._is_wanted)
        if copied:
            self.counts.add_load("host", time.monotonic() - began)
        return copied

    def _load(self, loading: Loading) -> None:
        """Loader thread: read an adapter, and copy it to the device if it finds room at once."""
        with self._lock:
            if loading.started or self._loadings.get(loading.digest) is not loading:
                return
            loading.started = True
            if not loading.is_awaited() and not self._is_worth_prefetching(loading):
                self._end(loading)
                return
        packed = self._read(loading)
        if packed is not None:
            with self._lock:
                if self._loadings.get(loading.digest) is loading:
                    self._find_room(loading, packed)
                placement = loading.placement
            if placement is not None:
                self._fill(loading, placement, packed)
        self._answers.deliver()

    def _load_placed(self, loading: Loading, placement: Placement) -> None:
        """Loader thread: copy an adapter that had to wait for room."""
        packed = self._read(loading)
        if packed is not None:
            self._fill(loading, placement, packed)
        self._answers.deliver()

    def _read(self, loading: Loading) -> PackedAdapter | None:
        """The adapter from the host cache or the store; None if that failed, which those who wait are told."""
        began = time.monotonic()
        try:
            packed, tier = self._reader.read(loading.digest)
        except Exception as error:  # noqa: BLE001 - it is delivered to every request that waits for this load
            self._fail(loading, error)
            return None
        with self._lock:
            loading.seconds += time.monotonic() - began
            loading.tier = loading.tier or tier
            if self._loadings.get(loading.digest) is loading:
                self._host_cache.put(packed, self._is_wanted)
        return packed

    def _find_room(self, loading: Loading, packed: PackedAdapter) -> None:
        if loading.is_awaited():
            self.line.join(loading, packed.layout)
            self.serve_line(arriving=loading)
            return
        if loading.digest in self.wishes and not self.line and not loading.doomed:
            loading.placement = self._residents.reserve(packed.layout, self._is_wanted, spare_wanted=True)
        if loading.placement is None:
            self._end(loading)

    def _fill(self, loading: Loading, placement: Placement, packed: PackedAdapter) -> None:
        began = time.monotonic()
        try:
            self._residents.pool.fill(placement, packed.data)
        except Exception as error:  # noqa: BLE001 - it is delivered to every request that waits for this load
            self._fail(loading, error)
            return
        with self._lock:
            tier = loading.tier or "store"
            self.counts.add_load(tier, loading.seconds + time.monotonic() - began)
            self._residents.add(placement)
            self._grant(loading.digest, loading.futures, tier)
            self._end(loading)
            if loading.doomed:
                self._residents.doom(loading.digest)
            self.serve_line()

    def _fail(self, loading: Loading, error: Exception) -> None:
        with self._lock:
            self.counts.failed += 1
            if loading.placement is not None:
                self._residents.pool.remove(loading.placement)
                loading.placement = None
            self._refuse(loading, error)
            self.serve_line()

    def _grant(self, digest: str, futures: list[Future[Lease]], tier: Tier) -> None:
        for future in futures:
            if self._answers.decide(future, lambda: Lease(self._residents.lease(digest), self._release)):
                self.counts.granted[tier] += 1

    def _refuse(self, loading: Loading, error: Exception) -> None:
        for future in loading.futures:
            self._answers.decide(future, lambda: error)
        loading.futures = []
        # What is being copied ends when it is copied: until then its place in the pool is taken.
        if loading.placement is None:
            self._end(loading)

    def _end(self, loading: Loading) -> None:
        if self._loadings.get(loading.digest) is loading:
            del self._loadings[loading.digest]
            self.line.leave(loading.digest)
            if loading.doomed:
                self._host_cache.drop(loading.digest)

    def _is_wanted(self, digest: str) -> bool:
        return digest in self.wishes or digest in self._loadings

    def _is_worth_prefetching(self, loading: Loading) -> bool:
        if loading.digest not in self.wishes or loading.doomed:
            return False
        spare = not self.line and self._residents.has_spare_room(self._is_wanted)
        return spare or self._host_cache.has_room(self._is_wanted)
