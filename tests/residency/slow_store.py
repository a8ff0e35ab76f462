"""A store of bundles that can be slow or fail, and what tests of residency wait for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from adapters_store import AdapterBundle
from sera_serve.residency import AdapterResidency, Lease

Build = Callable[..., AdapterResidency]
"""The fixture `build`."""


class Store:
    """Bundles that can be made slow or unreadable, and a record of the reads."""

    def __init__(self, bundles: dict[str, AdapterBundle]) -> None:
        self.bundles = dict(bundles)
        self.asked: list[str] = []
        self.failing: dict[str, Exception] = {}
        self.gates: dict[str, threading.Event] = {}
        self.reading: dict[str, threading.Event] = {}

    def hold(self, digest: str) -> None:
        """Have reads of an adapter wait for `let_go`."""
        self.gates[digest] = threading.Event()
        self.reading[digest] = threading.Event()

    def let_go(self) -> None:
        for gate in self.gates.values():
            gate.set()

    @contextmanager
    def loading(self, digest: str) -> Iterator[AdapterBundle]:
        self.asked.append(digest)
        if digest in self.gates:
            self.reading[digest].set()
            assert self.gates[digest].wait(30)
        if digest in self.failing:
            raise self.failing[digest]
        yield self.bundles[digest]


def granted(future: Future[Lease]) -> Lease:
    return future.result(timeout=10)


async def leased(residency: AdapterResidency, digest: str) -> Lease:
    """`acquire` for a coroutine: to cancel it leaves no lease held."""
    future = residency.acquire(digest)
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        # It may have been granted just before.
        if not future.cancelled():
            future.result().release()
        raise


def until(reached: Callable[[], bool]) -> None:
    """Wait for what another thread will bring about."""
    pause = threading.Event()
    deadline = time.monotonic() + 10
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError("it does not come about")
        pause.wait(0.001)


def wait_for_loads(residency: AdapterResidency) -> None:
    """Wait until no load is under way, those that wait for room left out."""

    def ended() -> bool:
        stats = residency.stats()
        return stats.loading == stats.waiting

    until(ended)
