"""Routes for operators: `GET /healthz`, `GET /readyz` and `GET /metrics`."""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from adapters_store import AdapterStore, StoreState, StoreUnavailable
from sera_serve.errors import SeraServeError
from sera_serve.server.deps import ContextOf
from sera_serve.server.strict import StrictRoute
from sera_serve.threads import BoundedExecutor

router = APIRouter(route_class=StrictRoute, tags=["operations"])

_STORE_TIMEOUT_S = 2.0


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


class StoreProbe:
    """Checks the store on a thread of its own, as a disk may hang. Probes at one time share one check."""

    def __init__(self, store: AdapterStore) -> None:
        """Start no thread yet."""
        self._store = store
        self._thread = BoundedExecutor("a check of the store", 1, 0)
        self._check: asyncio.Task[StoreState] | None = None

    async def state(self, timeout_s: float) -> StoreState:
        """Return the store's state.

        Raises:
            StoreUnavailable: The store is gone, or has not answered within `timeout_s` seconds.
        """
        if self._check is None or self._check.done():
            self._check = asyncio.create_task(self._thread.run(self._store.check))
            # A check that fails after its probes have given up is nobody's error.
            self._check.add_done_callback(lambda check: check.cancelled() or check.exception())
        try:
            # A probe that gives up leaves the check to the others.
            return await asyncio.wait_for(asyncio.shield(self._check), timeout_s)
        except TimeoutError:
            raise StoreUnavailable(
                f"the store has not answered for {timeout_s:g} s; check the disk that holds it", param="store"
            ) from None


@router.get("/healthz")
async def healthz() -> Health:
    """Report that the process answers."""
    return Health(status="alive")


@router.get("/readyz")
async def readyz(context: ContextOf) -> Readiness:
    """Report whether requests should come: engine and store serve, and the server is not stopping; else 503."""
    if context.request.app.state.draining:
        raise Draining("the server is stopping; send requests to another one")
    # On another thread: with thousands of adapters it takes a tenth of a second.
    await run_in_threadpool(context.engine.ready)
    probe: StoreProbe = context.request.app.state.store_probe
    return Readiness(status="ready", store=await probe.state(_STORE_TIMEOUT_S))


@router.get("/metrics", response_class=Response)
async def metrics(context: ContextOf) -> Response:
    """Return all metrics in Prometheus' text format."""
    # On another thread: with many tenants it takes a tenth of a second.
    return Response(await run_in_threadpool(context.metrics.exposition), media_type=CONTENT_TYPE_LATEST)
