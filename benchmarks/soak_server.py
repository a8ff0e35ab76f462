"""The server of the soak: the product's, in a process of its own, which also says whether its invariants hold."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import uvicorn

from adapters_store import AdapterStore
from sera_serve.base import load_base
from sera_serve.commands.serve import http_config
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import build_app


def serve_soak(listener: socket.socket, base: str, store: Path, settings: dict[str, Any]) -> None:
    """Serve on `listener` until SIGTERM; `GET /integrity` checks and tells what is held."""
    chosen = ServeSettings(store=store, **settings)
    opened = AdapterStore(store)
    engine = ServingEngine(load_base(base), opened, chosen)
    app = build_app(engine, opened, chosen)

    def integrity() -> dict[str, Any]:
        """Raises, and so answers 500, where an invariant is broken."""
        residency = engine.residency
        residency.check_invariants()
        return {
            "leases": residency.leases(),
            "in_flight": engine.in_flight(),
            "resident": residency.resident_digests(),
            "device_bytes": residency.pool.used * residency.pool.data.element_size(),
            "host_bytes": residency.host_cache.used,
        }

    app.add_api_route("/integrity", integrity)
    server = uvicorn.Server(http_config(app, chosen, app.state.metrics.count_refusal))
    # A line for every request would be most of what the soak prints.
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    server.run(sockets=[listener])
