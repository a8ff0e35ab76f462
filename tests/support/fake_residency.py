"""A scheduler over adapters that arrive when the test says so."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any, cast

from adapters_store import BaseInfo, ResolvedAdapter
from sera_serve.engine.admission import AdmissionController
from sera_serve.engine.request import FinishReason, Principal, Request
from sera_serve.engine.scheduler import Scheduler
from sera_serve.residency import AdapterResidency, Claim


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
        self.leases = self.hints = 0
        self.here: set[str] = set()
        self.claims: list[tuple[str, Claim | None]] = []
        self.waiting: list[tuple[str, Future[FakeLease]]] = []

    def acquire(self, digest: str, claim: Claim | None = None) -> Future[FakeLease]:
        future: Future[FakeLease] = Future()
        with self.lock:
            self.claims.append((digest, claim))
            if digest in self.here:
                future.set_result(FakeLease(self, digest))
            else:
                self.waiting.append((digest, future))
        return future

    def prefetch(self, digest: str, claim: Claim | None = None) -> Any:
        residency = self
        with self.lock:
            self.hints += 1
            self.claims.append((digest, claim))

        class Hint:
            held = True

            def release(self) -> None:
                with residency.lock:
                    residency.hints -= self.held
                    self.held = False

        return Hint()

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


class Bench:
    """A scheduler over a batch of so many rows, run by hand, and what it has done.

    `step` does what a loop does before each step: it starts requests while they fit. Real loops are woken; here every
    event of the test is followed by a step, unless the test holds the loop.
    """

    def __init__(self, rows: int, max_waiting_leases: int = 2) -> None:
        self.residency = FakeResidency()
        self.admission = AdmissionController(1 << 20, 1 << 20)
        residency = cast(AdapterResidency, self.residency)
        self.scheduler = Scheduler[Request](self.admission, residency, max_waiting_leases)
        self.free = rows
        self.started: list[Request] = []
        self._stepping = threading.Lock()
        self._again = False
        self.scheduler.wake = self.step

    def submit(self, tenant: str, digest: str | None = None, **fields: Any) -> Request:
        adapter = None if digest is None else resolved(f"{tenant}/x", digest)
        request = Request(principal=Principal(tenant), prompt_tokens=10, adapter=adapter, **fields)
        self.admission.admit(request, lambda tenant: False)
        self.scheduler.submit([request])
        return request

    def step(self) -> None:
        """Start requests while they fit; one thread at a time, as a loop's thread does."""
        self._again = True
        while self._again and self._stepping.acquire(blocking=False):
            try:
                self._again = False
                while (request := self.scheduler.first()) is not None and request.num_rows <= self.free:
                    if self.scheduler.start(request):
                        self.free -= request.num_rows
                        self.started.append(request)
                self.scheduler.hint_new()
            finally:
                self._stepping.release()

    def finish(self, request: Request, reason: FinishReason = FinishReason.LENGTH) -> None:
        with self._stepping:
            self.scheduler.finish(request, reason)
            self.free += request.num_rows
        self.step()

    def holds_nothing(self) -> bool:
        self.scheduler.check_invariants()
        return (
            self.scheduler.waiting() == self.scheduler.running() == self.admission.in_flight() == 0
            and self.residency.leases == self.residency.hints == 0
            and not any(not future.cancelled() for _, future in self.residency.waiting)
        )


def resolved(adapter: str, digest: str) -> ResolvedAdapter:
    base = BaseInfo(name="b", architecture="A", config_digest="0" * 64, weights_digest="0" * 64, hidden_size=1)
    return ResolvedAdapter(adapter, 1, digest, "generate", None, base, None)
