"""What routes depend on: the threads of the routes' work, and FastAPI dependencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from adapters_store import AdapterStore
from sera_serve.access import AuditLog, Holdings, Quotas
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server.metrics import ServerMetrics
from sera_serve.threads import BoundedExecutor

_CHANGING_THREADS = 4
# Of one core, pages of a long list take an eighth at most, beyond a first burst: clients that asked for page after page
# made generations take four times as long.
_LISTING_REST = 7
_MAX_WAITING = 64


@dataclass(frozen=True)
class Executors:
    """The threads of the routes' own work, by kind: no kind can take the threads of another one, or the engine's.

    Attributes:
        listing: Pages of adapters. A page of a large store is read for a second. The thread then rests.
        publishing: Reads, checks and publishes uploads. It has one thread, so one bundle at a time is in memory. malloc
            keeps a heap for each thread: with several threads, each heap would grow to the size of the largest bundles.
        changing: Single adapters: inspecting, deleting, pinning.
        forms: Forms of images, which are in memory whole.
    """

    listing: BoundedExecutor
    publishing: BoundedExecutor
    changing: BoundedExecutor
    forms: BoundedExecutor

    @classmethod
    def of(cls, settings: ServeSettings) -> Executors:
        """Make the executors of one app. No thread is started yet."""
        return cls(
            listing=BoundedExecutor("listing", 1, _MAX_WAITING, _LISTING_REST),
            publishing=BoundedExecutor("publishing", 1, settings.max_uploads),
            changing=BoundedExecutor("changing", _CHANGING_THREADS, _MAX_WAITING),
            forms=BoundedExecutor("reading forms", 1, _MAX_WAITING),
        )

    def close(self) -> None:
        """Begin no more work, and tell every caller so."""
        for executor in (self.listing, self.publishing, self.changing, self.forms):
            executor.close()


# The dependencies are coroutines. FastAPI would call plain functions in a thread, and each such call costs several
# hand-overs of the interpreter's lock.
async def _engine(request: Request) -> ServingEngine:
    return cast(ServingEngine, request.app.state.engine)


async def _store(request: Request) -> AdapterStore:
    return cast(AdapterStore, request.app.state.store)


async def _settings(request: Request) -> ServeSettings:
    return cast(ServeSettings, request.app.state.settings)


async def _executors(request: Request) -> Executors:
    return cast(Executors, request.app.state.executors)


async def _received_at(request: Request) -> float | None:
    return cast(float | None, getattr(request.state, "received_at", None))


async def _holdings(request: Request) -> Holdings:
    return cast(Holdings, request.app.state.holdings)


async def _quotas(request: Request) -> Quotas:
    return cast(Quotas, request.app.state.quotas)


async def _audit(request: Request) -> AuditLog:
    return cast(AuditLog, request.app.state.audit)


async def _metrics(request: Request) -> ServerMetrics:
    return cast(ServerMetrics, request.app.state.metrics)


EngineOf = Annotated[ServingEngine, Depends(_engine)]
StoreOf = Annotated[AdapterStore, Depends(_store)]
SettingsOf = Annotated[ServeSettings, Depends(_settings)]
MetricsOf = Annotated[ServerMetrics, Depends(_metrics)]
HoldingsOf = Annotated[Holdings, Depends(_holdings)]
QuotasOf = Annotated[Quotas, Depends(_quotas)]
AuditOf = Annotated[AuditLog, Depends(_audit)]
ExecutorsOf = Annotated[Executors, Depends(_executors)]
# When the request's first byte came (`time.monotonic`). Time limits count from it.
ReceivedAt = Annotated[float | None, Depends(_received_at)]
