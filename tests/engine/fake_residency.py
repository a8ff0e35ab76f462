"""A dispatcher over adapters that arrive when the test says so."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any, cast

from sera_serve.engine.dispatch import Dispatcher

from sera_serve.engine.admission import Room, Visit
from sera_serve.engine.fair_queue import FairQueue
from sera_serve.engine.request import Request
from sera_serve.errors import UnsupportedTask
from sera_serve.residency import AdapterResidency, Lease


class FakeLease:
    def __init__(self, residency: FakeResidency, digest: str) -> None:
        self.residency, self.digest, self.held = residency, digest, True
        with residency.lock:
            residency.leases += 1

    def release(self) -> None:
        with self.residency.lock:
            self.residency.leases -= self.held
            self.held = False


class FakeResidency:
    """Adapters are there once `arrive` was called, and stay."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.leases = self.wishes = 0
        self.here: set[str] = set()
        self.waiting: list[tuple[str, Future[FakeLease]]] = []

    def acquire(self, digest: str) -> Future[FakeLease]:
        future: Future[FakeLease] = Future()
        with self.lock:
            if digest in self.here:
                future.set_result(FakeLease(self, digest))
            else:
                self.waiting.append((digest, future))
        return future

    def prefetch(self, digest: str) -> Any:
        residency = self
        with self.lock:
            self.wishes += 1

        class Wish:
            held = True

            def release(self) -> None:
                with residency.lock:
                    residency.wishes -= self.held
                    self.held = False

        return Wish()

    def arrive(self, digest: str, error: Exception | None = None) -> None:
        with self.lock:
            if error is None:
                self.here.add(digest)
            told = [future for wanted, future in self.waiting if wanted == digest]
            self.waiting = [(wanted, future) for wanted, future in self.waiting if wanted != digest]
        for future in told:
            if future.set_running_or_notify_cancel():
                if error is None:
                    future.set_result(FakeLease(self, digest))
                else:
                    future.set_exception(error)


class Line:
    """A dispatcher, and what it has done."""

    def __init__(self, places: int, max_waiting_leases: int = 2) -> None:
        self.residency = FakeResidency()
        self.queue = FairQueue[Request]()
        self.room = Room(places)
        residency = cast(AdapterResidency, self.residency)
        self.dispatcher = Dispatcher(self.queue, self.room, residency, max_waiting_leases)
        self.begun: list[Request] = []
        self.ended: list[tuple[Request, bool]] = []

    def submit(self, tenant: str, digest: str | None = None, refuse: bool = False, **fields: Any) -> Request:
        def begin(lease: Lease | None) -> None:
            assert (lease is None) == (digest is None)
            if refuse:
                raise UnsupportedTask("for something else", param="adapter")
            self.begun.append(request)

        request = Request(
            tenant=tenant,
            prompt_tokens=10,
            visit=Visit(tenant, 0.0),
            digest=digest,
            begin=begin,
            ended=lambda served: self.ended.append((request, served)),
            **fields,
        )
        self.dispatcher.submit(request)
        return request

    def holds_nothing(self) -> bool:
        return (
            len(self.queue) == len(self.room) == self.residency.leases == self.residency.wishes == 0
            and not self.dispatcher._leased
            and not any(not future.cancelled() for _, future in self.residency.waiting)
        )
