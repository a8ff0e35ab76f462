"""What routes depend on: the threads of their work, and the request with what its app has for it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ParamSpec, TypeVar

from fastapi import Depends, Path, Request

from adapters_store import AdapterStore, parse_adapter, parse_ref
from sera_serve.access import Action, AuditLog, Holdings, Quotas
from sera_serve.config import ServeSettings
from sera_serve.engine import AdapterChoice, Principal, Priority, ServingEngine
from sera_serve.server.accounting import Account, Accounting
from sera_serve.server.auth import caller_of
from sera_serve.server.disconnect import cancel_on_disconnect
from sera_serve.server.long_answers import written
from sera_serve.server.metrics import ServerMetrics
from sera_serve.server.publishing import Publisher
from sera_serve.server.training import Training
from sera_serve.threads import BoundedExecutor

P = ParamSpec("P")
T = TypeVar("T")

# Parts of the paths of several routes.
TenantPath = Annotated[str, Path(description="the tenant: the first part of an adapter's name, before the /")]
NamePath = Annotated[str, Path(description="the second part of the adapter's name, after the /; without @")]
VersionPath = Annotated[
    str,
    Path(description="the second part of the adapter's name, after the /; for one version with @alias, @v3 or @digest"),
]

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
        most = _MAX_WAITING // 2
        return cls(
            listing=BoundedExecutor("listing", 1, _MAX_WAITING, _LISTING_REST, max_waiting_of_owner=most),
            publishing=BoundedExecutor("publishing", 1, settings.max_uploads),
            changing=BoundedExecutor("changing", _CHANGING_THREADS, _MAX_WAITING, max_waiting_of_owner=most),
            forms=BoundedExecutor("reading forms", 1, _MAX_WAITING, max_waiting_of_owner=most),
        )

    def close(self) -> None:
        """Begin no more work, and tell every caller so."""
        for executor in (self.listing, self.publishing, self.changing, self.forms):
            executor.close()


class RequestContext:
    """One request as its route sees it: who sent it, and what its app has for it.

    Attributes:
        request: The request.
        caller: Who sent it.
        received_at: When its first byte came (`time.monotonic`). Time limits count from it.
    """

    def __init__(self, request: Request) -> None:
        """Read the state of the request and of its app."""
        state = request.app.state
        self.request = request
        self.caller = caller_of(request)
        self.received_at: float | None = getattr(request.state, "received_at", None)
        self.engine: ServingEngine = state.engine
        self.store: AdapterStore = state.store
        self.settings: ServeSettings = state.settings
        self.executors: Executors = state.executors
        self.publisher: Publisher = state.publisher
        self.training: Training = state.training
        self.holdings: Holdings = state.holdings
        self.quotas: Quotas = state.quotas
        self.metrics: ServerMetrics = state.metrics
        self.accounting: Accounting = state.accounting
        self._audit: AuditLog = state.audit

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, or cancel it when the client leaves; see `cancel_on_disconnect`."""
        return await cancel_on_disconnect(self.request.receive, work)

    async def run(self, executor: BoundedExecutor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`finish`, for a function that blocks. What has not begun when the client leaves is not begun.

        Tenants with keys take turns, one call of each at a time.
        """
        return await self.finish(executor.run_in_turn(self.caller.tenant, work, *args, **kwargs))

    async def written(self, pieces: Iterable[str]) -> bytes:
        """Join the pieces of an answer that may be long; see `long_answers.written`."""
        return await written(pieces, self.engine.loop_turns(), self.caller.owner)

    def principal(self, adapter: AdapterChoice | None) -> Principal:
        """The principal of a request that names `adapter`. The request's line in the log has both, also if refused.

        Raises:
            InvalidAdapterName, AdapterNotFound, InvalidRequest: As `Caller.principal`.
        """
        if isinstance(adapter, str):
            # Parsed first: a name that is none may be anything, such as a prompt.
            parse_ref(adapter)
            self.request.state.record.adapter = adapter
        return self._logged(self.caller.principal(adapter))

    def principal_of_all(self, adapters: Sequence[str]) -> Principal:
        """The principal of a request whose field `adapters` names several; the request's line in the log has it.

        Raises:
            InvalidAdapterName, AdapterNotFound, InvalidRequest: As `Caller.principal_of_all`.
        """
        return self._logged(self.caller.principal_of_all(adapters, "adapters"))

    def _logged(self, principal: Principal) -> Principal:
        # Here, and not with the account: a tenant that has used its quota up gets none.
        self.request.state.record.tenant = principal.tenant
        return principal

    def open_account(self, principal: Principal, asked: Priority | None) -> Account:
        """Open the account of the request, which names a priority or none; raises as `Accounting.open` does."""
        return self.accounting.open(self.request, principal, asked)

    def record(self, action: Action, tenant: str, target: str, **details: str | int | float | bool | None) -> None:
        """Tell the audit log what the caller did; see `AuditLog.record`. Blocks."""
        self._audit.record(action, self.caller.actor, tenant=tenant, target=target, **details)

    def record_adapter(self, action: Action, adapter: str, **details: str | int) -> None:
        """`record`, for an adapter `tenant/name`."""
        self.record(action, adapter.partition("/")[0], adapter, **details)


def adapter_at(tenant: str, name: str) -> str:
    """The adapter of a path, without a version; raises InvalidAdapterName."""
    parse_adapter(f"{tenant}/{name}")
    return f"{tenant}/{name}"


# A coroutine: FastAPI would call a plain function in a thread, which costs hand-overs of the interpreter's lock.
async def _context(request: Request) -> RequestContext:
    return RequestContext(request)


ContextOf = Annotated[RequestContext, Depends(_context)]
