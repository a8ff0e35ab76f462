"""Loading adapters: reading them from the store, and the threads that read and copy beside the requests."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from adapters_store import AdapterBundle
from sera_serve.residency.bundle_check import check_fits, check_ranks
from sera_serve.residency.packing import PackedAdapter, pack
from sera_serve.residency.pool import DevicePool
from sera_serve.residency.turns import TurnQueue

logger = logging.getLogger("sera_serve.residency")

Loading = Callable[[str], AbstractContextManager[AdapterBundle]]
"""Reads a bundle by digest; raises a typed error where it is missing or does not fit the base.

The content may be checked as late as at the end of the block: what the block made is to be thrown away then.
"""


class LoadSize(NamedTuple):
    """What a load takes.

    Attributes:
        nbytes: The most host memory that the bundle takes while it is read or made, bytes.
        numbers: The most numbers that it has.
    """

    nbytes: int
    numbers: int

    @classmethod
    def of_file(cls, nbytes: int) -> LoadSize:
        """That of a bundle in a file of so many bytes, where a number takes two bytes or four."""
        return cls(nbytes, nbytes // 2)


class AdapterLoader:
    """Reads adapters in the pool's dtype and layout. Thread-safe; the caller holds no lock: a read takes long."""

    def __init__(
        self,
        loading: Loading,
        module_index: Mapping[str, int],
        pool: DevicePool,
        size_of: Callable[[str], LoadSize] | None = None,
    ) -> None:
        """Prepare.

        Args:
            loading: Reads a bundle.
            module_index: Row of each adaptable module in the pool's tables.
            pool: The pool that the adapters are for: its dtype, device and size.
            size_of: What `loading` takes for a bundle; without it, every adapter is small.
        """
        self._loading = loading
        self._module_index = dict(module_index)
        self._pool = pool
        self._size_of = size_of

    def load_bytes(self, digest: str) -> int:
        """The most host memory that `read` takes, in bytes: the bundle and the packed adapter.

        Raises:
            Exception: Whatever `size_of` raised.
        """
        if self._size_of is None:
            return 0
        size = self._size_of(digest)
        return size.nbytes + size.numbers * self._pool.data.element_size()

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


@dataclass(eq=False, slots=True)
class Job:
    """Work for a loader thread; its fields belong to `LoaderThreads`.

    Attributes:
        work: What to run.
        nbytes: The most host memory that it takes, bytes; 0 if that is little.
        priority: The lowest runs first.
        waits: It has neither begun nor was it withdrawn.
    """

    work: Callable[[], None]
    nbytes: int
    priority: int
    waits: bool = True


