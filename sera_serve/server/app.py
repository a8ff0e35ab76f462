"""The app factory: it puts routes, error handlers, metrics and middleware together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from adapters_store import AdapterStore, BundleLimits
from sera_serve.access import RATE_HEADERS, AccessControl, AccessDatabase, AuditLog, Holdings, Quotas
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.errors import InvalidConfiguration
from sera_serve.server import console, docs_page, health, native, openai, openapi, stats
from sera_serve.server.accounting import Accounting
from sera_serve.server.auth_middleware import KeyAuthentication
from sera_serve.server.browsers import (
    CROSS_ORIGIN_METHODS,
    BrowserGuard,
    BrowserRules,
    CrossOriginAnswers,
    is_loopback,
)
from sera_serve.server.deps import Executors
from sera_serve.server.errors import SHOULD_RETRY, add_error_handlers
from sera_serve.server.freed_memory import MemoryTrimmer
from sera_serve.server.loop_watch import LoopWatch
from sera_serve.server.methods import HeadAndOptions
from sera_serve.server.metrics import JobMetrics, LoopMetrics, ResidencyMetrics, ServerMetrics
from sera_serve.server.metrics_address import parse_address
from sera_serve.server.middleware import BodyLimit, RequestLifecycle
from sera_serve.server.native.uploads import UploadSlots
from sera_serve.server.openai.texts import Texts
from sera_serve.server.publishing import Publisher
from sera_serve.server.request_log import RequestLog
from sera_serve.server.router_metrics import RouterMetrics
from sera_serve.server.tracing import Tracing, telemetry_config, tracing_of
from sera_serve.server.training import Training
from sera_serve.server.watcher import watching
from sera_serve.threads import in_background

logger = logging.getLogger("sera_serve.server")

# A locked database holds a part of the server for 10 seconds.
_END_S = 15.0


def build_app(
    engine: ServingEngine, store: AdapterStore, settings: ServeSettings, tracing: Tracing | None = None
) -> FastAPI:
    """Build the HTTP app. The engine starts and stops with the app.

    Args:
        engine: Serves the requests. The engine must not be started yet.
        store: Uploads go to this store, and lists come from it. The engine must read the same store.
        settings: The limits of request bodies, and what browsers may do. The engine has read its own settings already.
        tracing: Makes spans of requests. By default the settings decide; see `tracing_of`.

    Raises:
        InvalidConfiguration: An entry of `allowed_hosts` or `allowed_origins` is not of its form, or `auth` is off on
            an address that others can reach.
        AccessDatabaseError: The keys cannot be read.
    """

    limits = BundleLimits(max_bytes=settings.max_upload_mib << 20)
    access = AccessControl(AccessDatabase(store.root), settings.auth, is_loopback=is_loopback(settings.host))
    check_open(settings)
    quotas = Quotas(access.database, settings.quotas)
    access.on_change(quotas.refresh)
    holdings = Holdings(store, quotas)
    audit = AuditLog(store.root, settings.audit_max_mib, settings.audit_keep)
    publisher = Publisher(engine, store, access, holdings, audit)
    training = Training.of(settings, publisher, quotas)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        executors = app.state.executors = Executors.of(settings)
        texts = app.state.texts = Texts(engine, store)
        calls = app.state.operator_calls = health.OperatorCalls.of(store, engine, metrics)
        engine.start()
        access.start()
        training.supervisor.start()
        try:
            watcher = watching(settings.watch, publisher, executors, limits)
            async with app.state.loop_watch.running(), MemoryTrimmer().running(), watcher:
                yield
        finally:
            executors.close()
            texts.close()
            calls.close()
            await ended(training.close, "training jobs")
            await ended(engine.stop, "the engine")
            await ended(access.stop, "the keys")
            if tracing is not None:
                await ended(tracing.close, "traces")
            audit.close()

    tracing = tracing or tracing_of(settings)
    app = openapi.DocumentedApp(lifespan, telemetry_config(tracing))
    metrics = ServerMetrics(engine, settings.metrics_label_limit)
    metrics.registry.register(ResidencyMetrics(engine.stats))
    metrics.registry.register(LoopMetrics(engine.loads))
    metrics.registry.register(JobMetrics(training.jobs.counts))
    metrics.registry.register(RouterMetrics(engine))
    metrics.gauge(
        "sera_damaged_records",
        "Damaged records and aliases of the store that this server has met, each counted once.",
        lambda: store.damaged_records,
    )
    app.state.engine = engine
    # Set when the server has been told to stop.
    app.state.draining = False
    app.state.store = store
    app.state.settings = settings
    app.state.access = access
    app.state.audit = audit
    app.state.publisher = publisher
    app.state.training = training
    app.state.quotas = quotas
    app.state.holdings = holdings
    app.state.metrics = metrics
    app.state.accounting = Accounting(metrics, quotas)
    app.state.loop_watch = LoopWatch(metrics.registry)
    app.state.upload_slots = UploadSlots(settings.max_uploads)
    operators = (stats.router, health.router, openapi.router, docs_page.router, console.router)
    routers = (*native.ROUTERS, *openai.ROUTERS, *operators)
    for router in routers:
        app.include_router(router)
    app.state.routes = [route for router in routers for route in router.routes]
    add_error_handlers(app)
    # The middleware added last is the outermost.
    app.add_middleware(
        BodyLimit,
        max_body=settings.max_body_mib << 20,
        max_upload=settings.max_upload_mib << 20,
        max_file=settings.max_training_file_mib << 20,
        max_image=None if engine.base.image_tower is None else settings.max_image_bytes,
    )
    app.add_middleware(KeyAuthentication, access=access)
    app.add_middleware(HeadAndOptions, routes=app.state.routes)
    rules = BrowserRules(settings)
    if origins := rules.cors_origins():
        app.add_middleware(
            CrossOriginAnswers,
            allow_origins=origins,
            allow_methods=CROSS_ORIGIN_METHODS,
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After", SHOULD_RETRY, *RATE_HEADERS],
            allow_private_network=True,
        )
    app.add_middleware(BrowserGuard, rules=rules)
    watch, log, turns = app.state.loop_watch, RequestLog(settings), engine.loop_turns
    app.add_middleware(RequestLifecycle, metrics=metrics, watch=watch, log=log, turns=turns, tracing=tracing)
    return app


async def ended(stop: Callable[[], None], name: str) -> None:
    """End a part of the server, or leave it: a disk that never answers must not keep the process from ending."""
    stopping = asyncio.wrap_future(in_background(stop, f"end of {name}"))
    done, _ = await asyncio.wait([stopping], timeout=_END_S)
    if done:
        stopping.result()
    else:
        logger.error("%s did not end within %g s; the disk of the store may not answer", name, _END_S)


def check_settings(settings: ServeSettings) -> None:
    """Check what the values of single settings cannot show, without starting anything.

    Raises:
        InvalidConfiguration: As in `build_app`, or `metrics_address` is no address, or has the server's own port.
    """
    check_open(settings)
    BrowserRules(settings)
    if settings.metrics_address is not None:
        parse_address(settings.metrics_address, settings.port)


def check_open(settings: ServeSettings) -> None:
    """Refuse a server without keys that others can reach.

    Raises:
        InvalidConfiguration: `auth` is off, `host` is not a loopback address, and `insecure` does not allow it.
    """
    if settings.auth == "off" and not settings.insecure and not is_loopback(settings.host):
        raise InvalidConfiguration(
            f"auth is off and host is {settings.host}: anyone who reaches this address could use and delete every "
            "adapter; make keys (`sera-serve keys create`) and leave auth out, or add --insecure",
            param="auth",
        )
