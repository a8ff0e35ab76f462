"""`/v1/adapters`: uploading, listing, inspecting and deleting."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from adapters_store import AdapterStore, Published, check_base
from adapters_store import AdapterSummary as StoredAdapter
from sera_serve.server.deps import Engine, EngineOf, SettingsOf, StoreOf
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
from sera_serve.server.strict import StrictRoute

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
                    },
                }
            }
        },
    }
}


@router.post("/v1/adapters", status_code=201, openapi_extra=_UPLOAD_FORM)
async def upload(request: Request, engine: EngineOf, store: StoreOf, settings: SettingsOf) -> PublishedAdapter:
    """Publish a bundle as the next version of an adapter; the bundle is checked and on disk when this answers 201."""
    max_bytes = settings.max_upload_mib << 20
    publisher = request.app.state.publisher
    async with receive_upload(request) as received:
        # Until the publisher is free, the upload lies on disk.
        published = await asyncio.get_running_loop().run_in_executor(
            publisher, _publish, received, engine, store, max_bytes
        )
    return PublishedAdapter(adapter=published.adapter, version=published.version, digest=published.digest)


@router.get("/v1/adapters")
async def list_adapters(query: Annotated[ListQuery, Query()], store: StoreOf) -> AdapterList:
    """The adapters in order of their ids, a page at a time."""
    return await asyncio.to_thread(_page, store, query)


@router.get("/v1/adapters/{tenant}/{name}")
async def inspect(tenant: str, name: str, store: StoreOf) -> AdapterDetail:
    """One version of an adapter; `name` may carry @alias, @v3 or @digest."""
    return await asyncio.to_thread(_detail, store, f"{tenant}/{name}")


@router.delete("/v1/adapters/{tenant}/{name}")
async def delete(tenant: str, name: str, engine: EngineOf, store: StoreOf) -> DeletedAdapter:
    """Delete an adapter, or with @ one version of it; requests under way keep the version they began with."""
    await asyncio.to_thread(_delete, f"{tenant}/{name}", engine, store)
    return DeletedAdapter(adapter=f"{tenant}/{name}")


@router.put("/v1/adapters/{tenant}/{name}/pin")
async def pin(tenant: str, name: str, request: Request, engine: EngineOf, store: StoreOf) -> PinnedAdapter:
    """Keep one version of an adapter on the device until the version is unpinned or deleted, or the server ends."""
    resolved = await asyncio.to_thread(store.resolve, f"{tenant}/{name}")
    await cancel_on_disconnect(request.receive, engine.pin(resolved.digest))
    return PinnedAdapter(adapter=resolved.adapter, version=resolved.version, pinned=True)


@router.delete("/v1/adapters/{tenant}/{name}/pin")
async def unpin(tenant: str, name: str, engine: EngineOf, store: StoreOf) -> PinnedAdapter:
    """Let one version of an adapter leave the device again."""
    resolved = await asyncio.to_thread(store.resolve, f"{tenant}/{name}")
    engine.unpin(resolved.digest)
    return PinnedAdapter(adapter=resolved.adapter, version=resolved.version, pinned=False)


def _publish(received: Upload, engine: Engine, store: AdapterStore, max_bytes: int) -> Published:
    bundle = received.read_bundle(max_bytes)
    check_base(bundle.config, engine.base.info, engine.base.module_shapes())
    return store.publish(bundle, name=received.name)


def _delete(reference: str, engine: Engine, store: AdapterStore) -> None:
    for digest in store.delete(reference).digests:
        engine.mark_deleted(digest)


def _page(store: AdapterStore, query: ListQuery) -> AdapterList:
    page = store.list_page(query.tenant, query.after, query.limit)
    return AdapterList(adapters=[AdapterSummary(**_summary(info)) for info in page.adapters], next=page.next)


def _detail(store: AdapterStore, reference: str) -> AdapterDetail:
    info = store.inspect(reference)
    return AdapterDetail(
        **_summary(info),
        versions=list(info.versions),
        aliases=info.aliases,
        config=store.config(info.digest).model_dump(mode="json"),
    )


def _summary(info: StoredAdapter) -> dict[str, Any]:
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
        "parameters": info.parameters,
        "bytes": info.nbytes,
        "created_at": info.created_at,
    }
