"""Shares of memory by tenant, of one kind of thing that requests under way hold."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass


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