class LoaderThreads:
    """A thread pool with priorities, in which owners take turns, and with a bound on the memory of large jobs.

    A few jobs run at once. A job that has run for `stall_s` is stalled: it does not count any more, so that another
    one starts beside it. A further job waits for stalled ones only where `most` jobs are stalled at the same time.
    So a slow store delays only the jobs that read from it.

    A stalled job still has its memory. Therefore jobs of more than `small_bytes` run side by side only as far as they
    take `max_bytes` together. A single one may take more. A large job that finds too little delays later large ones,
    and no small one. Jobs that are not large take `max_bytes` at most, all of them together.
    """

    def __init__(self, at_once: int, most: int = 32, stall_s: float = 1.0, max_bytes: int = 1 << 30) -> None:
        """Start no thread yet.

        Args:
            at_once: How many jobs run at once, stalled ones not counted.
            most: How many threads there are at most: those of stalled jobs, and one that watches them, included.
            stall_s: Time after which a job is stalled, seconds.
            max_bytes: Host memory of the large jobs that run, bytes.
        """
        self._at_once = at_once
        self._most = max(most, at_once + 1)
        self._stall_s = stall_s
        self._max_bytes = max_bytes
        self.small_bytes = max_bytes // self._most
        """Bytes up to which a job is small."""
        self._changed = threading.Condition()
        # By priority, lowest first. The large jobs of an owner have turns of their own: they may wait for memory.
        self._jobs: dict[int, TurnQueue[Job]] = {}
        # When each running job began, and the bytes of the large ones.
        self._running: dict[Job, float] = {}
        self._large_bytes = 0
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False

    def submit(self, priority: int, work: Callable[[], None], owner: Hashable = None, nbytes: int = 0) -> Job:
        """Run a job after all jobs of a lower priority number, and after earlier ones of the same number and owner.

        Owners take turns: of jobs with one priority, one of each owner runs before the second of any.
        The job must not raise. After `close` nothing runs.

        Args:
            priority: The lowest runs first.
            work: The job.
            owner: Whose turn it takes.
            nbytes: The most host memory that it takes, bytes.

        Returns:
            What `withdraw` takes.
        """
        job = Job(work, nbytes, priority)
        with self._changed:
            if self._closed:
                return job
            if priority not in self._jobs:
                self._jobs[priority] = TurnQueue()
                self._jobs = dict(sorted(self._jobs.items()))
            self._jobs[priority].add((owner, self._is_large(job)), job)
            self._ensure_idle_thread()
            self._changed.notify()
        return job

    def withdraw(self, job: Job) -> None:
        """Take a job back that has not begun; nothing happens where it has begun."""
        with self._changed:
            if job.waits and not self._closed:
                job.waits = False
                self._jobs[job.priority].remove(job, is_turn=False)
                # A large one may have kept others waiting.
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

    def _is_large(self, job: Job) -> bool:
        return job.nbytes > self.small_bytes

    def _next(self) -> Job | None:
        """The job that runs next; None if none waits, or only large ones. Lock held."""
        is_short = False
        for jobs in self._jobs.values():
            for job in jobs.firsts():
                if not self._is_large(job):
                    return job
                # Large jobs that would still fit wait as well: else they could keep this one from running for ever.
                is_short = is_short or (bool(self._large_bytes) and self._large_bytes + job.nbytes > self._max_bytes)
                if not is_short:
                    return job
        return None

    def _ensure_idle_thread(self) -> None:
        """Have an idle thread while jobs wait: it starts the next job when a running one stalls. Lock held.

        Where the system has no thread left, jobs wait for those that there are, and the next call tries again.
        """
        if not self._idle and len(self._threads) < self._most and self._next() is not None:
            # A daemon, because a store that never answers must not keep the process from ending.
            thread = threading.Thread(target=self._run, name=f"adapter-loader-{len(self._threads)}", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                logger.exception("no thread could be started to load adapters; %d run", len(self._threads))
                return
            # Counted here, not when it runs: the next call must not start another.
            self._idle += 1
            self._threads.append(thread)

    def _run(self) -> None:
        # One CPU thread each. A pool of OpenMP threads for every loader would end the spinning of the engine's own
        # pool, which waits for little else between two layers (measured: forward passes of half the speed).
        torch.set_num_threads(1)
        with self._changed:
            while True:
                while not self._closed and ((following := self._next()) is None or self._free_in() > 0):
                    self._changed.wait(None if following is None else self._free_in())
                if self._closed or following is None:
                    return
                self._idle -= 1
                job = self._begin(following)
                del following
                if self._next() is not None:
                    self._ensure_idle_thread()
                    self._changed.notify()
                self._changed.release()
                try:
                    job.work()
                finally:
                    self._changed.acquire()
                    self._end(job)
                    # What the job holds must not outlive the job while this thread is idle.
                    del job
                    self._idle += 1

    def _begin(self, job: Job) -> Job:
        job.waits = False
        self._jobs[job.priority].remove(job, is_turn=True)
        self._running[job] = time.monotonic()
        if self._is_large(job):
            self._large_bytes += job.nbytes
        return job

    def _end(self, job: Job) -> None:
        del self._running[job]
        if self._is_large(job):
            self._large_bytes -= job.nbytes

    def _free_in(self) -> float:
        """Seconds until fewer than `at_once` running jobs are not stalled; zero or less if so now. Lock held."""
        began = sorted(self._running.values())
        if len(began) < self._at_once:
            return 0.0
        return began[-self._at_once] + self._stall_s - time.monotonic()
