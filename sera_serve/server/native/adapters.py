"""`/v1/adapters`: uploading, listing, inspecting and deleting."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from adapters_store import AdapterSummary as StoredAdapter
from adapters_store import ResolvedAdapter
from adapters_store.errors import AdapterNotFound
from sera_serve.engine import Presence
from sera_serve.server.deps import ContextOf, RequestContext, TenantPath, VersionPath
from sera_serve.server.errors import renamed_fields
from sera_serve.server.native.schemas import (
    AdapterDetail,
    AdapterList,
    AdapterSummary,
    DeletedAdapter,
    ListQuery,
    PinnedAdapter,
    PublishedAdapter,
)
from sera_serve.server.native.upload_form import form_content
from sera_serve.server.native.uploads import Upload, receive_upload
from sera_serve.server.strict import StrictRoute
from sera_serve.server.visible_adapters import visible_page
from sera_serve.threads import pause

router = APIRouter(route_class=StrictRoute, tags=["adapters"])

_UPLOAD_FORM = form_content(
    ["bundle", "name"],
    {
        "bundle": {
            "type": "string",
            "format": "binary",
            "description": "a bundle as .safetensors or .tar, or a PEFT checkpoint as .tar, .zip or its "
            "adapter_model.safetensors",
        },
        "name": {"type": "string", "description": "tenant/name; the adapter need not exist yet"},
        "config": {
            "type": "string",
            "format": "binary",
            "description": "adapter_config.json of a PEFT checkpoint that is one safetensors file",
        },
    },
)


# Each route waits under `RequestContext.finish`: work whose client has left before the work began is not begun.


@router.post(
    "/v1/adapters", status_code=201, openapi_extra={"requestBody": {"required": True, "content": _UPLOAD_FORM}}
)
async def upload(context: ContextOf) -> PublishedAdapter:
    """Publish a bundle, or a PEFT checkpoint, as the next version of an adapter.

    It is checked and on disk when this answers 201.
    """
    async with receive_upload(context.request) as received:
        with renamed_fields({"adapter": "name"}):
            context.caller.check_publish(received.name)
        # Until the publisher is free, the upload lies on disk. When this block ends, the file is closed: a publication
        # that has begun is waited for, even if the client has left. Tenants take turns.
        owner = received.name.partition("/")[0]
        work = context.executors.publishing.run_to_end(owner, _publish, received, context)
        published = await context.finish(work)
    return published


@router.get("/v1/adapters", response_model=AdapterList)
async def list_adapters(query: Annotated[ListQuery, Query()], context: ContextOf) -> Response:
    """The adapters in order of their ids, a page at a time."""
    content = await context.run(context.executors.listing, _page, context, query)
    return Response(content, media_type="application/json")


@router.get("/v1/adapters/{tenant}/{name}")
async def inspect(tenant: TenantPath, name: VersionPath, context: ContextOf) -> AdapterDetail:
    """One version of an adapter; `name` may carry @alias, @v3 or @digest."""
    reference = f"{tenant}/{name}"
    context.caller.check_use(reference)
    return await context.run(context.executors.changing, _detail, context, reference)


@router.delete("/v1/adapters/{tenant}/{name}")
async def delete(tenant: TenantPath, name: VersionPath, context: ContextOf) -> DeletedAdapter:
    """Delete an adapter, or with @ one version of it; requests under way keep the version they began with."""
    reference = f"{tenant}/{name}"
    context.caller.check_change(reference)
    await context.run(context.executors.changing, context.publisher.remove, reference, context.caller.actor)
    return DeletedAdapter(adapter=reference)


@router.put("/v1/adapters/{tenant}/{name}/pin")
async def pin(tenant: TenantPath, name: VersionPath, context: ContextOf) -> PinnedAdapter:
    """Keep one version of an adapter on the device until the version is unpinned or deleted, or the server ends."""
    reference = f"{tenant}/{name}"
    context.caller.check_change(reference)
    changing = context.executors.changing
    resolved = await context.run(changing, context.store.resolve, reference)
    await context.finish(context.engine.pin(resolved.digest, reference))
    # Not under `finish`: a pin that was made is recorded, even if the client has left.
    await changing.run(context.record_adapter, "adapter.pin", resolved.adapter, version=resolved.version)
    return PinnedAdapter(adapter=resolved.adapter, version=resolved.version, pinned=True)


@router.delete("/v1/adapters/{tenant}/{name}/pin")
async def unpin(tenant: TenantPath, name: VersionPath, context: ContextOf) -> PinnedAdapter:
    """Let one version of an adapter leave the device again."""
    reference = f"{tenant}/{name}"
    context.caller.check_change(reference)
    resolved = await context.run(context.executors.changing, _unpin, reference, context)
    return PinnedAdapter(adapter=resolved.adapter, version=resolved.version, pinned=False)


def _publish(received: Upload, context: RequestContext) -> PublishedAdapter:
    bundle, warnings = context.publisher.checked(received.read(context.settings.max_upload_mib << 20))
    published = context.publisher.publish(bundle, received.name, context.caller.actor)
    return PublishedAdapter.of(published, warnings)


def _unpin(reference: str, context: RequestContext) -> ResolvedAdapter:
    try:
        resolved = context.store.resolve(reference)
    except AdapterNotFound:
        # Another server may have deleted what is pinned here. The reference tells its digest no more.
        context.engine.drop_deleted_pins()
        raise
    context.engine.unpin(resolved.digest, reference)
    context.record_adapter("adapter.unpin", resolved.adapter, version=resolved.version)
    return resolved


def _page(context: RequestContext, query: ListQuery) -> bytes:
    """The JSON of an `AdapterList`. One call for the whole page would hold the interpreter's lock for too long."""
    page = visible_page(context.caller, context.store, query.after, query.limit, query.tenant)
    places = context.engine.presence([(info.adapter, info.digest) for info in page.adapters])
    adapters = []
    for info, place in zip(page.adapters, places, strict=True):
        pause()
        adapters.append(AdapterSummary(**_summary(info, place)).model_dump_json())
    return f'{{"adapters":[{",".join(adapters)}],"next":{json.dumps(page.next)}}}'.encode()


def _detail(context: RequestContext, reference: str) -> AdapterDetail:
    info = context.store.inspect(reference)
    return AdapterDetail(
        **_summary(info, context.engine.presence([(info.adapter, info.digest)])[0]),
        versions=list(info.versions),
        aliases=info.aliases,
        config=context.store.config(info.digest).model_dump(mode="json"),
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
