"""Runs one server process: builds base, store, engine and HTTP from settings, and shuts down gracefully."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import uvicorn
from fastapi import FastAPI
from rich.console import Console
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from adapters_store import AdapterStore, BundleLimits, StoreError, check_base
from sera_serve.access import AccessControl
from sera_serve.base import FrozenBase, load_base
from sera_serve.commands.demo import EXAMPLES
from sera_serve.commands.logs import logging_to_stderr
from sera_serve.commands.reload import SettingsReloader
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.errors import InvalidConfiguration
from sera_serve.server import build_app, check_settings
from sera_serve.server.connections import within_descriptors
from sera_serve.server.freed_memory import limit_heaps
from sera_serve.server.graceful import ENDING_S, GracefulServer
from sera_serve.server.metrics_address import MetricsAddress, parse_address
from sera_serve.server.protocol import bounded_protocol
from sera_serve.terminal import PlainConsole, facts_table
from sera_serve.threads import run_and_forget_pool

logger = logging.getLogger("sera_serve.commands")
# The start-up message shows one adapter for each task, found among this many.
_LOOKED_AT = 50
# Responses end without a line break; without this one, the shell's prompt would follow on the same line.
CURL = "curl -sw '\\n'"
# The shell's variable that the printed commands take a key from.
KEY_VARIABLE = "SERA_KEY"
CHAT_PATH = "/v1/chat/completions"
_SWITCH_INTERVAL_S = 0.001
# New objects from which young ones are visited; and of how many such collections one visits older ones, and all.
_COLLECTION_THRESHOLDS = (10_000, 10, 10)


class CourtesyOutput:
    """Standard output that may fail: a server needs neither a reader there nor room on a disk."""

    def __init__(self, file: IO[str]) -> None:
        """Write to a file."""
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Write a text, or say in the log that this and what follows is lost."""
        try:
            return self._file.write(text)
        except OSError as error:
            return self._give_up(error)

    def flush(self) -> None:
        """As `write`, for what the file holds back."""
        try:
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> int:
        logger.warning("standard output cannot be written, nothing more is printed: %s", error.strerror)
        # Python would write the rest at the end, and fail again: that would decide the exit status.
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), self._file.fileno())
        return 0


def run_server(settings: ServeSettings, read: Callable[[], ServeSettings], was_asked: Callable[[], bool]) -> None:
    """Serve until SIGTERM or SIGINT; then refuse new connections, and let requests in flight finish.

    A server whose engine can never serve again ends so by itself, with the exit status 1.

    Args:
        settings: All of them.
        read: Reads the settings again, at SIGHUP.
        was_asked: Whether a SIGHUP came before the server could take it. The settings are then read again at once.

    Raises:
        InvalidConfiguration: The server cannot listen on the address, or the settings do not fit each other.
        BaseNotFound: The base cannot be loaded.
        AccessDatabaseError: The keys of the store cannot be read.
        StoreError: The store cannot be opened.
    """
    limit_heaps()
    disable_progress_bar()
    with logging_to_stderr(settings.log_format, settings.access_log):
        _serve(settings, read, was_asked)


def _serve(settings: ServeSettings, read: Callable[[], ServeSettings], was_asked: Callable[[], bool]) -> None:
    console = PlainConsole(file=CourtesyOutput(sys.stdout))
    check_settings(settings)
    # What a file that is read again is compared with.
    given, settings = settings, within_descriptors(settings)
    # Before the base is loaded, so that a port in use is noticed at once. Clients cannot connect until it listens.
    with bound_sockets(settings) as listeners:
        store = AdapterStore(settings.store, limits=BundleLimits(max_bytes=settings.max_upload_mib << 20))
        with console.status(Text(f"loading base {settings.base}")):
            base = run_and_forget_pool(
                lambda: load_base(settings.base, settings.device, settings.dtype, settings.quantize)
            )
            engine = run_and_forget_pool(lambda: ServingEngine(base, store, settings))
        app = build_app(engine, store, settings)
        ports = [listener.getsockname()[1] for listener in listeners]
        taken = {"tenant_weights": engine.set_tenant_weights, "quotas": app.state.quotas.reload}
        reloader = SettingsReloader(given, read, taken)

        def announce() -> None:
            try:
                describe_server(console, settings, engine, app.state.access, *ports)
            except Exception:
                # A courtesy: the server serves whether it can be written or not.
                logger.warning("the server is ready, and cannot describe what it serves", exc_info=True)
            if was_asked():
                reloader.request()

        server = GracefulServer(
            http_config(app, settings, app.state.metrics.count_refusal, *ports[1:]),
            settings.shutdown_grace_s,
            engine.stop,
            announce,
            drain_s=settings.drain_s,
            begin_drain=lambda: setattr(app.state, "draining", True),
            reload=reloader.request,
            failure=engine.failure,
        )
        # Each request that a second interrupt cuts off would be logged with a traceback, which tells nothing.
        logging.getLogger("uvicorn.error").addFilter(
            lambda record: not (server.force_exit and record.levelno >= logging.ERROR)
        )
        let_steps_go_first(base.device)
        with few_collections():
            server.run(sockets=listeners)
    if server.force_exit:
        console.print("stopped at once; requests in flight were cut off")
        raise SystemExit(1)
    if server.failed is not None:
        # A supervisor starts a server again that did not end well.
        raise SystemExit(1)
    console.print("stopped")


