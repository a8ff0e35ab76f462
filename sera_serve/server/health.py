"""Routes for operators: `GET /healthz`, `GET /readyz` and `GET /metrics`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from adapters_store import AdapterStore, StoreState, StoreUnavailable
from sera_serve.engine import ServingEngine
from sera_serve.errors import SeraServeError
from sera_serve.server.deps import ContextOf
from sera_serve.server.metrics import ServerMetrics
from sera_serve.server.strict import StrictRoute
from sera_serve.threads import SharedCall

router = APIRouter(route_class=StrictRoute, tags=["operations"])

_STORE_TIMEOUT_S = 2.0
# Of one core, metrics take a quarter at most, beyond a first burst.
_SCRAPING_REST = 3


class Health(BaseModel):
    """Response body of `GET /healthz`."""

    status: Literal["alive"]


class Readiness(BaseModel):
    """Response body of `GET /readyz`. `store` says whether uploads can be stored; adapters are served in each case."""

    status: Literal["ready"]
    store: StoreState


class Draining(SeraServeError):
    """The server is about to stop. It still serves the requests that come; new ones should go to another server."""

    code = "draining"
    status = 503


@dataclass(frozen=True)
class OperatorCalls:
    """What the routes of operators ask for, each on a thread of its own. A disk may hang.

    Attributes:
        store: The store's state.
        engine: Raises where the engine cannot serve. With thousands of adapters it takes a tenth of a second.
        metrics: The metrics, in Prometheus' text format.
    """

    store: SharedCall[StoreState]
    engine: SharedCall[None]
    metrics: SharedCall[bytes]

    @classmethod
    def of(cls, store: AdapterStore, engine: ServingEngine, metrics: ServerMetrics) -> OperatorCalls:
        """Start no thread yet."""
        return cls(
            SharedCall("a check of the store", store.check),
            SharedCall("a check of the engine", engine.ready),
            SharedCall("metrics", metrics.exposition, _SCRAPING_REST),
        )

    def close(self) -> None:
        """Begin no more calls, and end their threads."""
        for call in (self.store, self.engine, self.metrics):
            call.close()


@router.get("/healthz")
async def healthz() -> Health:
    """Report that the process answers."""
    return Health(status="alive")


@router.get("/readyz")
async def readyz(context: ContextOf) -> Readiness:
    """Report whether requests should come: engine and store serve, and the server is not stopping; else 503."""
    if context.request.app.state.draining:
        raise Draining("the server is stopping; send requests to another one")
    calls: OperatorCalls = context.request.app.state.operator_calls
    await calls.engine.result()
    try:
        store = await asyncio.wait_for(calls.store.result(), _STORE_TIMEOUT_S)
    except TimeoutError:
        raise StoreUnavailable(
            f"the store has not answered for {_STORE_TIMEOUT_S:g} s; check the disk that holds it", param="store"
        ) from None
    return Readiness(status="ready", store=store)


@router.get("/metrics", response_class=Response)
async def metrics(context: ContextOf) -> Response:
    """Return all metrics in Prometheus' text format."""
    calls: OperatorCalls = context.request.app.state.operator_calls
    return Response(await calls.metrics.result(), media_type=CONTENT_TYPE_LATEST)
