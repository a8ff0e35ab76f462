"""One request for a batch, from its arrival to its end."""

from __future__ import annotations

import enum
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from sera_serve.engine.admission import Visit
from sera_serve.engine.fairness import Ticket
from sera_serve.residency import Lease, PrefetchHint


class Stage(enum.Enum):
    """Where a request's ticket is."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    GONE = enum.auto()


@dataclass(eq=False, kw_only=True)
class Request(Ticket):
    """A ticket for a batch, and what has to happen to it. Its owner sets the first group, the dispatcher the rest.

    Attributes:
        visit: The request that it is, or is a part of.
        digest: The adapter that it needs on the device; None is the bare base.
        begin: Puts it into the batch, under a lease unless it is the bare base's; raises SeraServeError if it cannot.
        ended: Called once, without a lock, when nothing is held for it any more, with whether it ran to its end.
        begun: Done when `begin` has returned, or with the error for which it never will be called.
    """

    visit: Visit
    digest: str | None
    begin: Callable[[Lease | None], None]
    ended: Callable[[bool], None] = lambda served: None

    begun: Future[None] = field(default_factory=Future, init=False)
    stage: Stage = field(default=Stage.WAITING, init=False)
    wish: PrefetchHint | None = field(default=None, init=False)
    loading: Future[Lease] | None = field(default=None, init=False)
    lease: Lease | None = field(default=None, init=False)
