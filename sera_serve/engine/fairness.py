"""Whose turn it is: tenants share a batch by the tokens that they were served, however much each of them asks for.

Virtual token counters, from "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024), algorithm 2.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

# Section 4 of the paper: what a token costs the server, by which a tenant is charged.
PROMPT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
_COUNTERS_KEPT = 1024


@dataclass(eq=False)
class Ticket:
    """Something that waits for its turn.

    Attributes:
        tenant: Who is charged.
        prompt_tokens: Charged when it is taken.
        priority: The higher goes first, among tickets of the same tenant only.
        places: How many places of the batch it takes.
        cache_tokens: The most tokens of the cache that it may come to hold.
        order: Of arrival; set by the queue.
    """

    tenant: str
    prompt_tokens: int
    priority: int = 0
    places: int = 1
    cache_tokens: int = 0
    order: int = field(default=-1, init=False)

    @property
    def rank(self) -> tuple[int, int]:
        """Its place among its tenant's tickets; the lowest goes first."""
        return -self.priority, self.order


T = TypeVar("T", bound=Ticket)


class FairQueue(Generic[T]):
    """Waiting tickets of all tenants. The next one is of the tenant with the lowest counter of tokens over weight.

    The bound (theorem 4.4): over any time in which two tenants always have a ticket on offer, their services in tokens,
    each over its weight, differ by at most 2 * max(PROMPT_WEIGHT * L, OUTPUT_WEIGHT * M), where L is the longest prompt
    and M the most output that the running batch may hold. It does not depend on what the others send, nor on how
    long the time is. Nothing running is interrupted for it, hence M.

    A tenant that had nothing waiting is lifted to the lowest counter of those who have: idling saves up no claim.
    Tickets set aside, such as those whose adapter is loading, hold nobody up and keep their place.
    Not thread-safe: the caller holds a lock.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        """Make an empty queue; a tenant without a weight has 1."""
        self._weights = dict(weights or {})
        self._counters: dict[str, float] = {}
        self._waiting: dict[str, list[T]] = {}
        self._offered: dict[str, list[T]] = {}
        self._tenants = _LowestFirst(self._counters)
        self._on_offer = _LowestFirst(self._counters)
        self._aside: set[T] = set()
        self._last: str | None = None
        self._orders = itertools.count()
        self._prune_at = _COUNTERS_KEPT

    def __len__(self) -> int:
        """How many tickets wait, those set aside included."""
        return sum(map(len, self._waiting.values()))

    def tickets(self) -> list[T]:
        """All that wait, those set aside included."""
        return [ticket for tickets in self._waiting.values() for ticket in tickets]

    def counter(self, tenant: str) -> float:
        """Tokens that the tenant was charged, over its weight, from a start that only differences cancel."""
        return self._counters.get(tenant, 0.0)

    def push(self, ticket: T) -> None:
        """Let a ticket wait, on offer."""
        ticket.order = next(self._orders)
        if ticket.tenant not in self._waiting:
            self._counters[ticket.tenant] = max(self._counters.get(ticket.tenant, 0.0), self._floor())
            self._waiting[ticket.tenant] = []
            self._tenants.add(ticket.tenant)
            self._prune()
        bisect.insort(self._waiting[ticket.tenant], ticket, key=_rank)
        self._offer(ticket)

    def first(self) -> T | None:
        """The ticket whose turn it is, or None if none is on offer."""
        tenant = self._on_offer.lowest()
        return None if tenant is None else self._offered[tenant][0]

    def last_of(self, tenant: str) -> T | None:
        """The ticket of a tenant that would be its last, or None if it has none."""
        waiting = self._waiting.get(tenant)
        return waiting[-1] if waiting else None

    def claim(self, ticket: T) -> tuple[float, tuple[int, int]]:
        """Sorts waiting tickets by how soon it is their turn as things stand; the lowest is the first."""
        return self.counter(ticket.tenant), ticket.rank

    def set_aside(self, ticket: T) -> None:
        """Offer others instead; the ticket keeps its place in the order."""
        self._aside.add(ticket)
        self._withhold(ticket)

    def put_back(self, ticket: T) -> None:
        """Offer a ticket that was set aside."""
        self._aside.remove(ticket)
        self._offer(ticket)

    def remove(self, ticket: T) -> None:
        """Let a ticket go uncharged, on offer or not."""
        if ticket in self._aside:
            self._aside.remove(ticket)
        else:
            self._withhold(ticket)
        waiting = self._waiting[ticket.tenant]
        _take_out(waiting, ticket)
        if not waiting:
            del self._waiting[ticket.tenant]
            self._tenants.discard(ticket.tenant)
            self._last = ticket.tenant

    def take(self, ticket: T) -> None:
        """Let a ticket go into the batch, and charge its prompt."""
        self.remove(ticket)
        self._charge(ticket.tenant, PROMPT_WEIGHT * ticket.prompt_tokens)

    def charge_output(self, tenant: str, tokens: int) -> None:
        """Charge a tenant for tokens that were generated."""
        self._charge(tenant, OUTPUT_WEIGHT * tokens)

    def _offer(self, ticket: T) -> None:
        bisect.insort(self._offered.setdefault(ticket.tenant, []), ticket, key=_rank)
        self._on_offer.add(ticket.tenant)

    def _withhold(self, ticket: T) -> None:
        offered = self._offered[ticket.tenant]
        _take_out(offered, ticket)
        if not offered:
            del self._offered[ticket.tenant]
            self._on_offer.discard(ticket.tenant)

    def _charge(self, tenant: str, cost: float) -> None:
        if tenant not in self._counters:
            self._counters[tenant] = self._floor()
        self._counters[tenant] += cost / self._weights.get(tenant, 1.0)

    def _floor(self) -> float:
        """What a tenant that comes anew is lifted to."""
        tenant = self._tenants.lowest() or self._last
        return 0.0 if tenant is None else self._counters[tenant]

    def _prune(self) -> None:
        """Forget counters of idle tenants that they would be lifted from anyway; seldom, so that it costs nothing."""
        if len(self._counters) <= self._prune_at:
            return
        floor = self._floor()
        for tenant, counter in list(self._counters.items()):
            if counter <= floor and tenant not in self._waiting and tenant != self._last:
                del self._counters[tenant]
        self._prune_at = 2 * len(self._counters) + _COUNTERS_KEPT


class _LowestFirst:
    """A set of tenants that knows the one with the lowest counter; counters only rise."""

    def __init__(self, counters: Mapping[str, float]) -> None:
        self._counters = counters
        self._members: set[str] = set()
        self._in_heap: set[str] = set()
        # Old counters may stand here: they are put right when they come to the top. Ties go to the longest unserved.
        self._heap: list[tuple[float, int, str]] = []
        self._entries = itertools.count()

    def add(self, tenant: str) -> None:
        self._members.add(tenant)
        if tenant not in self._in_heap:
            self._in_heap.add(tenant)
            heapq.heappush(self._heap, (self._counters[tenant], next(self._entries), tenant))

    def discard(self, tenant: str) -> None:
        self._members.discard(tenant)

    def lowest(self) -> str | None:
        while self._heap:
            counter, _, tenant = self._heap[0]
            if tenant not in self._members:
                heapq.heappop(self._heap)
                self._in_heap.discard(tenant)
            elif self._counters[tenant] != counter:
                heapq.heapreplace(self._heap, (self._counters[tenant], next(self._entries), tenant))
            else:
                return tenant
        return None


def _rank(ticket: Ticket) -> tuple[int, int]:
    return ticket.rank


def _take_out(tickets: list[T], ticket: T) -> None:
    del tickets[bisect.bisect_left(tickets, ticket.rank, key=_rank)]
