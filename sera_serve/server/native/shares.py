"""`/v1/adapters/{tenant}/{name}/shares`: which other tenants may use an adapter."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from sera_serve.server.deps import ContextOf, NamePath, RequestContext, TenantPath, adapter_at
from sera_serve.server.native.access_schemas import ShareList
from sera_serve.server.strict import StrictRoute

router = APIRouter(route_class=StrictRoute, tags=["adapters"])

With = Annotated[str, Path(alias="with", description="a tenant, or * for every tenant")]


@router.get("/v1/adapters/{tenant}/{name}/shares")
async def list_shares(tenant: TenantPath, name: NamePath, context: ContextOf) -> ShareList:
    """The tenants that may use an adapter, beside its own."""
    adapter = adapter_at(tenant, name)
    context.caller.check_change(adapter)
    return await context.run(context.executors.changing, _list, context, adapter)


@router.put("/v1/adapters/{tenant}/{name}/shares/{with}")
async def share(tenant: TenantPath, name: NamePath, other: With, context: ContextOf) -> ShareList:
    """Let a tenant, or every tenant, use all versions of an adapter."""
    adapter = adapter_at(tenant, name)
    context.caller.check_change(adapter)
    return await context.run(context.executors.changing, _add, context, adapter, other)


@router.delete("/v1/adapters/{tenant}/{name}/shares/{with}")
async def end_share(tenant: TenantPath, name: NamePath, other: With, context: ContextOf) -> ShareList:
    """End a share. Requests under way are finished."""
    adapter = adapter_at(tenant, name)
    context.caller.check_change(adapter)
    return await context.run(context.executors.changing, _remove, context, adapter, other)


def _list(context: RequestContext, adapter: str) -> ShareList:
    context.store.resolve(adapter)
    return ShareList(adapter=adapter, shared_with=context.caller.access.shares.of(adapter))


def _add(context: RequestContext, adapter: str, other: str) -> ShareList:
    access = context.caller.access
    context.store.resolve(adapter)
    access.shares.add(adapter, other)
    access.refresh()
    context.record_adapter("share.add", adapter, **{"with": other})
    return _list(context, adapter)


def _remove(context: RequestContext, adapter: str, other: str) -> ShareList:
    access = context.caller.access
    if access.shares.remove(adapter, other):
        access.refresh()
        context.record_adapter("share.remove", adapter, **{"with": other})
    return _list(context, adapter)
