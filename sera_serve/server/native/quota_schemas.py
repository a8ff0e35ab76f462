"""Request and response bodies of quotas. docs/http.md describes them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from sera_serve.access import MAX_LIMIT, QuotaPriority
from sera_serve.server.strict import RequestModel, with_example

Amount = Annotated[int, Field(ge=0, le=MAX_LIMIT)]


class QuotaLimits(BaseModel):
    """The limits that hold for a tenant. Null is no limit."""

    adapters: int | None
    bytes: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    requests_in_flight: int | None
    training_jobs: int | None
    max_priority: QuotaPriority | None


class QuotaUsage(BaseModel):
    """What a tenant holds and uses now."""

    adapters: int
    bytes: int = Field(description="bytes of the files of all versions, and 4,096 for each deleted adapter")
    requests_in_flight: int
    requests_this_minute: int = Field(
        description="requests of the limit that are used now; without a limit, about those of the last minute"
    )
    tokens_this_minute: int = Field(description="the same for tokens")
    training_jobs: int = Field(description="training jobs that are not finished")


class QuotaDetail(BaseModel):
    """The limits of a tenant, and what it uses of them. The tenant `*` is every one without limits of its own."""

    tenant: str
    limits: QuotaLimits
    usage: QuotaUsage


class QuotaList(BaseModel):
    """Response body of `GET /v1/quotas`: the tenants with limits of their own, and `*`; sorted."""

    quotas: list[QuotaDetail]


class QuotaRequest(RequestModel):
    """Body of `PUT /v1/quotas/{tenant}`. A field that is left out stays as it is; null is no limit."""

    model_config = with_example({"requests_per_minute": 600, "adapters": 1000})

    adapters: Amount | None = Field(None, description="adapters in the store")
    bytes: Amount | None = Field(
        None, description="bytes of the files of all versions in the store, and 4,096 for each deleted adapter"
    )
    requests_per_minute: Amount | None = Field(None, description="requests for inference")
    tokens_per_minute: Amount | None = Field(None, description="tokens of prompts and answers")
    requests_in_flight: Amount | None = Field(None, description="requests waiting or running")
    training_jobs: Amount | None = Field(None, description="training jobs that are not finished")
    max_priority: QuotaPriority | None = Field(None, description="highest priority of a request: low, normal or high")
