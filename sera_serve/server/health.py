"""`GET /healthz`, `GET /readyz` and `GET /metrics`: for whoever runs the server."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from sera_serve.server.interfaces import EngineOf, MetricsOf
from sera_serve.server.schemas import Health

router = APIRouter(tags=["operations"])


@router.get("/healthz")
async def healthz() -> Health:
    """Whether the process answers."""
    return Health(status="alive")


@router.get("/readyz")
async def readyz(engine: EngineOf) -> Health:
    """Whether the engine takes requests; 503 with the reason otherwise."""
    engine.ready()
    return Health(status="ready")


@router.get("/metrics", response_class=Response)
async def metrics(metrics: MetricsOf) -> Response:
    """Counters and histograms in Prometheus' text format."""
    return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
