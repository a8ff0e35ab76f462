"""A running server: settings read again at SIGHUP, and readiness down before connections are refused."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.commands.reload import SettingsReloader
from sera_serve.commands.serve import bound_socket, http_config
from sera_serve.config import RELOADED, ServeSettings, load_settings
from sera_serve.engine import Principal, ServingEngine
from sera_serve.engine.request import GenerationRequest
from sera_serve.errors import InvalidConfiguration
from sera_serve.server import build_app
from sera_serve.server.graceful import GracefulServer
from support.answers import refused
from support.live_server import wait_until
from support.stub_engine import StubEngine


@contextmanager
def draining_server(base: FrozenBase, store: AdapterStore, drain_s: float) -> Iterator[tuple[GracefulServer, str]]:
    settings = ServeSettings(store=store.root, shutdown_grace_s=2, drain_s=drain_s)
    app = build_app(StubEngine(base), store, settings)
    config = http_config(app, settings, app.state.metrics.count_refusal, log_level="warning")
    server = GracefulServer(
        config, 2, lambda: None, drain_s=drain_s, begin_drain=lambda: setattr(app.state, "draining", True)
    )
    with bound_socket("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield server, f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)


def is_refused(client: httpx.Client) -> bool:
    """Whether the server accepts no connection."""
    try:
        client.get("/healthz")
    except httpx.TransportError:
        return True
    return False


def new_connections(url: str) -> httpx.Client:
    """A client that opens a connection for each request."""
    return httpx.Client(base_url=url, limits=httpx.Limits(max_keepalive_connections=0))


def test_readiness_is_down_while_connections_are_still_accepted(base: FrozenBase, store: AdapterStore) -> None:
    with draining_server(base, store, 60) as (server, url), new_connections(url) as client:
        assert client.get("/readyz").status_code == 200
        server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: client.get("/readyz").status_code == 503)
        refused(client.get("/readyz"), 503, "draining")
        # New connections are served, and the process is alive.
        assert client.post("/v1/generate", json={"prompt": "x"}).status_code == 200
        assert client.get("/healthz").status_code == 200
        # An interrupt does not wait.
        server.handle_exit(signal.SIGINT, None)
        wait_until(lambda: is_refused(client))


def test_a_drain_lasts_as_long_as_the_setting_says(base: FrozenBase, store: AdapterStore) -> None:
    settings = ServeSettings(store=store.root)
    config = http_config(build_app(StubEngine(base), store, settings), settings, lambda code: None)
    begun: list[float] = []
    server = GracefulServer(config, 1, lambda: None, drain_s=0.3, begin_drain=lambda: begun.append(time.monotonic()))

    async def run() -> float:
        assert not await server.on_tick(1)
        server.should_exit = True
        while not await server.on_tick(1):
            await asyncio.sleep(0.01)
        return time.monotonic()

    ended = asyncio.run(run())
    assert len(begun) == 1
    assert ended - begun[0] >= 0.3


def test_without_a_drain_the_server_ends_at_once(base: FrozenBase, store: AdapterStore) -> None:
    with draining_server(base, store, 0) as (server, url), new_connections(url) as client:
        assert client.get("/readyz").status_code == 200
        server.should_exit = True
        wait_until(lambda: is_refused(client), 1)


def test_a_server_whose_engine_has_failed_ends_by_itself(base: FrozenBase, store: AdapterStore) -> None:
    settings = ServeSettings(store=store.root)
    config = http_config(build_app(StubEngine(base), store, settings), settings, lambda code: None)
    failures: list[str] = []
    server = GracefulServer(
        config,
        1,
        lambda: None,
        drain_s=0.2,
        failure=lambda: failures[0] if failures else None,
    )

    async def run() -> None:
        assert not await server.on_tick(1)
        failures.append("the device is gone")
        # A load balancer sees first that the server is not ready.
        assert not await server.on_tick(1)
        await asyncio.sleep(0.3)
        assert await server.on_tick(1)

    asyncio.run(run())
    assert server.failed == "the device is gone"


def test_sighup_reloads_and_does_not_end_the_server(base: FrozenBase, store: AdapterStore) -> None:
    settings = ServeSettings(store=store.root)
    app = build_app(StubEngine(base), store, settings)
    asked: list[int] = []
    config = http_config(app, settings, lambda code: None)
    server = GracefulServer(config, 1, lambda: None, reload=lambda: asked.append(1))
    before = signal.getsignal(signal.SIGHUP)
    with server.capture_signals():
        os.kill(os.getpid(), signal.SIGHUP)
        wait_until(lambda: bool(asked))
        assert not server.should_exit
    assert signal.getsignal(signal.SIGHUP) is before


class Reloading:
    """A file of settings, a reloader, and what was applied."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "serve.yaml"
        self.weights: list[dict[str, float]] = []
        self.refusal: InvalidConfiguration | None = None

    def write(self, text: str) -> None:
        self.file.write_text(text)

    def begin(self) -> SettingsReloader:
        read = lambda: load_settings(self.file, {"port": 5})  # noqa: E731
        apply: dict[str, Callable[[Any], None]] = {name: lambda value: None for name in RELOADED}
        return SettingsReloader(read(), read, apply | {"tenant_weights": self._take})

    def _take(self, weights: dict[str, float]) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.weights.append(weights)


def test_a_changed_weight_is_applied_and_other_settings_need_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sera_serve.server")
    reloading = Reloading(tmp_path)
    reloading.write("tenant_weights: {acme: 2}\n")
    reloader = reloading.begin()
    reloader.reload()
    assert reloading.weights == []
    reloading.write("tenant_weights: {acme: 3}\nmax_queue: 5\n")
    reloader.reload()
    assert reloading.weights == [{"acme": 3.0}]
    assert "max_queue has changed, and only a restart" in caplog.text
    assert "changed: tenant_weights" in caplog.text
    # What was applied is the present value; removing it goes back to the default.
    reloader.reload()
    reloading.write("")
    reloader.request()
    wait_until(lambda: reloading.weights == [{"acme": 3.0}, {}])


@pytest.mark.parametrize(
    "text",
    ["tenant_weights: {acme: 0}", "tenant_weigths: {}", "- 1", "port: [", "host: 2024-13-45", "[" * 2000],
)
def test_a_file_that_is_refused_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    reloading = Reloading(tmp_path)
    reloading.write("tenant_weights: {acme: 2}\n")
    reloader = reloading.begin()
    reloading.write(text)
    reloader.reload()
    assert reloading.weights == []
    assert "all stay as they were" in caplog.text


def test_a_value_that_is_refused_stays_and_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reloading = Reloading(tmp_path)
    reloading.write("")
    reloader = reloading.begin()
    reloading.write("tenant_weights: {acme: 2}\n")
    reloading.refusal = InvalidConfiguration("no")
    reloader.reload()
    assert "tenant_weights stays as it was: no" in caplog.text
    reloading.refusal = None
    reloader.reload()
    assert reloading.weights == [{"acme": 2.0}]


def test_an_engine_charges_by_the_new_weights(base: FrozenBase, store: AdapterStore) -> None:
    engine = ServingEngine(base, store, ServeSettings(store=store.root, pool_mib=1, kv_cache_tokens=64))
    scheduler = engine.runners["generate"].scheduler

    def charged() -> float:
        before = scheduler.counter("acme")
        scheduler.charge([GenerationRequest(principal=Principal("acme"))])
        return scheduler.counter("acme") - before

    one = charged()
    engine.set_tenant_weights({"acme": 4.0})
    assert charged() == one / 4
    engine.set_tenant_weights({})
    assert charged() == one
    engine.stop()
