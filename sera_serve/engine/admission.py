"""What the server takes on: limits on the requests in flight, in all and of one tenant."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from sera_serve.engine.request import Request
from sera_serve.errors import Overloaded, TenantOverloaded, TooManyInFlight, counted

_RATE_SECONDS = 20.0
_LONGEST_RETRY_S = 60


class AdmissionController:
    """Counts the requests in flight, and refuses a request where there are too many.

    When the server is full, a tenant with few requests in flight may still get one in: a waiting request of the tenant
    with the most is shed for it. So a flood of one tenant does not keep the others out.

    Locking: each public method takes the lock of this object. `shed` is called without the lock.
    """

    def __init__(self, limit: int, tenant_limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Count from nothing.

        Args:
            limit: The most requests in flight, waiting or running.
            tenant_limit: The same for one tenant; a request's principal may lower it.
            clock: Seconds.
        """
        self._limit = limit
        self._tenant_limit = tenant_limit
        self._clock = clock
        self._lock = threading.Lock()
        self._by_tenant: dict[str, int] = {}
        self._total = 0
        self._rate = ServiceRate(clock())

    def in_flight(self, tenant: str | None = None) -> int:
        """Requests that were admitted and are not finished; those of one tenant if given."""
        return self._total if tenant is None else self._by_tenant.get(tenant, 0)

    def admit(self, request: Request, shed: Callable[[str], bool]) -> None:
        """Count a request until `release`.

        Args:
            request: A call of a client, not a part of one.
            shed: Finishes one waiting request of the tenant that it is given (`release` included), or returns False.

        Raises:
            TooManyInFlight: The tenant has as many requests in flight as its principal allows.
            TenantOverloaded: The tenant has as many requests in flight as it may.
            Overloaded: The server has, and no tenant has many more than this one.
        """
        tenant = request.tenant
        while True:
            with self._lock:
                own = self._by_tenant.get(tenant, 0)
                own_limit = request.principal.max_in_flight
                if own_limit is not None and own >= own_limit:
                    raise TooManyInFlight(
                        f"tenant {tenant!r} has {counted(own, 'request')} in flight, and may have {own_limit}; send it "
                        "again later",
                        retry_after=self._seconds_for(own * len(self._by_tenant)),
                    )
                if own >= self._tenant_limit:
                    raise self.refusal(tenant)
                if self._total < self._limit:
                    self._rate.resume(self._clock(), self._total)
                    self._total += 1
                    self._by_tenant[tenant] = own + 1
                    request.admitted = True
                    return
                busiest = max(self._by_tenant, key=self._by_tenant.__getitem__)
                too_many = self.overloaded(
                    f"the server has {counted(self._total, 'request')} in flight, the most allowed"
                )
                if self._by_tenant[busiest] <= own + 1:
                    raise too_many
            if not shed(busiest):
                raise too_many

    def release(self, request: Request, served: bool = False) -> None:
        """Count a request no more. Idempotent."""
        with self._lock:
            if not request.admitted:
                return
            request.admitted = False
            self._total -= 1
            self._by_tenant[request.tenant] -= 1
            if not self._by_tenant[request.tenant]:
                del self._by_tenant[request.tenant]
            if served:
                self._rate.record(self._clock())

    def refusal(self, tenant: str, reason: str | None = None, param: str = "adapter") -> TenantOverloaded:
        """The refusal of a request whose tenant has too many; it says when the present ones may be done."""
        own = self._by_tenant.get(tenant, 0)
        reason = reason or f"tenant {tenant!r} has {counted(own, 'request')} in flight, more than its share"
        return TenantOverloaded(
            f"{reason}; send it again later",
            param=param,
            retry_after=self._seconds_for(own * len(self._by_tenant)),
        )

    def overloaded(self, reason: str) -> Overloaded:
        """A refusal that says when the requests in flight may be done."""
        return Overloaded(f"{reason}; send it again later", retry_after=self._seconds_for(self._total))

    def _seconds_for(self, requests: int) -> int:
        rate = self._rate.per_second()
        return min(_LONGEST_RETRY_S, max(1, math.ceil(requests / rate))) if rate else 1


class ServiceRate:
    """Requests served per second of busy time; those of the last `_RATE_SECONDS` count most."""

    def __init__(self, now: float) -> None:
        self._at = now
        self._served = 0.0
        self._seconds = 0.0

    def resume(self, now: float, in_flight: int) -> None:
        """Let time count from now on, if nothing was in flight until now."""
        if not in_flight:
            self._at = now

    def record(self, now: float) -> None:
        """Count one served request."""
        passed, self._at = now - self._at, now
        keep = math.exp(-passed / _RATE_SECONDS)
        self._served = self._served * keep + 1
        self._seconds = self._seconds * keep + _RATE_SECONDS * (1 - keep)

    def per_second(self) -> float:
        """The rate, or 0 where nothing is known."""
        return self._served / self._seconds if self._seconds > 0 else 0.0
