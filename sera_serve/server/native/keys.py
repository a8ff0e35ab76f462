"""`/v1/me` and `/v1/keys`: who the caller is, and the keys of all tenants."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from adapters_store import check_part
from sera_serve.access import SCOPES, AccessControl, Actor, AuditLog
from sera_serve.server.auth import CallerOf
from sera_serve.server.deps import AuditOf, EngineOf, ExecutorsOf
from sera_serve.server.disconnect import cancel_on_disconnect
from sera_serve.server.native.access_schemas import (
    CallerDetail,
    CallersBase,
    KeyDetail,
    KeyList,
    KeyQuery,
    KeyRequest,
    NewKey,
)
from sera_serve.server.strict import StrictRoute

router = APIRouter(route_class=StrictRoute, tags=["keys"])


@router.get("/v1/me")
async def me(caller: CallerOf, engine: EngineOf) -> CallerDetail:
    """Who the caller is, what it may do, and the base model. Without keys, it may do everything."""
    base = CallersBase(name=engine.base.name, kind=engine.base.kind)
    return CallerDetail(
        tenant=caller.tenant,
        key_id=None if caller.key is None else caller.key.id,
        scopes=[scope for scope in SCOPES if caller.may(scope)],
        needs_keys=caller.access.needs_keys,
        base=base,
    )


@router.get("/v1/keys", response_model=KeyList)
async def list_keys(
    query: Annotated[KeyQuery, Query()], request: Request, caller: CallerOf, executors: ExecutorsOf
) -> Response:
    """All keys, or those of one tenant, oldest first; revoked and expired ones too."""
    work = executors.listing.run(_list, caller.access, query.tenant)
    return Response(await cancel_on_disconnect(request.receive, work), media_type="application/json")


@router.post("/v1/keys", status_code=201)
async def create_key(
    body: KeyRequest, request: Request, caller: CallerOf, executors: ExecutorsOf, audit: AuditOf
) -> NewKey:
    """Make a key. Its secret is in this answer and nowhere else."""
    work = executors.changing.run(_create, body, caller.access, audit, caller.actor)
    return await cancel_on_disconnect(request.receive, work)


@router.delete("/v1/keys/{id}")
async def revoke_key(id: str, request: Request, caller: CallerOf, executors: ExecutorsOf, audit: AuditOf) -> KeyDetail:
    """Refuse a key from now on. It stays in the list."""
    work = executors.changing.run(_revoke, id, caller.access, audit, caller.actor)
    return await cancel_on_disconnect(request.receive, work)


def _list(access: AccessControl, tenant: str | None) -> bytes:
    """The JSON of a `KeyList`. One call for all of them would hold the interpreter's lock for too long."""
    if tenant is not None:
        check_part(tenant, "tenant")
    keys = ",".join(KeyDetail.of(key).model_dump_json() for key in access.keys.all(tenant))
    return f'{{"keys":[{keys}]}}'.encode()


def _create(body: KeyRequest, access: AccessControl, audit: AuditLog, actor: Actor) -> NewKey:
    made = access.keys.create(body.tenant, body.scopes, name=body.name, lifetime_s=body.expires_in_s)
    access.refresh()
    audit.record(
        "key.create",
        actor,
        tenant=made.key.tenant,
        target=made.key.id,
        scopes=",".join(sorted(made.key.scopes)),
        expires_at=made.key.expires_at,
    )
    return NewKey.with_secret(made)


def _revoke(identifier: str, access: AccessControl, audit: AuditLog, actor: Actor) -> KeyDetail:
    key = access.keys.revoke(identifier)
    access.refresh()
    audit.record("key.revoke", actor, tenant=key.tenant, target=key.id)
    return KeyDetail.of(key)
