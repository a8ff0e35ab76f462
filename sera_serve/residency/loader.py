"""Loading adapters: reading them from the store, and the threads that read and copy beside the requests."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch

from adapters_store import AdapterBundle
from sera_serve.residency.bundle_check import check_fits, check_ranks
from sera_serve.residency.packing import PackedAdapter, pack
from sera_serve.residency.pool import DevicePool

Loading = Callable[[str], AbstractContextManager[AdapterBundle]]
"""Reads a bundle by digest; raises a typed error where it is missing or does not fit the base.

The content may be checked as late as at the end of the block: what the block made is to be thrown away then.
"""


class AdapterLoader:
    """Reads adapters in the pool's dtype and layout. Thread-safe; the caller holds no lock: a read takes long."""

    def __init__(self, loading: Loading, module_index: Mapping[str, int], pool: DevicePool) -> None:
        """Prepare.

        Args:
            loading: Reads a bundle.
            module_index: Row of each adaptable module in the pool's tables.
            pool: The pool that the adapters are for: its dtype, device and size.
        """
        self._loading = loading
        self._module_index = dict(module_index)
        self._pool = pool

    def read(self, digest: str) -> PackedAdapter:
        """Read an adapter from the store and pack it.

        Raises:
            AdapterTooLarge: The adapter is larger than the whole pool, or a layer's rank is too high.
            Exception: Whatever `loading` raised.
        """
        with self._loading(digest) as bundle:
            # A command may have published it, which knows no server; and a sum of adapters is made here.
            check_ranks(bundle.config)
            packed = pack(bundle, self._module_index, self._pool.data.dtype, digest)
        check_fits(packed.layout.elements, self._pool)
        return packed


class LoaderThreads:
    """A thread pool with priorities. A slow store delays only the jobs that read from it.

    A few jobs run at once. A job that has run for `stall_s` is stalled: it does not count any more, so that another
    one starts beside it. A further job waits for stalled ones only where `most` jobs are stalled at the same time.
    """

    def __init__(self, at_once: int, most: int = 32, stall_s: float = 1.0) -> None:
        """Start no thread yet.

        Args:
            at_once: How many jobs run at once, stalled ones not counted.
            most: How many threads there are at most: those of stalled jobs, and one that watches them, included.
            stall_s: Time after which a job is stalled, seconds.
        """
        self._at_once = at_once
        self._most = max(most, at_once + 1)
        self._stall_s = stall_s
        self._changed = threading.Condition()
        self._jobs: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        # When each running job began, by its number in the order.
        self._running: dict[int, float] = {}
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False

    def submit(self, priority: int, job: Callable[[], None]) -> None:
        """Run a job after all jobs of a lower priority number, and after earlier ones of the same number.

        The job must not raise. After `close` nothing runs.
        """
        with self._changed:
            if self._closed:
                return
            heapq.heappush(self._jobs, (priority, next(self._order), job))
            self._ensure_idle_thread()
            self._changed.notify()

    def close(self, timeout_s: float) -> None:
        """Start no more jobs, and wait up to `timeout_s` for running ones; a job that takes longer goes on alone."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _ensure_idle_thread(self) -> None:
        """Have an idle thread while jobs wait: it starts the next job when a running one stalls. Lock held."""
        if self._jobs and not self._idle and len(self._threads) < self._most:
            # Counted here, not when it runs: the next call must not start another.
            self._idle += 1
            # A daemon, because a store that never answers must not keep the process from ending.
            thread = threading.Thread(target=self._run, name=f"adapter-loader-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self) -> None:
        # One CPU thread each. A pool of OpenMP threads for every loader would end the spinning of the engine's own
        # pool, which waits for little else between two layers (measured: forward passes of half the speed).
        torch.set_num_threads(1)
        with self._changed:
            while True:
                while not self._closed and not (self._jobs and self._free_in() <= 0):
                    self._changed.wait(self._free_in() if self._jobs else None)
                if self._closed:
                    return
                self._idle -= 1
                _, order, job = heapq.heappop(self._jobs)
                self._running[order] = time.monotonic()
                self._ensure_idle_thread()
                if self._jobs:
                    self._changed.notify()
                self._changed.release()
                try:
                    job()
                finally:
                    # What the job holds must not outlive the job while this thread is idle.
                    del job
                    self._changed.acquire()
                    del self._running[order]
                    self._idle += 1

    def _free_in(self) -> float:
        """Seconds until fewer than `at_once` running jobs are not stalled; zero or less if so now. Lock held."""
        began = sorted(self._running.values())
        if len(began) < self._at_once:
            return 0.0
        return began[-self._at_once] + self._stall_s - time.monotonic()
