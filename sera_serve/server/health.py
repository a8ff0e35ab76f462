"""Routes for operators: `GET /healthz`, `GET /readyz` and `GET /metrics`."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from sera_serve.server.deps import EngineOf, MetricsOf

router = APIRouter(tags=["operations"])


class Health(BaseModel):
    """Response body of `GET /healthz` and `GET /readyz`."""

    status: Literal["alive", "ready"]


@router.get("/healthz")
async def healthz() -> Health:
    """Report that the process answers."""
    return Health(status="alive")


@router.get("/readyz")
async def readyz(engine: EngineOf) -> Health:
    """Report whether the engine accepts requests. The status is 503 with the reason if it does not."""
    engine.ready()
    return Health(status="ready")


@router.get("/metrics", response_class=Response)
async def metrics(metrics: MetricsOf) -> Response:
    """Return all metrics in Prometheus' text format."""
    return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
