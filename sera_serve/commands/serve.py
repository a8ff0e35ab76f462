"""Runs one server process: builds base, store, engine and HTTP from settings, and shuts down gracefully."""

from __future__ import annotations

import gc
import json
import logging
import os
import shlex
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from adapters_store import AdapterStore, BundleLimits, StoreError, check_base
from sera_serve.base import FrozenBase, load_base
from sera_serve.commands.demo import EXAMPLES
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.errors import InvalidConfiguration
from sera_serve.server import build_app
from sera_serve.threads import run_and_forget_pool

# The start-up message shows one adapter for each task, found among this many.
_LOOKED_AT = 50
# Responses end without a line break; without this one, the shell's prompt would follow on the same line.
CURL = "curl -sw '\\n'"


def run_server(settings: ServeSettings) -> None:
    """Serve until SIGTERM or SIGINT; then refuse new connections, and let requests in flight finish.

    Raises:
        InvalidConfiguration: The server cannot listen on the address, or the settings do not fit each other.
        BaseNotFound: The base cannot be loaded.
        StoreError: The store cannot be opened.
    """
    disable_progress_bar()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    console = Console()
    # Before the base is loaded, so that a port in use is noticed at once. Clients cannot connect until it listens.
    with bound_socket(settings.host, settings.port) as listener:
        store = AdapterStore(settings.store, limits=BundleLimits(max_bytes=settings.max_upload_mib << 20))
        with console.status(f"loading base {settings.base}"):
            base = run_and_forget_pool(lambda: load_base(settings.base, settings.device, settings.dtype))
            engine = run_and_forget_pool(lambda: ServingEngine(base, store, settings))
        config = http_config(build_app(engine, store, settings), settings)
        port = listener.getsockname()[1]
        server = _AnnouncingServer(config, lambda: describe_server(console, settings, base, store, port))
        # Modules and models are never freed. A collection that visited them would stop every thread for about 0.1 s.
        gc.collect()
        gc.freeze()
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            console.print("stopped")


def http_config(app: FastAPI, settings: ServeSettings) -> uvicorn.Config:
    """Configure uvicorn for the application."""
    return uvicorn.Config(
        app,
        timeout_graceful_shutdown=settings.shutdown_grace_s,
        # Longer than clients and proxies keep an idle connection (httpx 5 s, aiohttp 15 s, load balancers 60 s).
        # A request that is sent while the server closes the connection fails, and the client cannot tell whether
        # the server carried it out.
        timeout_keep_alive=75,
        server_header=False,
        ws="none",
    )


def bound_socket(host: str, port: int) -> socket.socket:
    """Bind a socket to an address, without listening yet.

    Raises:
        InvalidConfiguration: The address cannot be bound; the message has the operating system's reason.
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
    """Calls `announce` once the server accepts connections, so that printed commands work at once."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()


def describe_server(
    console: Console, settings: ServeSettings, base: FrozenBase, store: AdapterStore, port: int
) -> None:
    """Print the base, the address, and one example request for each task that the store has an adapter for."""
    host = "localhost" if settings.host in ("127.0.0.1", "::1", "0.0.0.0", "::") else settings.host
    url = f"http://{host}:{port}"
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_row("base", f"{base.name}, {base.kind} of {parameters:,} parameters, context {base.max_length}")
    facts.add_row("device", f"{base.device}, {str(base.dtype).removeprefix('torch.')}")
    facts.add_row("adapter memory", f"{settings.pool_mib} MiB on the device, {settings.host_cache_mib} MiB cached")
    facts.add_row("store", f"{settings.store.resolve()}, {store.count_adapters():,} adapters")
    facts.add_row("address", url)
    console.print("\n[bold]sera-serve is ready[/bold]")
    console.print(facts)
    for title, path, body in _examples(base, store):
        console.print(f"\n[dim]# {title}[/dim]", highlight=False)
        # A wrapped command could not be pasted.
        console.print(curl_line(f"{url}{path}", body), markup=False, highlight=False, soft_wrap=True)
    console.print(f"\n[dim]# adapters in the store[/dim]\n{CURL} {url}/v1/adapters\n", highlight=False)


def curl_line(url: str, body: dict[str, Any]) -> str:
    """Write a shell command that posts JSON."""
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"{CURL} {url} -H 'Content-Type: application/json' -d {data}"


def _examples(base: FrozenBase, store: AdapterStore) -> list[tuple[str, str, dict[str, Any]]]:
    """Choose requests that this server can serve, as (title, path, body)."""
    found: dict[str, str] = {}
    shapes = base.module_shapes()
    for info in store.list_page(limit=_LOOKED_AT).adapters:
        if info.task in found or (info.task == "generate" and base.kind == "encoder"):
            continue
        try:
            check_base(store.config(info.digest), base.info, shapes)
        except StoreError:
            # The adapter was made for another base, so a request for it would be refused.
            continue
        found[info.task] = info.adapter
    examples: list[tuple[str, str, dict[str, Any]]] = []
    if adapter := found.get("generate"):
        body = {"adapter": adapter, "prompt": EXAMPLES.get(adapter, "Once upon a time"), "max_new_tokens": 40}
        examples.append((f"generate with {adapter}", "/v1/generate", body))
    if adapter := found.get("classify"):
        body = {"adapter": adapter, "inputs": [EXAMPLES.get(adapter, "This is the text to classify.")]}
        examples.append((f"classify with {adapter}", "/v1/classify", body))
    if base.kind == "decoder":
        body = {"adapter": None, "prompt": "Once upon a time", "max_new_tokens": 40}
        examples.append(("the base model", "/v1/generate", body))
    return examples
