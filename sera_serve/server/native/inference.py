"""`POST /v1/generate`."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response

from sera_serve.engine import GenerateParams
from sera_serve.errors import EngineUnavailable
from sera_serve.server.disconnect import cancel_on_disconnect
from sera_serve.server.events import GenerationEvents
from sera_serve.server.interfaces import Engine, EngineOf, MetricsOf
from sera_serve.server.metrics import ServerMetrics
from sera_serve.server.schemas import GenerateEvent, GenerateRequest, GenerateResponse
from sera_serve.server.strict import StrictRoute

router = APIRouter(route_class=StrictRoute, tags=["inference"])


@router.post(
    "/v1/generate",
    response_model=GenerateResponse,
    responses={200: {"content": {"text/event-stream": {"schema": GenerateEvent.model_json_schema()}}}},
)
async def generate(
    body: GenerateRequest, request: Request, engine: EngineOf, metrics: MetricsOf
) -> Response | GenerateResponse:
    """Continue a prompt under an adapter, or under the bare base."""
    params = body.to_params()
    if body.stream:
        return GenerationEvents(partial(engine.generate, params), metrics)
    return await cancel_on_disconnect(request.receive, _complete(engine, params, metrics))


async def _complete(engine: Engine, params: GenerateParams, metrics: ServerMetrics) -> GenerateResponse:
    stream = await engine.generate(params)
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
