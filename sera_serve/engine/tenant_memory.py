"""Shares of memory by tenant, of one kind of thing that requests under way hold."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

TENANT_BYTES = 1 << 30
ALL_BYTES = 4 << 30


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
    """Who has reserved how much. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reservations: weakref.WeakSet[Reservation] = weakref.WeakSet()

    def grow(self, reservation: Reservation, nbytes: int) -> bool:
        """Reserve more memory; False where the tenant would have too much, and nothing is changed.

        That is more than 1 GiB, or, where all tenants together would have more than 4 GiB, more than its equal share.
        """
        with self._lock:
            held: dict[str | None, int] = {reservation.tenant: nbytes}
            for other in self._reservations:
                held[other.tenant] = held.get(other.tenant, 0) + other.nbytes
            share = ALL_BYTES // len(held) if sum(held.values()) > ALL_BYTES else TENANT_BYTES
            if held[reservation.tenant] > min(share, TENANT_BYTES):
                return False
            reservation.nbytes += nbytes
            self._reservations.add(reservation)
            return True
