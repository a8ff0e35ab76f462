"""`POST /v1/generate` and `POST /v1/classify`."""

from __future__ import annotations

from contextlib import aclosing
from functools import partial

from fastapi import APIRouter, Request, Response

from sera_serve.engine import GenerateParams
from sera_serve.server.auth import principal_of, principal_of_all
from sera_serve.server.deps import EngineOf, MetricsOf, ReceivedAt
from sera_serve.server.disconnect import cancel_on_disconnect
from sera_serve.server.metrics import ServerMetrics
from sera_serve.server.native.schemas import (
    ChoicesResponse,
    ClassifyEachResponse,
    ClassifyRequest,
    ClassifyResponse,
    GenerateEvent,
    GenerateEvents,
    GenerateRequest,
    GenerateResponse,
    encode_response,
)
from sera_serve.server.openapi import schema_of
from sera_serve.server.sse import Admit, EventStream, admitted, merged, result_of
from sera_serve.server.strict import StrictRoute

router = APIRouter(route_class=StrictRoute, tags=["inference"])


@router.post(
    "/v1/generate",
    response_model=GenerateResponse | ChoicesResponse,
    responses={200: {"content": {"text/event-stream": {"schema": schema_of(GenerateEvent)}}}},
)
async def generate(
    body: GenerateRequest, request: Request, engine: EngineOf, metrics: MetricsOf, received_at: ReceivedAt
) -> Response:
    """Continue a prompt with an adapter, or with the base model alone."""
    principal = principal_of(body.adapter)
    params = body.to_params()
    admit = partial(engine.generate_choices, params, principal, received_at)
    if body.stream:
        return EventStream(admit, GenerateEvents(params), metrics)
    content = await cancel_on_disconnect(request.receive, _complete(admit, params, metrics))
    return Response(content, media_type="application/json")


async def _complete(admit: Admit, params: GenerateParams, metrics: ServerMetrics) -> bytes:
    async with admitted(admit, metrics) as streams:
        async with aclosing(merged(streams)) as deltas:
            async for _ in deltas:
                pass
        results = [result_of(stream) for stream in streams]
    for result in results:
        metrics.count_generation(result)
    return await encode_response(results, params)


@router.post("/v1/classify", response_model=ClassifyResponse | ClassifyEachResponse)
async def classify(
    body: ClassifyRequest, request: Request, engine: EngineOf, metrics: MetricsOf, received_at: ReceivedAt
) -> Response:
    """Classify each input with the head of an adapter, or with each of several."""
    options = body.priority, body.timeout_s, received_at
    answer: ClassifyResponse | ClassifyEachResponse
    if body.adapters is not None:
        principal = principal_of_all(body.adapters, "adapters")
        each = engine.classify_each(body.adapters, body.inputs, principal, *options)
        results = await cancel_on_disconnect(request.receive, each)
        metrics.count_classified(sum(len(result.results) for result in results), results[0].waited_s)
        answer = ClassifyEachResponse.of(results)
    else:
        assert body.adapter is not None
        work = engine.classify(body.adapter, body.inputs, principal_of(body.adapter), *options)
        result = await cancel_on_disconnect(request.receive, work)
        metrics.count_classified(len(result.results), result.waited_s)
        answer = ClassifyResponse.of(result)
    # The framework would check the answer against its own form again.
    return Response(answer.model_dump_json(), media_type="application/json")