@contextmanager
def few_collections() -> Iterator[None]:
    """Within the block, the garbage collector visits little, and seldom: every thread waits for it.

    Modules and models are never freed. A collection that visited them would take about 0.1 s. Requests and loads leave
    hardly any cycles, but many objects for a while: with Python's own thresholds, every sixtieth load of an adapter of
    224 layers began a full collection.
    """
    gc.collect()
    gc.freeze()
    thresholds = gc.get_threshold()
    gc.set_threshold(*_COLLECTION_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        # The interpreter's last collection is to visit all: Triton reports everything that is left as leaked.
        gc.unfreeze()


def let_steps_go_first(device: torch.device) -> None:
    """Let the engine's thread wait less for the interpreter's lock, where it has little work for each step.

    The event loop may keep the lock for 5 ms by default, in which a GPU has long ended the next step too. On a CPU a
    step takes the lock hundreds of times, and waits for the processor anyway.
    """
    if device.type != "cpu":
        sys.setswitchinterval(_SWITCH_INTERVAL_S)


def http_config(
    app: FastAPI,
    settings: ServeSettings,
    count_refusal: Callable[[str], None],
    metrics_port: int | None = None,
    log_level: str | None = None,
) -> uvicorn.Config:
    """Configure uvicorn for the application.

    Args:
        app: The application.
        settings: The limits of connections and requests.
        count_refusal: Called with the code of each refusal that no route sees.
        metrics_port: The port of `metrics_address`, or None without one.
        log_level: Level of uvicorn's logs; None is uvicorn's own.
    """
    return uvicorn.Config(
        app if metrics_port is None else MetricsAddress(app, metrics_port),
        http=bounded_protocol(settings, count_refusal, metrics_port),
        log_level=log_level,
        # The process has its own log, and a line for each request in it (`server.request_log`).
        log_config=None,
        access_log=False,
        # GracefulServer ends everything before.
        timeout_graceful_shutdown=settings.shutdown_grace_s + ENDING_S,
        # Longer than clients and proxies keep an idle connection (httpx 5 s, aiohttp 15 s, load balancers 60 s).
        # A request that is sent while the server closes the connection fails, and the client cannot tell whether
        # the server carried it out.
        timeout_keep_alive=75,
        server_header=False,
        ws="none",
    )


@contextmanager
def bound_sockets(settings: ServeSettings) -> Iterator[list[socket.socket]]:
    """Bind the server's socket, and the one of `metrics_address` if there is one, without listening yet.

    Raises:
        InvalidConfiguration: An address is wrong or cannot be bound.
    """
    with ExitStack() as stack:
        listeners = [stack.enter_context(bound_socket(settings.host, settings.port))]
        if settings.metrics_address is not None:
            # The port that port 0 has picked may be the other one.
            host, port = parse_address(settings.metrics_address, listeners[0].getsockname()[1])
            listeners.append(stack.enter_context(bound_socket(host, port, "metrics_address")))
        yield listeners


def bound_socket(host: str, port: int, setting: str | None = None) -> socket.socket:
    """Bind a socket to an address, without listening yet.

    Args:
        host: Name or address of an interface.
        port: Port; 0 picks a free one.
        setting: The setting that has both, for messages; None is `host` and `port`.

    Raises:
        InvalidConfiguration: The address cannot be bound; the message has the operating system's reason.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        # A name that no host can have, such as "a..b", is a UnicodeError.
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InvalidConfiguration(f"{setting or 'host'} {host!r}: {reason}", param=setting or "host") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        # No port of an address that this machine does not have can be bound.
        at_fault = setting or ("host" if error.errno == errno.EADDRNOTAVAIL else "port")
        raise InvalidConfiguration(
            f"cannot listen on {host} port {port}: {reason}; choose another --{at_fault.replace('_', '-')}",
            param=at_fault,
        ) from error
    return listener


def describe_server(
    console: Console,
    settings: ServeSettings,
    engine: ServingEngine,
    access: AccessControl,
    port: int,
    metrics_port: int | None = None,
) -> None:
    """Print the base, the address, who needs a key, and one example for each task that the store has an adapter for."""
    base, store = engine.base, engine.store
    host = "localhost" if settings.host in ("127.0.0.1", "::1", "0.0.0.0", "::") else settings.host
    # An address of version 6 has colons of its own.
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    facts = facts_table()
    tower = base.image_tower
    takes = [f"context {base.max_length}"] if base.reads_text else []
    takes += [f"images of {tower.height} x {tower.width}, {tower.tokens} tokens each"] if tower is not None else []
    facts.add_row("base", f"{base.name}, {base.kind} of {parameters:,} parameters, {', '.join(takes)}")
    facts.add_row("device", f"{base.device}, {str(base.dtype).removeprefix('torch.')}")
    memory = {name: f"{_mebibytes(size)} on the device" for name, size in engine.memory().items()}
    facts.add_row("adapter memory", f"{memory.pop('adapters')}, {settings.host_cache_mib} MiB cached")
    for name, size in memory.items():
        facts.add_row(name, f"{size}, at most {engine.context_tokens} tokens for a request")
    facts.add_row("store", f"{settings.store.resolve()}, {store.count_adapters():,} adapters")
    facts.add_row("address", url)
    facts.add_row("keys", _keys_line(settings, access))
    if settings.metrics_address is not None:
        facts.add_row("metrics", f"http://{settings.metrics_address.rpartition(':')[0]}:{metrics_port}/metrics")

    def show(title: str, *lines: str) -> None:
        console.print(f"\n# {title}", style="dim", highlight=False)
        for line in lines:
            # A wrapped command could not be pasted.
            console.print(line, highlight=False, soft_wrap=True)

    console.print("\nsera-serve is ready", style="bold", highlight=False)
    console.print(facts)
    needs_keys = access.needs_keys
    if needs_keys and not access.active_keys():
        command = f"sera-serve keys create --store {shlex.quote(str(settings.store.resolve()))} --tenant acme"
        show("make the first key, on this machine; the server sees it at once", f"{command} --scopes infer,publish")
    if needs_keys:
        show(f"in the commands below, {KEY_VARIABLE} is a key")
    adapters = _adapters_by_kind(base, store)
    for title, path, body in _examples(base, adapters):
        show(title, curl_line(f"{url}{path}", body, needs_keys))
        if path == CHAT_PATH:
            show("the same with OpenAI's client for Python", client_lines(f"{url}/v1", body, needs_keys))
    if base.image_tower is not None and (adapter := adapters.get("image-classify")) is not None:
        form = f"-F adapter={shlex.quote(adapter)} -F image=@photo.jpg"
        show(f"classify an image with {adapter}", f"{_curl(needs_keys)} {shlex.quote(f'{url}/v1/classify')} {form}")
    show("adapters in the store", f"{_curl(needs_keys)} {shlex.quote(f'{url}/v1/adapters')}\n")


def _keys_line(settings: ServeSettings, access: AccessControl) -> str:
    """Who needs a key."""
    if settings.auth == "off":
        return "auth is off: whoever reaches this address may do everything"
    if not access.needs_keys:
        return "none needed on this address, until the first one is made (sera-serve keys create)"
    count = access.active_keys()
    return f"needed by every request; {count} active" if count else "needed by every request, and none is valid"


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"


def _curl(needs_keys: bool) -> str:
    return f'{CURL} -H "Authorization: Bearer ${KEY_VARIABLE}"' if needs_keys else CURL


def curl_line(url: str, body: dict[str, Any], needs_keys: bool) -> str:
    """Write a shell command that posts JSON, with the key of the shell's SERA_KEY where the server needs one."""
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"{_curl(needs_keys)} {shlex.quote(url)} -H 'Content-Type: application/json' -d {data}"


def client_lines(url: str, body: dict[str, Any], needs_keys: bool) -> str:
    """Write lines of Python that send a chat by OpenAI's client and print the answer."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in body.items())
    imports, key = ("import os\n", f'os.environ["{KEY_VARIABLE}"]') if needs_keys else ("", "'none'")
    return (
        f"{imports}from openai import OpenAI\n"
        f"client = OpenAI(base_url={url!r}, api_key={key})\n"
        f"answer = client.chat.completions.create({arguments})\n"
        "print(answer.choices[0].message.content)"
    )


def _adapters_by_kind(base: FrozenBase, store: AdapterStore) -> dict[str, str]:
    """One adapter that this base serves for each task, `chat` among them. What cannot be read is left out."""
    found: dict[str, str] = {}
    shapes = base.module_shapes()
    for info in store.list_page(limit=_LOOKED_AT).adapters:
        kind = "chat" if info.has_chat_template else info.task
        if kind in found or (info.task == "generate" and base.kind != "decoder"):
            continue
        try:
            check_base(store.config(info.digest), base.info, shapes)
        except StoreError:
            # The adapter was made for another base, so a request for it would be refused; or its bundle is damaged.
            continue
        found[kind] = info.adapter
    return found


def _examples(base: FrozenBase, found: dict[str, str]) -> list[tuple[str, str, dict[str, Any]]]:
    """Choose requests that this server can serve, as (title, path, body): one for each kind of adapter."""
    examples: list[tuple[str, str, dict[str, Any]]] = []
    if adapter := found.get("chat"):
        messages = [{"role": "user", "content": EXAMPLES.get(adapter, "Hello!")}]
        examples.append((f"chat with {adapter}", CHAT_PATH, {"model": adapter, "messages": messages, "max_tokens": 40}))
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
