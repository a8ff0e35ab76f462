"""Shares of memory by tenant, of one kind of thing that requests under way hold, such as log-probabilities."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

from sera_serve.errors import TenantOverloaded

LOGPROB_BYTES = 128
"""Of one log-probability: some 20 until it is written, and then its JSON until the answer is sent."""
# Log-probabilities that are reserved at once: to reserve is to look at all reservations.
_AT_ONCE = 2048


@dataclass(eq=False)
class Reservation:
    """Memory that something may take. It ends when nobody refers to it any more.

    Attributes:
        tenant: Whose share it is of.
        nbytes: How much; `TenantMemory` alone changes it.
    """

    tenant: str | None
    nbytes: int = 0


class TenantMemory:
    """Who has reserved how much. Any thread.

    Attributes:
        tenant_bytes: What a tenant may have.
        all_bytes: What all tenants may have together before each has an equal share.
    """

    tenant_bytes = 1 << 30
    all_bytes = 4 << 30

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reservations: weakref.WeakSet[Reservation] = weakref.WeakSet()

    def grow(self, reservation: Reservation, nbytes: int, alone: bool = False) -> bool:
        """Reserve more memory; False where the tenant would have too much, and nothing is changed.

        That is more than `tenant_bytes`, or, where all tenants together would have more than `all_bytes`, more than its
        equal share. With `alone`, a tenant gets as much as it asks for where nobody has any.
        """
        with self._lock:
            held: dict[str | None, int] = {reservation.tenant: nbytes}
            for other in self._reservations:
                held[other.tenant] = held.get(other.tenant, 0) + other.nbytes
            share = self.all_bytes // len(held) if sum(held.values()) > self.all_bytes else self.tenant_bytes
            is_first = alone and sum(held.values()) == nbytes
            if held[reservation.tenant] > min(share, self.tenant_bytes) and not is_first:
                return False
            reservation.nbytes += nbytes
            self._reservations.add(reservation)
            return True

    def release(self, reservation: Reservation) -> None:
        """End a reservation that somebody may still refer to."""
        with self._lock:
            self._reservations.discard(reservation)


class LogprobRoom:
    """Room for the log-probabilities of one call. It ends when nobody refers to it any more.

    A call alone is bounded where it is admitted, by what it could come to. All calls of a tenant are counted as their
    tokens come. Most end long before their limit, and would be refused for nothing.

    One thread at a time may use it: that of the event loop before the call's requests are queued, and then the loop's.
    """

    def __init__(self, memory: TenantMemory, tenant: str) -> None:
        """Begin with nothing."""
        self._memory = memory
        self._reservation = Reservation(tenant)
        self._left = 0

    def take(self, count: int) -> bool:
        """Count further log-probabilities; False where the calls of the tenant would have too many together."""
        if count > self._left:
            more = max(_AT_ONCE, count - self._left)
            if not self._memory.grow(self._reservation, more * LOGPROB_BYTES):
                return False
            self._left += more
        self._left -= count
        return True


def too_many_logprobs(param: str) -> TenantOverloaded:
    """The refusal of a request whose log-probabilities find no memory now; the field `param` asked for them."""
    return TenantOverloaded(
        f"the log-probabilities of this tenant's requests under way take too much memory together; send fewer requests "
        f"with {param} at a time, or ask for fewer at each token",
        param=param,
    )
