"""What compiled constraints may take of memory: one of them, all of a tenant's, and all together.

The library does not tell what it holds, and nothing else can be measured while other threads allocate too. So each
compiled text reserves the most that it may grow to, for as long as it exists. Nearly all texts need little. One that
outgrows its room is compiled anew in the larger one.
"""

from __future__ import annotations

from dataclasses import dataclass

from sera_serve.engine.constraint import FIELDS, ConstraintSpec
from sera_serve.engine.tenant_memory import Reservation, TenantMemory
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


@dataclass(eq=False, kw_only=True)
class ConstraintReservation(Reservation):
    """What one compiled constraint may take."""

    room: Room


class ConstraintMemory(TenantMemory):
    """Who has reserved how much for constraints. Any thread."""

    def reserve(self, room: Room, tenant: str | None) -> ConstraintReservation | None:
        """Reserve memory, or None where the tenant would have too much; see `grow`."""
        reservation = ConstraintReservation(tenant, room=room)
        return reservation if self.grow(reservation, room.nbytes) else None


def too_many(spec: ConstraintSpec) -> TenantOverloaded:
    """What the client is told for whose constraint there is no memory now."""
    field = FIELDS[spec.kind]
    return TenantOverloaded(
        f"{field} cannot be compiled now: the different schemas, regular expressions and grammars of this tenant's "
        "requests under way may take too much memory together; send fewer of them at a time",
        param=field,
    )
