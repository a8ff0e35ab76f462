"""`GET /v1/stats`: the figures behind the charts of a console, as one small JSON."""

from __future__ import annotations

import time

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from sera_serve.engine import Tier
from sera_serve.server.deps import ContextOf
from sera_serve.server.strict import StrictRoute

router = APIRouter(route_class=StrictRoute, tags=["operations"])


class TokenCounts(BaseModel):
    """Tokens of generations since the server began, finished or not; those that run are counted at their ends."""

    prompt: int
    completion: int


class Seconds(BaseModel):
    """How many times were measured since the server began, and their sum in seconds."""

    count: int
    sum: float


class AdapterMemory(BaseModel):
    """The adapters in memory now, and what was counted since the server began: a part of `ResidencyStats`."""

    model_config = ConfigDict(from_attributes=True)

    resident: int
    pinned: int
    loading: int
    device_bytes: int
    device_limit: int
    host_bytes: int
    host_limit: int
    hits: dict[Tier, int] = Field(validation_alias="granted")
    evictions: int


class CachePages(BaseModel):
    """Pages of the KV cache."""

    in_use: int
    total: int


class TenantUsage(BaseModel):
    """What a tenant has used since the server began; tokens are prompt and new ones."""

    requests: int
    tokens: int


class AdapterUsage(BaseModel):
    """What was asked of an adapter since the server began; tokens are prompt and new ones."""

    requests: int
    tokens: int
    classified_inputs: int


class Stats(BaseModel):
    """Response body of `GET /v1/stats`. Counts only rise; a page takes differences. `at` is seconds since 1970."""

    at: float
    requests_in_flight: int
    waiting: int
    running: int
    tokens: TokenCounts
    classified_inputs: int
    first_token: Seconds
    waits: Seconds
    adapters: AdapterMemory
    cache_pages: CachePages
    by_tenant: dict[str, TenantUsage]
    by_adapter: dict[str, AdapterUsage]


@router.get("/v1/stats")
async def stats(context: ContextOf) -> Stats:
    """Return the load, the memory, and what was counted since the server began."""
    totals = context.metrics.totals()
    pages = [load.cache_pages for load in context.engine.loads().values()]
    return Stats(
        at=time.time(),
        requests_in_flight=context.engine.in_flight(),
        waiting=context.engine.waiting(),
        running=context.engine.running(),
        tokens=TokenCounts(
            prompt=int(totals.get("sera_tokens_total prompt", 0)),
            completion=int(totals.get("sera_tokens_total completion", 0)),
        ),
        classified_inputs=int(totals["sera_classified_inputs_total"]),
        first_token=_seconds(totals, "sera_first_token_seconds"),
        waits=_seconds(totals, "sera_wait_seconds"),
        adapters=AdapterMemory.model_validate(context.engine.stats()),
        cache_pages=CachePages(in_use=sum(page[0] for page in pages), total=sum(page[1] for page in pages)),
        by_tenant={
            tenant: TenantUsage(requests=usage.requests, tokens=usage.tokens["prompt"] + usage.tokens["completion"])
            for tenant, usage in context.metrics.usage.by_tenant().items()
        },
        by_adapter={
            adapter: AdapterUsage(
                requests=usage.requests,
                tokens=usage.tokens["prompt"] + usage.tokens["completion"],
                classified_inputs=usage.inputs["classified"],
            )
            for adapter, usage in context.metrics.usage.by_adapter().items()
        },
    )


def _seconds(totals: dict[str, float], name: str) -> Seconds:
    return Seconds(count=int(totals[f"{name}_count"]), sum=totals[f"{name}_sum"])
