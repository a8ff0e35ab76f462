"""`/v1/quotas`: what each tenant may hold and use, and what it does."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Path, Response

from adapters_store import Held
from sera_serve.access import DEFAULT, Limit, check_quota_tenant
from sera_serve.server.auth import NotYourTenant
from sera_serve.server.deps import ContextOf, RequestContext
from sera_serve.server.native.quota_schemas import QuotaDetail, QuotaLimits, QuotaList, QuotaRequest, QuotaUsage
from sera_serve.server.strict import StrictRoute

router = APIRouter(route_class=StrictRoute, tags=["quotas"])

QuotaTenant = Annotated[str, Path(description="a tenant, or * for every tenant without limits of its own")]
Live = tuple[int, int, int]
"""Requests in flight, and requests and tokens of this minute."""


@router.get("/v1/quotas", response_model=QuotaList)
async def list_quotas(context: ContextOf) -> Response:
    """The tenants with limits of their own, with what they use; `*` is every other tenant."""
    live = {tenant: _live(context, tenant) for tenant in context.quotas.tenants()}
    return Response(await context.run(context.executors.listing, _list, context, live), media_type="application/json")


@router.get("/v1/quotas/{tenant}")
async def inspect_quota(tenant: QuotaTenant, context: ContextOf) -> QuotaDetail:
    """The limits that hold for a tenant, and what it uses."""
    check_quota_tenant(tenant)
    own = context.caller.seen_tenant
    if own not in (None, tenant):
        raise NotYourTenant(f"the key acts for tenant {own!r}; ask for /v1/quotas/{own}", param="tenant")
    return await context.run(context.executors.listing, _detail, context, tenant, _live(context, tenant))


@router.put("/v1/quotas/{tenant}")
async def set_quota(tenant: QuotaTenant, body: QuotaRequest, context: ContextOf) -> QuotaDetail:
    """Set limits of a tenant; they hold from the next request on. What is left out stays as it is."""
    check_quota_tenant(tenant)
    limits: dict[str, Limit] = body.model_dump(include=body.model_fields_set)
    return await context.run(context.executors.changing, _set, context, tenant, limits, _live(context, tenant))


@router.delete("/v1/quotas/{tenant}")
async def clear_quota(tenant: QuotaTenant, context: ContextOf) -> QuotaDetail:
    """Take back the limits that were set for a tenant: those of the settings file, and of `*`, hold again."""
    check_quota_tenant(tenant)
    return await context.run(context.executors.changing, _clear, context, tenant, _live(context, tenant))


def _live(context: RequestContext, tenant: str) -> Live:
    """What changes from one moment to the next. On the event loop."""
    return context.engine.in_flight(tenant), *context.accounting.rates.used(tenant, context.quotas.of(tenant))


def _detail(context: RequestContext, tenant: str, live: Live) -> QuotaDetail:
    """The limits and the usage of a tenant. Blocks: adapters and jobs are counted."""
    in_flight, requests, tokens = live
    # Neither names a tenant of the store.
    held = Held() if tenant == DEFAULT or tenant.startswith("_") else context.store.held(tenant)
    usage = QuotaUsage(
        adapters=held.adapters,
        bytes=held.nbytes,
        requests_in_flight=in_flight,
        requests_this_minute=requests,
        tokens_this_minute=tokens,
        training_jobs=context.training.jobs.unfinished(tenant),
    )
    limits = QuotaLimits.model_validate(asdict(context.quotas.of(tenant)))
    return QuotaDetail(tenant=tenant, limits=limits, usage=usage)


def _list(context: RequestContext, live: dict[str, Live]) -> bytes:
    """The JSON of a `QuotaList`. One call for all of them would hold the interpreter's lock for too long."""
    details = ",".join(_detail(context, tenant, figures).model_dump_json() for tenant, figures in live.items())
    return f'{{"quotas":[{details}]}}'.encode()


def _set(context: RequestContext, tenant: str, limits: dict[str, Limit], live: Live) -> QuotaDetail:
    context.quotas.set(tenant, limits)
    context.record("quota.set", tenant, tenant, **limits)
    return _detail(context, tenant, live)


def _clear(context: RequestContext, tenant: str, live: Live) -> QuotaDetail:
    if context.quotas.clear(tenant):
        context.record("quota.clear", tenant, tenant)
    return _detail(context, tenant, live)
