"""`/v1/me` and `/v1/keys`: who the caller is, and the keys of all tenants."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from sera_serve.access import SCOPES, AccessControl
from sera_serve.server.deps import ContextOf, RequestContext
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
async def me(context: ContextOf) -> CallerDetail:
    """Who the caller is, what it may do, and the base model. Without keys, it may do everything."""
    base = CallersBase(name=context.engine.base.name, kind=context.engine.base.kind)
    return CallerDetail(
        tenant=context.caller.tenant,
        key_id=None if context.caller.key is None else context.caller.key.id,
        scopes=[scope for scope in SCOPES if context.caller.may(scope)],
        needs_keys=context.caller.access.needs_keys,
        base=base,
    )


@router.get("/v1/keys", response_model=KeyList)
async def list_keys(query: Annotated[KeyQuery, Query()], context: ContextOf) -> Response:
    """All keys, or those of one tenant, oldest first; revoked and expired ones too."""
    return Response(
        await context.run(context.executors.listing, _list, context.caller.access, query.tenant),
        media_type="application/json",
    )


@router.post("/v1/keys", status_code=201)
async def create_key(body: KeyRequest, context: ContextOf) -> NewKey:
    """Make a key. Its secret is in this answer and nowhere else."""
    return await context.run(context.executors.changing, _create, body, context)


@router.delete("/v1/keys/{id}")
async def revoke_key(
    id: Annotated[str, Path(description="the id of a key, which is not its secret")], context: ContextOf
) -> KeyDetail:
    """Refuse a key from now on. It stays in the list."""
    return await context.run(context.executors.changing, _revoke, id, context)


def _list(access: AccessControl, tenant: str | None) -> bytes:
    """The JSON of a `KeyList`. One call for all of them would hold the interpreter's lock for too long."""
    keys = ",".join(KeyDetail.of(key).model_dump_json() for key in access.keys.all(tenant))
    return f'{{"keys":[{keys}]}}'.encode()


def _create(body: KeyRequest, context: RequestContext) -> NewKey:
    access = context.caller.access
    made = access.keys.create(body.tenant, body.scopes, name=body.name, lifetime_s=body.expires_in_s)
    access.refresh()
    scopes = ",".join(sorted(made.key.scopes))
    context.record("key.create", made.key.tenant, made.key.id, scopes=scopes, expires_at=made.key.expires_at)
    return NewKey(**made.key.described(), secret=made.secret)


def _revoke(identifier: str, context: RequestContext) -> KeyDetail:
    access = context.caller.access
    key = access.keys.revoke(identifier)
    access.refresh()
    context.record("key.revoke", key.tenant, key.id)
    return KeyDetail.of(key)
