"""What compiled constraints may take of memory: one of them, all of a tenant's, and all together.

The library does not tell what it holds, and nothing else can be measured while other threads allocate too. So each
compiled text reserves the most that it may grow to, for as long as it exists. Nearly all texts need little. One that
outgrows its room is compiled anew in the larger one.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

from sera_serve.engine.constraint import FIELDS, ConstraintSpec
from sera_serve.errors import TenantOverloaded


@dataclass(frozen=True)
class Room:
    """How far a compiled constraint may grow.

    Attributes:
        states: Of the library's automaton, which gets further ones while texts are checked.
        nbytes: What that takes, with the grammar itself, of a hostile text.
    """

    states: int
    nbytes: int


SMALL = Room(2000, 4 << 20)
"""Schemas of 100 properties, and grammars of 200 terminals, take less than half of the states."""
LARGE = Room(20_000, 36 << 20)

_TENANT_BYTES = 1 << 30
_ALL_BYTES = 4 << 30


@dataclass(frozen=True, eq=False)
class Reservation:
    """Memory that one compiled constraint may take. It ends when nobody refers to it any more."""

    room: Room
    tenant: str | None


class ConstraintMemory:
    """Who has reserved how much. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reservations: weakref.WeakSet[Reservation] = weakref.WeakSet()

    def reserve(self, room: Room, tenant: str | None) -> Reservation | None:
        """Reserve memory, or None where the tenant would have too much.

        That is more than 1 GiB, or, where all tenants together would have more than 4 GiB, more than its equal share.
        """
        with self._lock:
            held: dict[str | None, int] = {tenant: room.nbytes}
            for other in self._reservations:
                held[other.tenant] = held.get(other.tenant, 0) + other.room.nbytes
            share = _ALL_BYTES // len(held) if sum(held.values()) > _ALL_BYTES else _TENANT_BYTES
            if held[tenant] > min(share, _TENANT_BYTES):
                return None
            reservation = Reservation(room, tenant)
            self._reservations.add(reservation)
            return reservation


def too_many(spec: ConstraintSpec) -> TenantOverloaded:
    """What the client is told for whose constraint there is no memory now."""
    field = FIELDS[spec.kind]
    return TenantOverloaded(
        f"{field} cannot be compiled now: the different schemas, regular expressions and grammars of this tenant's "
        "requests under way may take too much memory together; send fewer of them at a time",
        param=field,
    )
