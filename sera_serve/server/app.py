"""The app factory: it puts routes, error handlers, metrics and middleware together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from adapters_store import AdapterStore, BundleLimits
from sera_serve.config import ServeSettings
from sera_serve.server import docs_page, health, native, openai, openapi
from sera_serve.server.browsers import BrowserGuard, BrowserRules
from sera_serve.server.deps import Engine, Executors
from sera_serve.server.errors import add_error_handlers
from sera_serve.server.loop_watch import LoopWatch
from sera_serve.server.methods import HeadAndOptions
from sera_serve.server.metrics import LoopMetrics, ResidencyMetrics, ServerMetrics
from sera_serve.server.middleware import BodyLimit, RequestLifecycle
from sera_serve.server.openai.texts import Texts
from sera_serve.server.watcher import watching


def build_app(engine: Engine, store: AdapterStore, settings: ServeSettings) -> FastAPI:
    """Build the HTTP app. The engine starts and stops with the app.

    Args:
        engine: Serves the requests. The engine must not be started yet.
        store: Uploads go to this store, and lists come from it. The engine must read the same store.
        settings: The limits of request bodies, and what browsers may do. The engine has read its own settings already.

    Raises:
        InvalidConfiguration: An entry of `allowed_hosts` or `allowed_origins` is not of its form.
    """

    limits = BundleLimits(max_bytes=settings.max_upload_mib << 20)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        executors = app.state.executors = Executors.of(settings)
        texts = app.state.texts = Texts(engine, store)
        engine.start()
        try:
            async with app.state.loop_watch.running(), watching(settings.watch, engine, store, executors, limits):
                yield
        finally:
            executors.close()
            texts.close()
            await asyncio.to_thread(engine.stop)

    app = openapi.DocumentedApp(lifespan)
    metrics = ServerMetrics(engine)
    metrics.registry.register(ResidencyMetrics(engine.stats))
    metrics.registry.register(LoopMetrics(engine.loads))
    app.state.engine = engine
    app.state.store = store
    app.state.settings = settings
    app.state.metrics = metrics
    app.state.loop_watch = LoopWatch(metrics.registry)
    routers = (*native.ROUTERS, *openai.ROUTERS, health.router, openapi.router, docs_page.router)
    for router in routers:
        app.include_router(router)
    app.state.routes = [route for router in routers for route in router.routes]
    add_error_handlers(app)
    # The middleware added last is the outermost.
    app.add_middleware(BodyLimit, max_body=settings.max_body_mib << 20, max_upload=settings.max_upload_mib << 20)
    app.add_middleware(HeadAndOptions, routes=app.state.routes)
    rules = BrowserRules(settings)
    if origins := rules.cors_origins():
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
            allow_private_network=True,
        )
    app.add_middleware(BrowserGuard, rules=rules)
    app.add_middleware(RequestLifecycle, metrics=metrics, watch=app.state.loop_watch)
    return app
