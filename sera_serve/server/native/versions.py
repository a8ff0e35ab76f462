"""`/v1/adapters/{tenant}/{name}/versions` and `.../aliases/{alias}`: versions, and which of them serves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated

from fastapi import APIRouter, Path, Query
from pydantic import JsonValue

from adapters_store import AdapterStore
from adapters_store.card import run_card
from adapters_store.errors import AdapterNotFound, StoreError
from sera_serve.server.deps import ContextOf, NamePath, RequestContext, TenantPath, adapter_at
from sera_serve.server.native.access_schemas import AliasDetail, AliasRequest, VersionDetail, VersionList, VersionQuery
from sera_serve.server.strict import StrictRoute

router = APIRouter(route_class=StrictRoute, tags=["adapters"])

AliasPath = Annotated[str, Path(description="the alias: latest, or a name of the tenant's own")]

_MAX_METRICS = 50
_MAX_DESCRIPTION = 2000
_MAX_CARD_LINES = 16
_MAX_CARD_TEXT = 400


@router.get("/v1/adapters/{tenant}/{name}/versions")
async def versions(
    tenant: TenantPath, name: NamePath, query: Annotated[VersionQuery, Query()], context: ContextOf
) -> VersionList:
    """The versions of an adapter, newest first, a page at a time, with what their training recorded."""
    adapter = adapter_at(tenant, name)
    context.caller.check_use(adapter)
    return await context.run(context.executors.listing, _versions, context.store, adapter, query)


@router.put("/v1/adapters/{tenant}/{name}/aliases/{alias}")
async def set_alias(
    tenant: TenantPath, name: NamePath, alias: AliasPath, body: AliasRequest, context: ContextOf
) -> AliasDetail:
    """Point an alias to a version; requests that name the alias follow at once. `latest` is one of them."""
    adapter = adapter_at(tenant, name)
    context.caller.check_change(adapter)
    return await context.run(context.executors.changing, _set_alias, context, adapter, alias, body.version)


@router.delete("/v1/adapters/{tenant}/{name}/aliases/{alias}")
async def remove_alias(tenant: TenantPath, name: NamePath, alias: AliasPath, context: ContextOf) -> AliasDetail:
    """Remove an alias other than `latest`."""
    adapter = adapter_at(tenant, name)
    context.caller.check_change(adapter)
    return await context.run(context.executors.changing, _remove_alias, context, adapter, alias)


def _versions(store: AdapterStore, adapter: str, query: VersionQuery) -> VersionList:
    info = store.inspect(adapter)
    known = [version for version in reversed(info.versions) if query.before is None or version < query.before]
    page = known[: query.limit]
    found = [detail for version in page if (detail := _version(store, f"{adapter}@v{version}")) is not None]
    return VersionList(
        adapter=adapter,
        aliases=info.aliases,
        versions=found,
        next=page[-1] if len(known) > len(page) else None,
    )


def _version(store: AdapterStore, reference: str) -> VersionDetail | None:
    """One version, or None where it was deleted meanwhile."""
    try:
        info = store.summary(reference)
        config = store.config(info.digest)
    except AdapterNotFound:
        return None
    training = config.training
    description = training.get("description")
    return VersionDetail(
        version=info.version,
        digest=info.digest,
        created_at=info.created_at,
        task=info.task,
        method=info.method,
        ranks=list(info.ranks),
        splits=list(info.splits),
        parameters=info.parameters,
        bytes=info.nbytes,
        metrics=_metrics(training.get("metrics")),
        description=description[:_MAX_DESCRIPTION] if isinstance(description, str) else None,
        card=run_card(config, _MAX_CARD_LINES, _MAX_CARD_TEXT),
    )


def _metrics(value: JsonValue) -> dict[str, float] | None:
    """The numbers of a training record's metrics. Whoever made the adapter wrote the record: it may hold anything."""
    # An integer of JSON may be too large for a float.
    if not isinstance(value, dict):
        return None
    numbers = {
        name: float(number)
        for name, number in value.items()
        if isinstance(number, int | float) and not isinstance(number, bool) and abs(number) <= sys.float_info.max
    }
    return dict(list(numbers.items())[:_MAX_METRICS])


@contextmanager
def _found_beside(store: AdapterStore, adapter: str, field: str) -> Iterator[None]:
    """Have AdapterNotFound name `field` where the adapter itself is there."""
    try:
        yield
    except AdapterNotFound as error:
        with suppress(StoreError):
            store.resolve(adapter)
            error.param = field
        raise


def _set_alias(context: RequestContext, adapter: str, alias: str, version: int) -> AliasDetail:
    with _found_beside(context.store, adapter, "version"):
        context.store.set_alias(adapter, alias, f"{adapter}@v{version}")
    context.record_adapter("alias.set", adapter, alias=alias, version=version)
    return AliasDetail(adapter=adapter, alias=alias, version=version)


def _remove_alias(context: RequestContext, adapter: str, alias: str) -> AliasDetail:
    with _found_beside(context.store, adapter, "alias"):
        held = context.store.remove_alias(adapter, alias)
    context.record_adapter("alias.remove", adapter, alias=alias, version=held)
    return AliasDetail(adapter=adapter, alias=alias, version=held)
