"""`POST /v1/generate` and `POST /v1/classify`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from fastapi import APIRouter, Request, Response

from sera_serve.errors import EngineUnavailable
from sera_serve.server.auth import principal_of
from sera_serve.server.deps import EngineOf, MetricsOf, ReceivedAt, TokenStream
from sera_serve.server.disconnect import cancel_on_disconnect
from sera_serve.server.metrics import ServerMetrics
from sera_serve.server.native.schemas import (
    ClassifyRequest,
    ClassifyResponse,
    GenerateEvent,
    GenerateRequest,
    GenerateResponse,
    delta_event,
    final_event,
)
from sera_serve.server.openapi import schema_of
from sera_serve.server.sse import EventStream
from sera_serve.server.strict import StrictRoute

router = APIRouter(route_class=StrictRoute, tags=["inference"])


@router.post(
    "/v1/generate",
    response_model=GenerateResponse,
    responses={200: {"content": {"text/event-stream": {"schema": schema_of(GenerateEvent)}}}},
)
async def generate(
    body: GenerateRequest, request: Request, engine: EngineOf, metrics: MetricsOf, received_at: ReceivedAt
) -> Response | GenerateResponse:
    """Continue a prompt with an adapter, or with the base model alone."""
    principal = principal_of(body.adapter)
    admit = partial(engine.generate, body.to_params(), principal, received_at)
    if body.stream:
        return EventStream(admit, delta_event, final_event, metrics)
    return await cancel_on_disconnect(request.receive, _complete(admit, metrics))


async def _complete(admit: Callable[[], Awaitable[TokenStream]], metrics: ServerMetrics) -> GenerateResponse:
    stream = await admit()
    try:
        async for _ in stream:
            pass
    finally:
        metrics.observe_waits(stream.waited_s, stream.first_token_s)
        await stream.aclose()
    if stream.result is None:
        raise EngineUnavailable("the generation was closed before it finished; send the request again")
    metrics.count_generation(stream.result)
    return GenerateResponse.of(stream.result)


@router.post("/v1/classify")
async def classify(
    body: ClassifyRequest, request: Request, engine: EngineOf, metrics: MetricsOf, received_at: ReceivedAt
) -> ClassifyResponse:
    """Classify each input with the head of an adapter."""
    principal = principal_of(body.adapter)
    work = engine.classify(body.adapter, body.inputs, principal, body.priority, body.timeout_s, received_at)
    result = await cancel_on_disconnect(request.receive, work)
    metrics.count_classified(len(result.results), result.waited_s)
    return ClassifyResponse.of(result)
