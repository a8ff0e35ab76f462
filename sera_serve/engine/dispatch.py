"""From the queue into a batch: the fair order, the room of the batch, and the adapters that tickets need."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from functools import partial

from sera_serve.engine.admission import Room
from sera_serve.engine.fairness import FairQueue
from sera_serve.engine.request import Request, Stage
from sera_serve.errors import EngineUnavailable, SeraServeError
from sera_serve.residency import AdapterResidency, Lease


class Dispatcher:
    """Lets requests into one batch in the fair order, each as soon as there is room and its adapter is on the device.

    A request whose adapter is not there is set aside while it loads, and others go before it. Leases of requests that
    wait are few, so that these cannot keep the adapters of those before them from the device: when there are too many,
    the last in the order gives its lease back.

    Everything but `begin` and `ended` is thread-safe. No other lock but residency's is taken under the one here.
    """

    def __init__(
        self, queue: FairQueue[Request], room: Room, residency: AdapterResidency, max_waiting_leases: int
    ) -> None:
        """Start with nothing waiting; queue and room are this object's own from now on."""
        self._queue = queue
        self._room = room
        self._residency = residency
        self._max_waiting_leases = max_waiting_leases
        self._lock = threading.Lock()
        self._leased: set[Request] = set()
        self._closed = False
        self._thread = threading.local()

    def waiting(self) -> int:
        """How many requests wait."""
        with self._lock:
            return len(self._queue)

    def running(self) -> int:
        """How many are in the batch."""
        with self._lock:
            return len(self._room)

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn; what comes of it is told by `begun`.

        Raises:
            EngineUnavailable: The engine is stopping.
        """
        with self._lock:
            closed = self._closed
            if not closed:
                self._queue.push(request)
        if closed:
            self._drop(request, None)
            raise EngineUnavailable("the engine is stopping")
        self._admit()
        with self._lock:
            # One that could come in has its lease, or waits for it: only the others need their adapter brought near.
            if request.stage is Stage.WAITING and request.loading is None:
                self._wish(request)

    def withdraw(self, request: Request) -> bool:
        """Take a request back that waits. False if it is in the batch, which must then be told."""
        with self._lock:
            if request.stage is not Stage.WAITING:
                return request.stage is Stage.GONE
            self._leave_queue(request)
        self._drop(request, None)
        self._admit()
        return True

    def turn_away(self, tenant: str, error: SeraServeError) -> Request | None:
        """Refuse the waiting request that would be the tenant's last; None if none waits."""
        with self._lock:
            request = self._queue.last_of(tenant)
            if request is None:
                return None
            self._leave_queue(request)
        self._drop(request, error)
        self._admit()
        return request

    def progress(self, request: Request, new_tokens: int) -> None:
        """Note that a running request has got so many more tokens; its prompt is then computed."""
        with self._lock:
            self._queue.charge_output(request.tenant, new_tokens)
            first = self._room.prefilled(request)
        if first:
            self._admit()

    def finish(self, request: Request, served: bool = True) -> None:
        """Note that a running request has left the batch; what it held is given to the next."""
        with self._lock:
            request.stage = Stage.GONE
            self._room.leave(request)
        self._drop(request, None, served)
        self._admit()

    def close(self) -> None:
        """Refuse all that wait or come from now on."""
        with self._lock:
            self._closed = True
            requests = self._queue.tickets()
            for request in requests:
                self._leave_queue(request)
        for request in requests:
            self._drop(request, EngineUnavailable("the engine is stopping; send the request again when it is back"))

    def _admit(self) -> None:
        """Let in whoever may come in; several threads may be at it."""
        # What is done in here may lead here again: the loop that is under way in this thread will see to it.
        if getattr(self._thread, "admitting", False):
            return
        self._thread.admitting = True
        try:
            while (request := self._next()) is not None:
                if request.digest is None or request.lease is not None or self._lease(request, request.digest):
                    self._enter(request)
        finally:
            self._thread.admitting = False

    def _lease(self, request: Request, digest: str) -> bool:
        """Get the adapter's lease if it can be had at once; otherwise give the room back until it can."""
        lease = self._residency.acquire(digest)
        if lease.done() and lease.exception() is None:
            request.lease = lease.result()
            return True
        with self._lock:
            self._room.leave(request)
            request.loading = lease
            gone = request.stage is Stage.GONE
        if gone:
            lease.cancel()
        lease.add_done_callback(partial(self._loaded, request))
        return False

    def _next(self) -> Request | None:
        """The request whose turn it is, set aside and with its room taken; None if nobody may come in now."""
        with self._lock:
            request = self._queue.first()
            if request is None or not self._room.fits(request):
                return None
            self._queue.set_aside(request)
            self._room.enter(request)
            self._leased.discard(request)
            return request

    def _enter(self, request: Request) -> None:
        """Begin a request that has its room, and its lease if it needs one."""
        with self._lock:
            gone = request.stage is Stage.GONE
            if gone:
                self._room.leave(request)
            else:
                request.stage = Stage.RUNNING
                self._queue.take(request)
        if gone:
            # Withdrawn while another thread was at this: what it got since then is given back.
            self._release(request)
            return
        # Once running, the future cannot be cancelled by somebody who no longer waits for it.
        if not request.begun.set_running_or_notify_cancel():
            self.finish(request, served=False)
            return
        if request.wish is not None:
            request.wish.release()
        try:
            request.begin(request.lease)
        except SeraServeError as error:
            self.finish(request, served=False)
            request.begun.set_exception(error)
        else:
            request.begun.set_result(None)

    def _loaded(self, request: Request, lease: Future[Lease]) -> None:
        if lease.cancelled():
            return
        error = lease.exception()
        if error is not None:
            self._fail(request, error)
            self._admit()
            return
        surplus: Lease | None = None
        with self._lock:
            request.loading = None
            if request.stage is Stage.GONE:
                surplus = lease.result()
            else:
                request.lease = lease.result()
                self._queue.put_back(request)
                self._leased.add(request)
                if len(self._leased) > self._max_waiting_leases:
                    last = max(self._leased, key=self._queue.claim)
                    self._leased.remove(last)
                    self._wish(last)
                    surplus, last.lease = last.lease, None
        if surplus is not None:
            surplus.release()
        self._admit()

    def _wish(self, request: Request) -> None:
        """Have the adapter of a waiting request near when its turn comes."""
        if request.digest is not None and request.wish is None:
            request.wish = self._residency.prefetch(request.digest)

    def _fail(self, request: Request, error: BaseException) -> None:
        with self._lock:
            if request.stage is Stage.GONE:
                return
            self._leave_queue(request)
        self._drop(request, error)

    def _leave_queue(self, request: Request) -> None:
        request.stage = Stage.GONE
        self._queue.remove(request)
        self._leased.discard(request)

    def _drop(self, request: Request, error: BaseException | None, served: bool = False) -> None:
        """Give back what a request that is gone held, and tell who waits for it."""
        loading = request.loading
        if loading is not None:
            loading.cancel()
        self._release(request)
        if error is not None and request.begun.set_running_or_notify_cancel():
            request.begun.set_exception(error)
        request.ended(served)

    def _release(self, request: Request) -> None:
        lease, request.lease = request.lease, None
        if lease is not None:
            lease.release()
        if request.wish is not None:
            request.wish.release()
