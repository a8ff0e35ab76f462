"""`/v1/quotas`: what each tenant may hold and use, and what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from adapters_store import Held
from sera_serve.access import DEFAULT, Actor, AuditLog, Holdings, Limit, Quotas, Rates, check_quota_tenant
from sera_serve.engine import ServingEngine
from sera_serve.server.accounting import AccountingOf
from sera_serve.server.auth import CallerOf, NotYourTenant
from sera_serve.server.deps import AuditOf, EngineOf, ExecutorsOf, HoldingsOf, QuotasOf
from sera_serve.server.disconnect import cancel_on_disconnect
from sera_serve.server.native.quota_schemas import QuotaDetail, QuotaLimits, QuotaList, QuotaRequest, QuotaUsage
from sera_serve.server.strict import StrictRoute

router = APIRouter(route_class=StrictRoute, tags=["quotas"])


class UsageReader:
    """Reads what tenants use of their quotas."""

    def __init__(
        self,
        engine: ServingEngine,
        rates: Rates,
        quotas: Quotas,
        holdings: Holdings,
        unfinished_jobs: Callable[[str], int],
    ) -> None:
        """Read from these."""
        self.quotas = quotas
        self._engine = engine
        self._rates = rates
        self._holdings = holdings
        self._unfinished_jobs = unfinished_jobs

    def live(self, tenant: str) -> tuple[int, int, int]:
        """Requests in flight, and requests and tokens of this minute. On the event loop."""
        return self._engine.in_flight(tenant), *self._rates.used(tenant, self.quotas.of(tenant))

    def detail(self, tenant: str, live: tuple[int, int, int]) -> QuotaDetail:
        """The limits and the usage of a tenant. Blocks: adapters and jobs are counted."""
        in_flight, requests, tokens = live
        # Neither names a tenant of the store.
        held = Held() if tenant == DEFAULT or tenant.startswith("_") else self._holdings.held(tenant)
        usage = QuotaUsage(
            adapters=held.adapters,
            bytes=held.nbytes,
            requests_in_flight=in_flight,
            requests_this_minute=requests,
            tokens_this_minute=tokens,
            training_jobs=self._unfinished_jobs(tenant),
        )
        return QuotaDetail(tenant=tenant, limits=QuotaLimits.of(self.quotas.of(tenant)), usage=usage)


async def _reader(
    request: Request, engine: EngineOf, accounting: AccountingOf, quotas: QuotasOf, holdings: HoldingsOf
) -> UsageReader:
    return UsageReader(engine, accounting.rates, quotas, holdings, request.app.state.unfinished_jobs)


ReaderOf = Annotated[UsageReader, Depends(_reader)]


@router.get("/v1/quotas", response_model=QuotaList)
async def list_quotas(request: Request, usage: ReaderOf, executors: ExecutorsOf) -> Response:
    """The tenants with limits of their own, with what they use; `*` is every other tenant."""
    live = {tenant: usage.live(tenant) for tenant in usage.quotas.tenants()}
    work = executors.listing.run(_list, usage, live)
    return Response(await cancel_on_disconnect(request.receive, work), media_type="application/json")


@router.get("/v1/quotas/{tenant}")
async def inspect_quota(
    tenant: str, request: Request, caller: CallerOf, usage: ReaderOf, executors: ExecutorsOf
) -> QuotaDetail:
    """The limits that hold for a tenant, and what it uses."""
    check_quota_tenant(tenant)
    if caller.tenant not in (None, tenant) and not caller.sees_all:
        raise NotYourTenant(
            f"the key acts for tenant {caller.tenant!r}; ask for /v1/quotas/{caller.tenant}", param="tenant"
        )
    work = executors.listing.run(usage.detail, tenant, usage.live(tenant))
    return await cancel_on_disconnect(request.receive, work)


@router.put("/v1/quotas/{tenant}")
async def set_quota(
    tenant: str,
    body: QuotaRequest,
    request: Request,
    caller: CallerOf,
    usage: ReaderOf,
    executors: ExecutorsOf,
    audit: AuditOf,
) -> QuotaDetail:
    """Set limits of a tenant; they hold from the next request on. What is left out stays as it is."""
    check_quota_tenant(tenant)
    limits: dict[str, Limit] = body.model_dump(include=body.model_fields_set)
    work = executors.changing.run(_set, usage, tenant, limits, usage.live(tenant), audit, caller.actor)
    return await cancel_on_disconnect(request.receive, work)


@router.delete("/v1/quotas/{tenant}")
async def clear_quota(
    tenant: str, request: Request, caller: CallerOf, usage: ReaderOf, executors: ExecutorsOf, audit: AuditOf
) -> QuotaDetail:
    """Take back the limits that were set for a tenant: those of the settings file, and of `*`, hold again."""
    check_quota_tenant(tenant)
    work = executors.changing.run(_clear, usage, tenant, usage.live(tenant), audit, caller.actor)
    return await cancel_on_disconnect(request.receive, work)


def _list(usage: UsageReader, live: dict[str, tuple[int, int, int]]) -> bytes:
    """The JSON of a `QuotaList`. One call for all of them would hold the interpreter's lock for too long."""
    details = ",".join(usage.detail(tenant, figures).model_dump_json() for tenant, figures in live.items())
    return f'{{"quotas":[{details}]}}'.encode()


def _set(
    usage: UsageReader,
    tenant: str,
    limits: dict[str, Limit],
    live: tuple[int, int, int],
    audit: AuditLog,
    actor: Actor,
) -> QuotaDetail:
    usage.quotas.set(tenant, limits)
    audit.record("quota.set", actor, tenant=tenant, target=tenant, **limits)
    return usage.detail(tenant, live)


def _clear(usage: UsageReader, tenant: str, live: tuple[int, int, int], audit: AuditLog, actor: Actor) -> QuotaDetail:
    if usage.quotas.clear(tenant):
        audit.record("quota.clear", actor, tenant=tenant, target=tenant)
    return usage.detail(tenant, live)
