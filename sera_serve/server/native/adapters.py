"""`/v1/adapters`: uploading, listing, inspecting and deleting."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from adapters_store import AdapterStore, ResolvedAdapter
from adapters_store import AdapterSummary as StoredAdapter
from adapters_store.errors import AdapterNotFound
from sera_serve.access import AccessControl, Actor, AuditLog, Holdings
from sera_serve.engine import Presence, ServingEngine
from sera_serve.server.auth import Caller, CallerOf
from sera_serve.server.deps import AuditOf, EngineOf, Executors, ExecutorsOf, HoldingsOf, SettingsOf, StoreOf
from sera_serve.server.disconnect import cancel_on_disconnect
from sera_serve.server.native.schemas import (
    AdapterDetail,
    AdapterList,
    AdapterSummary,
    DeletedAdapter,
    ListQuery,
    PinnedAdapter,
    PublishedAdapter,
)
from sera_serve.server.native.uploads import Upload, receive_upload
from sera_serve.server.publishing import publish, record_publication, remove
from sera_serve.server.strict import StrictRoute
from sera_serve.server.visible import visible_page
from sera_serve.threads import pause

router = APIRouter(route_class=StrictRoute, tags=["adapters"])

_UPLOAD_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["bundle", "name"],
                    "properties": {
                        "bundle": {"type": "string", "format": "binary"},
                        "name": {"type": "string", "description": "tenant/name"},
                        "config": {
                            "type": "string",
                            "format": "binary",
                            "description": "adapter_config.json of a PEFT checkpoint that is one safetensors file",
                        },
                    },
                }
            }
        },
    }
}


# Each route waits under `cancel_on_disconnect`: work whose client has left before the work began is not begun.


@router.post("/v1/adapters", status_code=201, openapi_extra=_UPLOAD_FORM)
async def upload(
    request: Request,
    caller: CallerOf,
    engine: EngineOf,
    store: StoreOf,
    settings: SettingsOf,
    executors: ExecutorsOf,
    holdings: HoldingsOf,
    audit: AuditOf,
) -> PublishedAdapter:
    """Publish a bundle, or a PEFT checkpoint, as the next version of an adapter.

    It is checked and on disk when this answers 201.
    """
    max_bytes = settings.max_upload_mib << 20
    async with receive_upload(request) as received:
        caller.check_publish(received.name)
        # Until the publisher is free, the upload lies on disk. When this block ends, the file is closed: a publication
        # that has begun is waited for, even if the client has left.
        work = executors.publishing.run_to_end(
            _publish, received, engine, store, max_bytes, caller.access, holdings, audit, caller.actor
        )
        published = await cancel_on_disconnect(request.receive, work)
    return published


@router.get("/v1/adapters", response_model=AdapterList)
async def list_adapters(
    query: Annotated[ListQuery, Query()],
    request: Request,
    caller: CallerOf,
    engine: EngineOf,
    store: StoreOf,
    executors: ExecutorsOf,
) -> Response:
    """The adapters in order of their ids, a page at a time."""
    content = await cancel_on_disconnect(request.receive, executors.listing.run(_page, caller, engine, store, query))
    return Response(content, media_type="application/json")


@router.get("/v1/adapters/{tenant}/{name}")
async def inspect(
    tenant: str,
    name: str,
    request: Request,
    caller: CallerOf,
    engine: EngineOf,
    store: StoreOf,
    executors: ExecutorsOf,
) -> AdapterDetail:
    """One version of an adapter; `name` may carry @alias, @v3 or @digest."""
    caller.check_use(f"{tenant}/{name}")
    work = executors.changing.run(_detail, engine, store, f"{tenant}/{name}")
    return await cancel_on_disconnect(request.receive, work)


@router.delete("/v1/adapters/{tenant}/{name}")
async def delete(
    tenant: str,
    name: str,
    request: Request,
    caller: CallerOf,
    engine: EngineOf,
    store: StoreOf,
    executors: ExecutorsOf,
    holdings: HoldingsOf,
    audit: AuditOf,
) -> DeletedAdapter:
    """Delete an adapter, or with @ one version of it; requests under way keep the version they began with."""
    caller.check_change(f"{tenant}/{name}")
    work = executors.changing.run(
        remove, f"{tenant}/{name}", engine, store, caller.access, holdings, audit, caller.actor
    )
    await cancel_on_disconnect(request.receive, work)
    return DeletedAdapter(adapter=f"{tenant}/{name}")


@router.put("/v1/adapters/{tenant}/{name}/pin")
async def pin(
    tenant: str,
    name: str,
    request: Request,
    caller: CallerOf,
    engine: EngineOf,
    store: StoreOf,
    executors: ExecutorsOf,
    audit: AuditOf,
) -> PinnedAdapter:
    """Keep one version of an adapter on the device until the version is unpinned or deleted, or the server ends."""
    caller.check_change(f"{tenant}/{name}")
    work = _pin(f"{tenant}/{name}", engine, store, executors, audit, caller.actor)
    resolved = await cancel_on_disconnect(request.receive, work)
    return PinnedAdapter(adapter=resolved.adapter, version=resolved.version, pinned=True)


@router.delete("/v1/adapters/{tenant}/{name}/pin")
async def unpin(
    tenant: str,
    name: str,
    request: Request,
    caller: CallerOf,
    engine: EngineOf,
    store: StoreOf,
    executors: ExecutorsOf,
    audit: AuditOf,
) -> PinnedAdapter:
    """Let one version of an adapter leave the device again."""
    caller.check_change(f"{tenant}/{name}")
    work = executors.changing.run(_unpin, f"{tenant}/{name}", engine, store, audit, caller.actor)
    resolved = await cancel_on_disconnect(request.receive, work)
    return PinnedAdapter(adapter=resolved.adapter, version=resolved.version, pinned=False)


def _publish(
    received: Upload,
    engine: ServingEngine,
    store: AdapterStore,
    max_bytes: int,
    access: AccessControl,
    holdings: Holdings,
    audit: AuditLog,
    actor: Actor,
) -> PublishedAdapter:
    made = publish(received.read(max_bytes), received.name, engine, store, access, holdings)
    version = made.version
    record_publication(version, audit, actor)
    return PublishedAdapter(
        adapter=version.adapter, version=version.version, digest=version.digest, warnings=list(made.warnings)
    )


async def _pin(
    reference: str, engine: ServingEngine, store: AdapterStore, executors: Executors, audit: AuditLog, actor: Actor
) -> ResolvedAdapter:
    resolved = await executors.changing.run(store.resolve, reference)
    await engine.pin(resolved.digest, reference)
    await executors.changing.run(_record_pin, "adapter.pin", resolved, audit, actor)
    return resolved


def _record_pin(
    action: Literal["adapter.pin", "adapter.unpin"], resolved: ResolvedAdapter, audit: AuditLog, actor: Actor
) -> None:
    tenant = resolved.adapter.partition("/")[0]
    audit.record(action, actor, tenant=tenant, target=resolved.adapter, version=resolved.version)


def _unpin(
    reference: str, engine: ServingEngine, store: AdapterStore, audit: AuditLog, actor: Actor
) -> ResolvedAdapter:
    try:
        resolved = store.resolve(reference)
    except AdapterNotFound:
        # Another server may have deleted what is pinned here. The reference tells its digest no more.
        engine.drop_deleted_pins()
        raise
    engine.unpin(resolved.digest, reference)
    _record_pin("adapter.unpin", resolved, audit, actor)
    return resolved


def _page(caller: Caller, engine: ServingEngine, store: AdapterStore, query: ListQuery) -> bytes:
    """The JSON of an `AdapterList`. One call for the whole page would hold the interpreter's lock for too long."""
    page = visible_page(caller, store, query.after, query.limit, query.tenant)
    places = engine.presence([(info.adapter, info.digest) for info in page.adapters])
    adapters = []
    for info, place in zip(page.adapters, places, strict=True):
        pause()
        adapters.append(AdapterSummary(**_summary(info, place)).model_dump_json())
    return f'{{"adapters":[{",".join(adapters)}],"next":{json.dumps(page.next)}}}'.encode()


def _detail(engine: ServingEngine, store: AdapterStore, reference: str) -> AdapterDetail:
    info = store.inspect(reference)
    return AdapterDetail(
        **_summary(info, engine.presence([(info.adapter, info.digest)])[0]),
        versions=list(info.versions),
        aliases=info.aliases,
        config=store.config(info.digest).model_dump(mode="json"),
    )


def _summary(info: StoredAdapter, place: Presence) -> dict[str, Any]:
    return {
        "adapter": info.adapter,
        "version": info.version,
        "digest": info.digest,
        "task": info.task,
        "method": info.method,
        "base": info.base,
        "labels": None if info.labels is None else list(info.labels),
        "ranks": list(info.ranks),
        "splits": list(info.splits),
        "modules": info.modules,
        "has_chat_template": info.has_chat_template,
        "parameters": info.parameters,
        "bytes": info.nbytes,
        "created_at": info.created_at,
        "tier": place.tier,
        "pinned": place.is_pinned,
    }
