"""`POST /v1/classify`."""

from __future__ import annotations

from fastapi import APIRouter, Request

from sera_serve.server.disconnect import cancel_on_disconnect
from sera_serve.server.interfaces import EngineOf, MetricsOf
from sera_serve.server.schemas import ClassifyRequest, ClassifyResponse
from sera_serve.server.strict import StrictRoute

router = APIRouter(route_class=StrictRoute, tags=["inference"])


@router.post("/v1/classify")
async def classify(body: ClassifyRequest, request: Request, engine: EngineOf, metrics: MetricsOf) -> ClassifyResponse:
    """Label each input with an adapter's head."""
    work = engine.classify(body.adapter, body.inputs, body.priority, body.timeout_s)
    result = await cancel_on_disconnect(request.receive, work)
    metrics.count_classified(len(result.results), result.waited_s)
    return ClassifyResponse.of(result)
