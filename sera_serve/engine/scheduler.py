"""The scheduler of one task: which request runs next, under the lease of which adapter.

Locking. One lock guards the queue, the waiting leases, and the state of every request of the task.

* Public methods take the lock themselves. Methods whose name ends in `_locked` need it held.
* No lock but residency's is taken under it. Nothing is released, finished towards a client, or waited for under it.
* `first`, `start`, `make_ready`, `preempt` and `finish` are for the loop's thread alone. The other methods are for any
  thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Generic, TypeVar

from sera_serve.engine.admission import AdmissionController
from sera_serve.engine.fair_queue import FairQueue
from sera_serve.engine.request import FinishReason, Request, RequestState
from sera_serve.errors import EngineUnavailable, SeraServeError
from sera_serve.residency import AdapterResidency, Claim, Lease

R = TypeVar("R", bound=Request)


class Scheduler(Generic[R]):
    """Holds the requests of one task, in the fair order, from their arrival to their end.

    A request whose adapter is not on the device is parked while it loads, and others go before it. Requests that wait
    hold few leases, so that they do not keep the adapters of the requests before them from the device: when they hold
    too many, the last request in the order gives its lease back.

    Generation and classification have a scheduler each: rows of one batch are of no use to the other, and a tenant that
    is ahead in one would otherwise wait in the other for tenants that never come there.
    """

    def __init__(
        self,
        admission: AdmissionController,
        residency: AdapterResidency,
        max_waiting_leases: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Start with nothing waiting.

        Args:
            admission: Told when a call is finished.
            residency: Grants leases on adapters.
            max_waiting_leases: The most leases that requests may hold which do not run.
            weights: Shares by tenant; a tenant without one has 1.
        """
        self._admission = admission
        self._residency = residency
        self._max_waiting_leases = max_waiting_leases
        self._lock = threading.Lock()
        self._queue = FairQueue[R](weights)
        self._leased: set[R] = set()
        self._running: set[R] = set()
        # Submitted since the loop looked last.
        self._new: list[R] = []
        self._closed = False
        self.preemptions = 0
        self.in_step = False
        """Whether the loop is busy, so that what is submitted now has to wait; set by the loop."""
        self.wake: Callable[[], None] = lambda: None
        """Called without the lock whenever `first` may have something new; set by the loop."""

    def waiting(self, tenant: str | None = None) -> int:
        """How many requests wait for their turn; those of one tenant if given."""
        with self._lock:
            return len(self._queue) if tenant is None else self._queue.waiting_of(tenant)

    def running(self) -> int:
        """How many requests are in the batch."""
        return len(self._running)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Share the batch by other weights from now on; a tenant without one has 1."""
        with self._lock:
            self._queue.set_weights(weights)

    def counter(self, tenant: str) -> float:
        """Tokens that a tenant was charged, over its weight."""
        with self._lock:
            return self._queue.counter(tenant)

    def submit(self, requests: Sequence[R]) -> None:
        """Let requests wait for their turn; those that are finished already are passed over.

        Raises:
            EngineUnavailable: The engine is stopping; the requests are finished.
        """
        with self._lock:
            if not self._closed:
                for request in requests:
                    if request.is_finished:
                        continue
                    self._queue.push(request)
                    if self.in_step:
                        self._hint_locked(request)
                    else:
                        self._new.append(request)
        if self._closed:
            raise self._refuse(requests)
        self.wake()

    def hint_new(self) -> None:
        """Have the adapters of new requests that could not start near when their turn comes.

        A request that can start asks for its lease at once, which is quicker than a hint and then a lease.
        """
        if not self._new:
            return
        with self._lock:
            new, self._new = self._new, []
            for request in new:
                if request.loading is None and request.lease is None:
                    self._hint_locked(request)

    def cancel(self, request: R, reason: FinishReason, error: Exception | None = None) -> bool:
        """Finish a request that waits. False if it runs: then its loop must finish it. True if it is finished."""
        return not self.cancel_waiting([request], reason, error)

    def cancel_waiting(self, requests: Sequence[R], reason: FinishReason, error: Exception | None = None) -> list[R]:
        """Finish those of some requests that wait. Returns those that run: their loop must finish them.

        The lock is taken once. A thread that waits for it has given up the interpreter's lock, and gets that back late.
        """
        with self._lock:
            running = [request for request in requests if request.state is RequestState.RUNNING]
            waiting = [request for request in requests if request.state is not RequestState.RUNNING]
            waiting = [request for request in waiting if not request.is_finished]
            for request in waiting:
                if request.order >= 0:
                    self._queue.remove(request)
                self._leased.discard(request)
                request.finish(reason, error)
        for request in waiting:
            self._give_back(request, reason)
            request.notify()
        if waiting:
            self.wake()
        return running

    def shed(self, tenant: str, error: SeraServeError) -> bool:
        """Refuse the waiting request that would be the tenant's last; False if none waits."""
        while True:
            with self._lock:
                request = self._queue.last_of(tenant)
            if request is None:
                return False
            if self.cancel(request, FinishReason.SHED, error):
                return True

    def close(self) -> None:
        """Refuse all requests that wait, and those that come from now on."""
        with self._lock:
            self._closed = True
            requests = self._queue.requests()
        self._refuse(requests)

    def first(self) -> R | None:
        """The request whose turn it is, or None if none is on offer."""
        with self._lock:
            return self._queue.first()

    def start(self, request: R) -> bool:
        """Move a waiting request into the batch. False if its adapter is not there: it is parked, or finished."""
        while True:
            if request.digest is not None and request.lease is None and not self._acquire(request, request.digest):
                return False
            with self._lock:
                if request.is_finished:
                    # It was cancelled while its lease was on its way.
                    lease, request.lease = request.lease, None
                    break
                if request.digest is None or request.lease is not None:
                    lease = None
                    self._queue.remove(request)
                    self._leased.discard(request)
                    request.move(RequestState.RUNNING)
                    self._running.add(request)
                    if request.started_at is None:
                        request.started_at = time.monotonic()
                        self._queue.charge_prompt(request)
                    break
            # Another thread took its lease before the lock: too many waited with one, and this one was the last.
        if lease is not None:
            lease.release()
        if request.is_finished:
            return False
        self._drop_hint(request)
        request.notify()
        return True

    def make_ready(self, request: R) -> bool:
        """Hold the adapter of a waiting request on the device. False if it is not there: it is parked, or finished."""
        if request.digest is not None and request.lease is None:
            if not self._acquire(request, request.digest):
                return False
            with self._lock:
                if request.is_finished:
                    surplus, request.lease = request.lease, None
                else:
                    surplus = self._keep_lease_locked(request)
            if surplus is not None:
                surplus.release()
        return not request.is_finished

    def preempt(self, request: R) -> None:
        """Put a running request back into the queue, at its place in the order. It keeps its lease if few wait."""
        with self._lock:
            self.preemptions += 1
            self._running.discard(request)
            request.move(RequestState.PREEMPTED)
            self._queue.push(request)
            surplus = self._keep_lease_locked(request) if request.lease is not None else None
        if surplus is not None:
            surplus.release()

    def charge(self, requests: Iterable[R]) -> None:
        """Charge the tenants of running requests for one generated token each."""
        with self._lock:
            for request in requests:
                self._queue.charge_output(request.tenant, 1)

    def priority_key(self, request: R) -> tuple[float, tuple[int, int]]:
        """Sorts requests in the fair order; the lowest key goes first."""
        with self._lock:
            return self._queue.priority_key(request)

    def weight(self, tenant: str) -> float:
        """The tenant's part of the batch, in relation to others'."""
        with self._lock:
            return self._queue.weight(tenant)

    def finish(self, request: R, reason: FinishReason, error: Exception | None = None) -> None:
        """Finish a running request; no step may use its slot any more."""
        with self._lock:
            self._running.discard(request)
        # First: a reader that sees the request finished then finds nothing held for it. No other thread can finish a
        # request that runs.
        self._give_back(request, reason)
        with self._lock:
            request.finish(reason, error)
        request.notify()

    def check_invariants(self) -> None:
        """Raise RuntimeError where the queue, the leases and the states do not agree."""
        with self._lock:
            waiting = set(self._queue.requests())
            for request in waiting:
                if not request.is_queued:
                    raise RuntimeError(f"request {request.id!r} is queued and {request.state.name}")
            if waiting & self._running:
                raise RuntimeError("a request waits and runs")
            if any(request.state is not RequestState.RUNNING for request in self._running):
                raise RuntimeError("a request is in the batch and does not run")
            if {request for request in waiting if request.lease is not None} != self._leased:
                raise RuntimeError("a waiting request holds a lease that is not counted")
            if len(self._leased) > self._max_waiting_leases:
                raise RuntimeError(f"{len(self._leased)} waiting requests hold leases")

    def _refuse(self, requests: Iterable[R]) -> EngineUnavailable:
        """Finish waiting requests because the engine stops; returns what their clients are told."""
        error = EngineUnavailable("the engine is stopping; send the request again when it is back")
        self.cancel_waiting(list(requests), FinishReason.FAILED, error)
        return error

    def _acquire(self, request: R, digest: str) -> bool:
        """Get the lease of a request whose turn it is. False if it is not there yet: the request is parked, or gone."""
        future = self._residency.acquire(digest, self._claim(request))
        if future.done() and not future.cancelled() and future.exception() is None:
            request.lease = future.result()
            return True
        with self._lock:
            gone = request.is_finished
            if not gone:
                self._queue.park(request)
                request.move(RequestState.LOADING)
                request.loading = future
                if request.load_began is None:
                    request.load_began = time.monotonic()
        if gone:
            future.cancel()
        future.add_done_callback(partial(self._loaded, request))
        return False

    def _loaded(self, request: R, future: Future[Lease]) -> None:
        """Any thread: the adapter of a parked request is on the device, or cannot be brought there."""
        if future.cancelled():
            return
        error = future.exception()
        if error is not None:
            # Residency tells nothing else.
            assert isinstance(error, Exception)
            self.cancel(request, FinishReason.FAILED, error)
            return
        with self._lock:
            request.loading = None
            if request.load_began is not None and not request.load_s:
                request.load_s = time.monotonic() - request.load_began
            if request.is_finished:
                surplus: Lease | None = future.result()
            else:
                request.lease = future.result()
                request.move(RequestState.WAITING if request.started_at is None else RequestState.PREEMPTED)
                self._queue.unpark(request)
                surplus = self._keep_lease_locked(request)
        if surplus is not None:
            surplus.release()
        self.wake()

    def _keep_lease_locked(self, request: R) -> Lease | None:
        """Count the lease of a waiting request; returns the lease of the last in the order if they are too many."""
        self._leased.add(request)
        if len(self._leased) <= self._max_waiting_leases:
            return None
        last = max(self._leased, key=self._queue.priority_key)
        self._leased.remove(last)
        self._hint_locked(last)
        lease, last.lease = last.lease, None
        return lease

    def _hint_locked(self, request: R) -> None:
        if request.digest is not None and request.hint is None and request.is_queued:
            request.hint = self._residency.prefetch(request.digest, self._claim(request))

    def _claim(self, request: R) -> Claim:
        # Residency calls it without the lock of this scheduler: to read one counter is one look-up in a dictionary.
        return Claim(request.tenant, self._queue.counter)

    def _give_back(self, request: R, reason: FinishReason) -> None:
        """Release what a request holds that is finished, or is about to be."""
        loading, request.loading = request.loading, None
        if loading is not None:
            loading.cancel()
        lease, request.lease = request.lease, None
        if lease is not None:
            lease.release()
        self._drop_hint(request)
        if request.parent is None or reason is FinishReason.SHED:
            # A call whose part was shed fails as a whole.
            self._admission.release(request.parent or request, reason.is_served)

    @staticmethod
    def _drop_hint(request: R) -> None:
        hint, request.hint = request.hint, None
        if hint is not None:
            hint.release()
