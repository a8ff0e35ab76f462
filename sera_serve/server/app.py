"""The app factory: it puts routes, error handlers, metrics and middleware together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from adapters_store import AdapterStore
from sera_serve.config import ServeSettings
from sera_serve.server import health, native
from sera_serve.server.deps import Engine
from sera_serve.server.errors import add_error_handlers
from sera_serve.server.metrics import LoopMetrics, ResidencyMetrics, ServerMetrics
from sera_serve.server.middleware import BodyLimit, RequestLifecycle
from sera_serve.threads import single_core_workers

# Threads for work that would block the event loop: reading the store, tokenizing.
_WORKERS = 16


def build_app(engine: Engine, store: AdapterStore, settings: ServeSettings) -> FastAPI:
    """Build the HTTP app. The engine starts and stops with the app.

    Args:
        engine: Serves the requests. The engine must not be started yet.
        store: Uploads go to this store, and lists come from it. The engine must read the same store.
        settings: The limits of request bodies. The engine has read its own settings already.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with single_core_workers(_WORKERS, "worker") as workers, single_core_workers(1, "publisher") as publisher:
            asyncio.get_running_loop().set_default_executor(workers)
            # One thread publishes all uploads, so one bundle at a time is in memory. malloc keeps a heap for each
            # thread: with several threads, each heap would grow to the size of the largest bundles.
            app.state.publisher = publisher
            engine.start()
            try:
                yield
            finally:
                await asyncio.to_thread(engine.stop)

    # FastAPI's interactive pages are off: the pages load scripts from another host.
    app = FastAPI(title="sera-serve", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    metrics = ServerMetrics(engine)
    metrics.registry.register(ResidencyMetrics(engine.stats))
    metrics.registry.register(LoopMetrics(engine.loads))
    app.state.engine = engine
    app.state.store = store
    app.state.settings = settings
    app.state.metrics = metrics
    for router in (*native.ROUTERS, health.router):
        app.include_router(router)
    add_error_handlers(app)
    # The middleware added last is the outermost.
    app.add_middleware(BodyLimit, max_body=settings.max_body_mib << 20, max_upload=settings.max_upload_mib << 20)
    app.add_middleware(RequestLifecycle, metrics=metrics)
    return app
