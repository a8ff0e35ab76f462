"""The order of waiting requests: tenants share a batch by the tokens that they were served, not by what they ask for.

Virtual token counters, from "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024), algorithm 2.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Mapping
from typing import Generic, TypeVar

from sera_serve.engine.request import Request

# Section 4 of the paper: what a token costs the server, by which a tenant is charged.
PROMPT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
_COUNTERS_KEPT = 1024

R = TypeVar("R", bound=Request)


class FairQueue(Generic[R]):
    """Waiting requests of all tenants. The next request is of the tenant with the lowest counter of tokens over weight.

    The bound (theorem 4.4): over any time in which two tenants always have a request on offer, their services in
    tokens, each over its weight, differ by at most 2 * max(PROMPT_WEIGHT * L, OUTPUT_WEIGHT * M). L is the longest
    prompt, and M the most output that the running batch may hold. The bound does not depend on what the other tenants
    send, nor on the length of that time. The order interrupts a running request only where pages run out, or where
    another tenant has less than its share of the rows or of the pages; hence M.

    A tenant that had nothing waiting is lifted to the lowest counter of the tenants that have: an idle tenant saves
    nothing up. A parked request, such as one whose adapter is loading, delays no other request and keeps its place.
    Not thread-safe: the caller holds a lock.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        """Make an empty queue; a tenant without a weight has 1."""
        self._weights = dict(weights or {})
        self._counters: dict[str, float] = {}
        self._waiting: dict[str, list[R]] = {}
        self._offered: dict[str, list[R]] = {}
        self._tenants = _LowestFirst(self._counters)
        self._on_offer = _LowestFirst(self._counters)
        self._parked: set[R] = set()
        self._last: str | None = None
        self._orders = itertools.count()
        self._prune_at = _COUNTERS_KEPT

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Charge by other weights from now on. What was charged stays: a tenant's past is not weighed again."""
        self._weights = dict(weights)

    def weight(self, tenant: str) -> float:
        """The tenant's weight."""
        return self._weights.get(tenant, 1.0)

    def __len__(self) -> int:
        """How many requests wait, parked ones included."""
        return sum(map(len, self._waiting.values()))

    def waiting_of(self, tenant: str) -> int:
        """How many requests of a tenant wait, parked ones included."""
        return len(self._waiting.get(tenant, ()))

    def requests(self) -> list[R]:
        """All that wait, parked ones included."""
        return [request for requests in self._waiting.values() for request in requests]

    def counter(self, tenant: str) -> float:
        """Tokens that the tenant was charged, over its weight. Only the difference of two tenants has a meaning."""
        return self._counters.get(tenant, 0.0)

    def push(self, request: R) -> None:
        """Let a request wait, on offer. A preempted request keeps its place in the order of arrival."""
        if request.order < 0:
            request.order = next(self._orders)
        if request.tenant not in self._waiting:
            self._counters[request.tenant] = max(self._counters.get(request.tenant, 0.0), self._floor())
            self._waiting[request.tenant] = []
            self._tenants.add(request.tenant)
            self._prune()
        bisect.insort(self._waiting[request.tenant], request, key=_rank)
        self._offer(request)

    def first(self) -> R | None:
        """The request whose turn it is, or None if none is on offer."""
        tenant = self._on_offer.lowest()
        return None if tenant is None else self._offered[tenant][0]

    def last_of(self, tenant: str) -> R | None:
        """The request of a tenant that would be its last, or None if it has none."""
        waiting = self._waiting.get(tenant)
        return waiting[-1] if waiting else None

    def priority_key(self, request: R) -> tuple[float, tuple[int, int]]:
        """Sorts requests, waiting or running, in the fair order: the lowest goes first, the highest is preempted."""
        return self._counters.get(request.tenant, self._floor()), request.rank

    def park(self, request: R) -> None:
        """Offer others instead; the request keeps its place in the order."""
        self._parked.add(request)
        self._withhold(request)

    def unpark(self, request: R) -> None:
        """Offer a parked request."""
        self._parked.remove(request)
        self._offer(request)

    def remove(self, request: R) -> None:
        """Let a request go uncharged, on offer or not."""
        if request in self._parked:
            self._parked.remove(request)
        else:
            self._withhold(request)
        waiting = self._waiting[request.tenant]
        _take_out(waiting, request)
        if not waiting:
            del self._waiting[request.tenant]
            self._tenants.discard(request.tenant)
            self._last = request.tenant

    def charge_prompt(self, request: R) -> None:
        """Charge a tenant for a prompt; once for each request, because a preemption is not the tenant's doing."""
        self._charge(request.tenant, PROMPT_WEIGHT * request.prompt_tokens)

    def charge_output(self, tenant: str, tokens: int) -> None:
        """Charge a tenant for tokens that were generated."""
        self._charge(tenant, OUTPUT_WEIGHT * tokens)

    def _offer(self, request: R) -> None:
        bisect.insort(self._offered.setdefault(request.tenant, []), request, key=_rank)
        self._on_offer.add(request.tenant)

    def _withhold(self, request: R) -> None:
        offered = self._offered[request.tenant]
        _take_out(offered, request)
        if not offered:
            del self._offered[request.tenant]
            self._on_offer.discard(request.tenant)

    def _charge(self, tenant: str, cost: float) -> None:
        if tenant not in self._counters:
            self._counters[tenant] = self._floor()
        self._counters[tenant] += cost / self.weight(tenant)

    def _floor(self) -> float:
        """The counter that a newly waiting tenant is lifted to."""
        tenant = self._tenants.lowest() or self._last
        return 0.0 if tenant is None else self._counters[tenant]

    def _prune(self) -> None:
        """Forget counters of idle tenants that a lift would replace; rarely, so that the cost is small."""
        if len(self._counters) <= self._prune_at:
            return
        floor = self._floor()
        for tenant, counter in list(self._counters.items()):
            if counter <= floor and tenant not in self._waiting and tenant != self._last:
                del self._counters[tenant]
        self._prune_at = 2 * len(self._counters) + _COUNTERS_KEPT


class _LowestFirst:
    """A set of tenants that finds the tenant with the lowest counter; counters only rise."""

    def __init__(self, counters: Mapping[str, float]) -> None:
        self._counters = counters
        self._members: set[str] = set()
        self._in_heap: set[str] = set()
        # Entries may hold old counters: `lowest` corrects an entry when it reaches the top. Ties go to the tenant that
        # has waited longest for service.
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


def _rank(request: Request) -> tuple[int, int]:
    return request.rank


def _take_out(requests: list[R], request: R) -> None:
    del requests[bisect.bisect_left(requests, request.rank, key=_rank)]
