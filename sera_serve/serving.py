"""One server process: base, store, engine and HTTP put together, from settings to a graceful end."""

from __future__ import annotations

import gc
import logging
import os
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from adapters_store import AdapterStore, BundleLimits
from sera_serve.banner import describe_server
from sera_serve.base import load_base
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.errors import InvalidConfiguration
from sera_serve.server import build_app
from sera_serve.threads import run_and_forget_pool


def run_server(settings: ServeSettings) -> None:
    """Serve until SIGTERM or SIGINT; then refuse new connections, and let requests under way finish.

    Raises:
        InvalidConfiguration: The address cannot be listened on, or the settings do not fit.
        BaseNotFound: No such base.
        StoreError: The store cannot be opened.
    """
    disable_progress_bar()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    console = Console()
    # Before the base is loaded, so that a port in use is noticed at once; nothing connects until the server listens.
    with bound_socket(settings.host, settings.port) as listener:
        store = AdapterStore(settings.store, limits=BundleLimits(max_bytes=settings.max_upload_mib << 20))
        with console.status(f"loading base {settings.base}"):
            base = run_and_forget_pool(lambda: load_base(settings.base, settings.device, settings.dtype))
            engine = run_and_forget_pool(lambda: ServingEngine(base, store, settings))
        config = http_config(build_app(engine, store, settings), settings)
        port = listener.getsockname()[1]
        server = _AnnouncingServer(config, lambda: describe_server(console, settings, base, store, port))
        # Modules and models stay for good: a collection that went through them would stop every thread for about 0.1 s.
        gc.collect()
        gc.freeze()
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            console.print("stopped")


def http_config(app: FastAPI, settings: ServeSettings) -> uvicorn.Config:
    """How the application is served over HTTP."""
    return uvicorn.Config(
        app,
        timeout_graceful_shutdown=settings.shutdown_grace_s,
        # Longer than clients and proxies keep an idle connection (httpx 5 s, aiohttp 15 s, load balancers 60 s): a
        # request sent while the server closes the connection fails, and nobody can tell whether it was carried out.
        timeout_keep_alive=75,
        server_header=False,
        ws="none",
    )


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address, not listening yet.

    Raises:
        InvalidConfiguration: With the operating system's reason.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InvalidConfiguration(f"host {host!r}: {error.strerror or error}", param="host") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise InvalidConfiguration(
            f"cannot listen on {host} port {port}: {reason}; choose another --port", param="port"
        ) from error
    return listener


class _AnnouncingServer(uvicorn.Server):
    """Says where it is once it answers, so that what it prints works when pasted."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()
