"""The app factory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from adapters_store import AdapterStore
from sera_serve.config import ServeSettings
from sera_serve.server import adapters, classify, generate, health
from sera_serve.server.errors import add_error_handlers
from sera_serve.server.interfaces import Engine
from sera_serve.server.metrics import ResidencyMetrics, ServerMetrics
from sera_serve.server.middleware import BodyLimit, RequestLifecycle
from sera_serve.threads import single_core_workers

# Threads for what would hold up the event loop: reading the store, tokenizing.
_WORKERS = 16


def build_app(engine: Engine, store: AdapterStore, settings: ServeSettings) -> FastAPI:
    """Make the HTTP app; the engine starts and stops with it.

    Args:
        engine: Answers the requests; not started yet.
        store: Where uploads go and adapters are listed from; the one that the engine reads.
        settings: Limits of bodies; those of the engine are its own affair.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with single_core_workers(_WORKERS, "worker") as workers, single_core_workers(1, "publisher") as publisher:
            asyncio.get_running_loop().set_default_executor(workers)
            # One bundle at a time is in memory, and always in the same thread: malloc keeps a heap for each, and each
            # would grow to what the largest bundles take.
            app.state.publisher = publisher
            engine.start()
            try:
                yield
            finally:
                await asyncio.to_thread(engine.stop)

    # The interactive pages would load scripts from another host.
    app = FastAPI(title="sera-serve", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    metrics = ServerMetrics(engine)
    metrics.registry.register(ResidencyMetrics(engine.stats))
    app.state.engine = engine
    app.state.store = store
    app.state.settings = settings
    app.state.metrics = metrics
    for part in (generate, classify, adapters, health):
        app.include_router(part.router)
    add_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_body=settings.max_body_mib << 20, max_upload=settings.max_upload_mib << 20)
    app.add_middleware(RequestLifecycle, metrics=metrics)
    return app
