"""One server process: base, store, engine and HTTP put together, from settings to a graceful end."""

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

from adapters_store import AdapterStore, StoreError, check_base
from adapters_store.safetensors_file import BundleLimits
from sera_serve.base import FrozenBase, load_base
from sera_serve.commands.demo import EXAMPLES
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.errors import InvalidConfiguration
from sera_serve.server import build_app
from sera_serve.threads import run_and_forget_pool

# Adapters looked at in search of one for each task.
_LOOKED_AT = 50
# Answers end without a line break, and the prompt of the shell would follow on their line.
CURL = "curl -sw '\\n'"


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


def describe_server(
    console: Console, settings: ServeSettings, base: FrozenBase, store: AdapterStore, port: int
) -> None:
    """Print what is served, where, and one request for each kind of adapter in the store."""
    adapters = store.list()
    host = "localhost" if settings.host in ("127.0.0.1", "::1", "0.0.0.0", "::") else settings.host
    url = f"http://{host}:{port}"
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_row("base", f"{base.name}, {base.kind} of {parameters:,} parameters, context {base.max_length}")
    facts.add_row("device", f"{base.device}, {str(base.dtype).removeprefix('torch.')}")
    facts.add_row("adapter memory", f"{settings.pool_mib} MiB on the device, {settings.host_cache_mib} MiB cached")
    facts.add_row("store", f"{settings.store.resolve()}, {len(adapters)} adapters")
    facts.add_row("address", url)
    console.print("\n[bold]sera-serve is ready[/bold]")
    console.print(facts)
    for title, path, body in _examples(base, store):
        console.print(f"\n[dim]# {title}[/dim]", highlight=False)
        # Not wrapped, or it could not be pasted.
        console.print(curl_line(f"{url}{path}", body), markup=False, highlight=False, soft_wrap=True)
    console.print(f"\n[dim]# adapters in the store[/dim]\n{CURL} {url}/v1/adapters\n", highlight=False)


def curl_line(url: str, body: dict[str, Any]) -> str:
    """A shell command that posts JSON."""
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"{CURL} {url} -H 'Content-Type: application/json' -d {data}"


def _examples(base: FrozenBase, store: AdapterStore) -> list[tuple[str, str, dict[str, Any]]]:
    """(title, path, body) of requests that this server answers."""
    found: dict[str, str] = {}
    shapes = base.module_shapes()
    for info in store.list()[:_LOOKED_AT]:
        if info.task in found or (info.task == "generate" and base.kind == "encoder"):
            continue
        try:
            check_base(store.config(info.digest), base.info, shapes)
        except StoreError:
            # Made for another base: it would be refused.
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
        examples.append(("the bare base", "/v1/generate", body))
    return examples
