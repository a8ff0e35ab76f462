"""`/v1/adapters/{tenant}/{name}/shares`: which other tenants may use an adapter."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request

from adapters_store import AdapterStore, parse_adapter
from sera_serve.access import AccessControl, Actor, AuditLog
from sera_serve.server.auth import CallerOf
from sera_serve.server.deps import AuditOf, ExecutorsOf, StoreOf
from sera_serve.server.disconnect import cancel_on_disconnect
from sera_serve.server.native.access_schemas import ShareList
from sera_serve.server.strict import StrictRoute

router = APIRouter(route_class=StrictRoute, tags=["adapters"])

With = Annotated[str, Path(alias="with", description="a tenant, or * for every tenant")]


@router.get("/v1/adapters/{tenant}/{name}/shares")
async def list_shares(
    tenant: str, name: str, request: Request, caller: CallerOf, store: StoreOf, executors: ExecutorsOf
) -> ShareList:
    """The tenants that may use an adapter, beside its own."""
    adapter = _adapter(tenant, name)
    caller.check_change(adapter)
    work = executors.changing.run(_list, store, caller.access, adapter)
    return await cancel_on_disconnect(request.receive, work)


@router.put("/v1/adapters/{tenant}/{name}/shares/{with}")
async def share(
    tenant: str,
    name: str,
    other: With,
    request: Request,
    caller: CallerOf,
    store: StoreOf,
    executors: ExecutorsOf,
    audit: AuditOf,
) -> ShareList:
    """Let a tenant, or every tenant, use all versions of an adapter."""
    adapter = _adapter(tenant, name)
    caller.check_change(adapter)
    work = executors.changing.run(_add, store, caller.access, adapter, other, audit, caller.actor)
    return await cancel_on_disconnect(request.receive, work)


@router.delete("/v1/adapters/{tenant}/{name}/shares/{with}")
async def end_share(
    tenant: str,
    name: str,
    other: With,
    request: Request,
    caller: CallerOf,
    store: StoreOf,
    executors: ExecutorsOf,
    audit: AuditOf,
) -> ShareList:
    """End a share. Requests under way are finished."""
    adapter = _adapter(tenant, name)
    caller.check_change(adapter)
    work = executors.changing.run(_remove, store, caller.access, adapter, other, audit, caller.actor)
    return await cancel_on_disconnect(request.receive, work)


def _adapter(tenant: str, name: str) -> str:
    adapter = f"{tenant}/{name}"
    parse_adapter(adapter)
    return adapter


def _list(store: AdapterStore, access: AccessControl, adapter: str) -> ShareList:
    store.resolve(adapter)
    return ShareList(adapter=adapter, shared_with=access.shares.of(adapter))


def _add(
    store: AdapterStore, access: AccessControl, adapter: str, other: str, audit: AuditLog, actor: Actor
) -> ShareList:
    store.resolve(adapter)
    access.shares.add(adapter, other)
    access.refresh()
    audit.record("share.add", actor, tenant=adapter.partition("/")[0], target=adapter, **{"with": other})
    return _list(store, access, adapter)


def _remove(
    store: AdapterStore, access: AccessControl, adapter: str, other: str, audit: AuditLog, actor: Actor
) -> ShareList:
    if access.shares.remove(adapter, other):
        access.refresh()
        audit.record("share.remove", actor, tenant=adapter.partition("/")[0], target=adapter, **{"with": other})
    return _list(store, access, adapter)
