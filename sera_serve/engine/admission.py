"""The limits of what the server takes on: requests under way in all and of one tenant, and the room of a batch."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from sera_serve.engine.fairness import Ticket
from sera_serve.errors import Overloaded, TenantOverloaded

_RATE_SECONDS = 20.0
_LONGEST_RETRY_S = 60


@dataclass(eq=False)
class Visit:
    """One request from its arrival to its end."""

    tenant: str
    arrived: float
    inside: bool = True


class Door:
    """Counts the requests under way, and refuses those that are too many.

    When the server is full, a tenant with few requests under way may still come in: one that waits, of the tenant
    with the most, is turned away for it. So a flood cannot keep others out. Thread-safe.
    """

    def __init__(self, limit: int, tenant_limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Count from nothing.

        Args:
            limit: The most requests under way, waiting or running.
            tenant_limit: The same for one tenant.
            clock: Seconds.
        """
        self._limit = limit
        self._tenant_limit = tenant_limit
        self._clock = clock
        self._lock = threading.Lock()
        self._by_tenant: dict[str, int] = {}
        self._total = 0
        self._rate = ServiceRate(clock())

    def inside(self) -> int:
        """Requests under way."""
        return self._total

    def enter(self, tenant: str, displace: Callable[[str], bool]) -> Visit:
        """Let a request in.

        Args:
            tenant: Whose it is.
            displace: Turns away one waiting request of the tenant it is given (`leave` included), or returns False.

        Raises:
            TenantOverloaded: The tenant has as many requests under way as it may.
            Overloaded: The server has, and no tenant has many more than this one.
        """
        while True:
            with self._lock:
                own = self._by_tenant.get(tenant, 0)
                if own >= self._tenant_limit:
                    raise self.refusal(tenant)
                if self._total < self._limit:
                    self._rate.resume(self._clock(), self._total)
                    self._total += 1
                    self._by_tenant[tenant] = own + 1
                    return Visit(tenant, self._clock())
                busiest = max(self._by_tenant, key=self._by_tenant.__getitem__)
                too_many = Overloaded(
                    f"{self._total} requests are under way, the most allowed; send it again later",
                    retry_after=self._seconds_for(self._total),
                )
                if self._by_tenant[busiest] <= own + 1:
                    raise too_many
            if not displace(busiest):
                raise too_many

    def leave(self, visit: Visit, served: bool = False) -> None:
        """Note a request's end. Idempotent."""
        with self._lock:
            if not visit.inside:
                return
            visit.inside = False
            self._total -= 1
            self._by_tenant[visit.tenant] -= 1
            if not self._by_tenant[visit.tenant]:
                del self._by_tenant[visit.tenant]
            if served:
                self._rate.record(self._clock())

    def refusal(self, tenant: str) -> TenantOverloaded:
        """The refusal of a request whose tenant has too many; it says when its present ones may be done."""
        own = self._by_tenant.get(tenant, 0)
        return TenantOverloaded(
            f"tenant {tenant!r} has {own} requests under way, more than its part; send it again later",
            param="adapter",
            retry_after=self._seconds_for(own * len(self._by_tenant)),
        )

    def overloaded(self, reason: str) -> Overloaded:
        """A refusal that says when the requests now under way may be done."""
        return Overloaded(f"{reason}; send it again later", retry_after=self._seconds_for(self._total))

    def _seconds_for(self, requests: int) -> int:
        rate = self._rate.per_second()
        return min(_LONGEST_RETRY_S, max(1, math.ceil(requests / rate))) if rate else 1


class ServiceRate:
    """Requests served a second while there were any; those of the last `_RATE_SECONDS` count most."""

    def __init__(self, now: float) -> None:
        self._at = now
        self._served = 0.0
        self._seconds = 0.0

    def resume(self, now: float, under_way: int) -> None:
        """Let time count from now on, if nothing was under way until now."""
        if not under_way:
            self._at = now

    def record(self, now: float) -> None:
        """Count one that was served."""
        passed, self._at = now - self._at, now
        keep = math.exp(-passed / _RATE_SECONDS)
        self._served = self._served * keep + 1
        self._seconds = self._seconds * keep + _RATE_SECONDS * (1 - keep)

    def per_second(self) -> float:
        """The rate, or 0 where nothing is known."""
        return self._served / self._seconds if self._seconds > 0 else 0.0


class Room:
    """The room of a batch. A ticket that fits enters at once, so the batch has no queue of its own; not thread-safe."""

    def __init__(self, places: int, cache_tokens: float = math.inf, prefill_tokens: float = math.inf) -> None:
        """Make an empty room.

        Args:
            places: The most places that tickets may take.
            cache_tokens: The most tokens that they may come to hold in the cache, so that nobody is ever put out of it.
            prefill_tokens: The most prompt tokens that may wait to be computed; more would be a queue in itself.
        """
        self._places, self._cache_tokens, self._prefill_tokens = places, cache_tokens, prefill_tokens
        self._taken = self._held = 0
        self._prefilling: dict[Ticket, int] = {}
        self._inside: set[Ticket] = set()

    def __len__(self) -> int:
        """How many tickets are inside."""
        return len(self._inside)

    def fits(self, ticket: Ticket) -> bool:
        """Whether it may enter; a ticket larger than the whole room may when nobody else is inside."""
        return not self._inside or (
            self._taken + ticket.places <= self._places
            and self._held + ticket.cache_tokens <= self._cache_tokens
            and (not self._prefilling or sum(self._prefilling.values()) + ticket.prompt_tokens <= self._prefill_tokens)
        )

    def enter(self, ticket: Ticket) -> None:
        """Take its places."""
        self._inside.add(ticket)
        self._prefilling[ticket] = ticket.prompt_tokens
        self._taken += ticket.places
        self._held += ticket.cache_tokens

    def prefilled(self, ticket: Ticket) -> bool:
        """Note that its prompt is computed; whether this was news."""
        return self._prefilling.pop(ticket, None) is not None

    def leave(self, ticket: Ticket) -> None:
        """Give its places back."""
        self._inside.remove(ticket)
        self.prefilled(ticket)
        self._taken -= ticket.places
        self._held -= ticket.cache_tokens
