"""Where every request comes in: the limits, the queues of the two batches, and the wait for a turn."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from adapters_store import parse_ref
from sera_serve.config import ServeSettings
from sera_serve.engine.admission import Door, Room, Visit
from sera_serve.engine.dispatch import Dispatcher
from sera_serve.engine.fairness import FairQueue
from sera_serve.engine.generation import deadline_exceeded
from sera_serve.engine.principal import BASE_TENANT
from sera_serve.engine.request import Request
from sera_serve.residency import AdapterResidency

T = TypeVar("T")
_MAX_WAITING_LEASES = 32


class Reception:
    """Counts the requests under way, and makes them wait.

    Generation and classification have a fair queue and a room each: places in one are of no use to the other, and a
    tenant that is ahead in one would otherwise wait in the other for tenants that never come there.
    """

    def __init__(self, settings: ServeSettings, residency: AdapterResidency) -> None:
        """Start with nothing under way and no queue."""
        self._settings = settings
        self._residency = residency
        self._door = Door(settings.max_queue, settings.max_queue_per_tenant)
        self._dispatchers: list[Dispatcher] = []

    def open_queue(self, room: Room) -> Dispatcher:
        """A queue before a room, for a batch that is about to be made."""
        # Of the device's slots, those who wait hold a quarter at most.
        leases = min(_MAX_WAITING_LEASES, max(1, self._settings.max_resident // 4))
        queue = FairQueue[Request](self._settings.tenant_weights)
        self._dispatchers.append(Dispatcher(queue, room, self._residency, leases))
        return self._dispatchers[-1]

    def inside(self) -> int:
        """Requests that came in and are not finished."""
        return self._door.inside()

    def waiting(self) -> int:
        """Sequences, and parts of classifications, that wait for their turn."""
        return sum(dispatcher.waiting() for dispatcher in self._dispatchers)

    def running(self) -> int:
        """Sequences, and parts of classifications, in a batch."""
        return sum(dispatcher.running() for dispatcher in self._dispatchers)

    def enter(self, adapter: str | None) -> Visit:
        """Let a request in; whoever called this sees to it that the visit ends.

        Raises:
            InvalidAdapterName: The reference cannot be read.
            TenantOverloaded, Overloaded: Too many requests are under way.
        """
        tenant = BASE_TENANT if adapter is None else parse_ref(adapter).parts[0]
        return self._door.enter(tenant, self._displace)

    def leave(self, visit: Visit, served: bool = False) -> None:
        """End a visit. Idempotent."""
        self._door.leave(visit, served)

    async def turn(self, request: Request, deadline: float | None) -> None:
        """Wait until a request is in its batch; whatever is raised, the caller withdraws it then.

        Raises:
            Overloaded: It was not within the time that the settings allow.
            DeadlineExceeded: It was not by the deadline.
            Exception: Why it cannot be.
        """
        allowed = self._settings.request_timeout_s
        latest = asyncio.get_running_loop().time() + allowed
        try:
            if not request.begun.done():
                async with asyncio.timeout_at(latest if deadline is None else min(latest, deadline)):
                    await asyncio.wrap_future(request.begun)
        except TimeoutError:
            if deadline is not None and deadline <= latest:
                raise deadline_exceeded() from None
            raise self._door.overloaded(f"the request did not get its turn within {allowed:g} s") from None
        request.begun.result()

    def close(self) -> None:
        """Refuse all that wait."""
        for dispatcher in self._dispatchers:
            dispatcher.close()

    def _displace(self, tenant: str) -> bool:
        for dispatcher in self._dispatchers:
            request = dispatcher.turn_away(tenant, self._door.refusal(tenant))
            if request is not None:
                self._door.leave(request.visit)
                return True
        return False


def deadline_after(timeout_s: float | None) -> float | None:
    """The time of the running event loop in so many seconds; None is never."""
    return None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s


async def finish_by(deadline: float | None, work: Awaitable[T]) -> T:
    """Await `work`, or cancel it at the deadline and raise DeadlineExceeded."""
    try:
        async with asyncio.timeout_at(deadline):
            return await work
    except TimeoutError:
        raise deadline_exceeded() from None
