"""The end of a server: requests finish within the grace time, and get their documented errors at its end."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaForCausalLM

from adapters_store import AdapterStore
from sera_serve.access import AccessControl
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import app as app_module
from sera_serve.server import build_app, protocol
from support.answers import events, refused
from support.live_server import GRACE_S, live_server, wait_until
from support.raw_http import RawClient
from support.stub_engine import HANGS, StubEngine


@contextmanager
def slow_steps(seconds: float) -> Iterator[None]:
    """Make each forward pass of a decoder take longer."""

    def hook(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, LlamaForCausalLM):
            time.sleep(seconds)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def stopping(app: Any) -> Iterator[tuple[str, Callable[[], float]]]:
    """Serve an app. Yields the URL, and a function that stops the server and returns how many seconds that took."""
    stop, ended = threading.Event(), threading.Event()
    urls: list[str] = []
    seconds: list[float] = []

    def serve() -> None:
        with live_server(app) as url:
            urls.append(url)
            stop.wait(60)
            started = time.monotonic()
        seconds.append(time.monotonic() - started)
        ended.set()

    thread = threading.Thread(target=serve)
    thread.start()
    wait_until(lambda: bool(urls))

    def end() -> float:
        stop.set()
        assert ended.wait(30)
        return seconds[0]

    try:
        yield urls[0], end
    finally:
        stop.set()
        thread.join(30)


def test_every_request_gets_its_error_when_the_grace_time_is_over(base: FrozenBase, store: AdapterStore) -> None:
    settings = ServeSettings(store=store.root, pool_mib=4, kv_cache_tokens=16384, max_sequences=4, cpu_threads=1)
    engine = ServingEngine(base, store, settings)
    body = {"prompt": "Once upon a time", "max_new_tokens": 200}
    with (
        slow_steps(0.05),
        ThreadPoolExecutor(24) as clients,
        stopping(build_app(engine, store, settings)) as (url, end),
    ):

        def ask(stream: bool) -> httpx.Response:
            return httpx.post(f"{url}/v1/generate", json=body | {"stream": stream}, timeout=60)

        # The first four run, and the others wait.
        streams = [True] * 4 + [number % 2 == 0 for number in range(20)]
        asked = [clients.submit(ask, stream) for stream in streams[:4]]
        wait_until(lambda: engine.in_flight() == 4, 20)
        asked += [clients.submit(ask, stream) for stream in streams[4:]]
        wait_until(lambda: engine.in_flight() == 24, 20)
        assert GRACE_S - 0.5 < end() < GRACE_S + 8
        begun = 0
        for stream, answer in zip(streams, asked, strict=True):
            response = answer.result(10)
            if stream and response.status_code == 200:
                last = events(response.text)[-1]
                assert last["error"]["code"] == "engine_unavailable"
                begun += 1
            else:
                refused(response, 503, "engine_unavailable")
    assert begun
    assert engine.in_flight() == 0


def test_a_request_that_waits_for_no_engine_gets_the_error_too(base: FrozenBase, store: AdapterStore) -> None:
    app = build_app(StubEngine(base), store, ServeSettings(store=store.root))
    with ThreadPoolExecutor(1) as clients, stopping(app) as (url, end):
        asked = clients.submit(httpx.post, f"{url}/v1/generate", json={"prompt": HANGS}, timeout=60)
        wait_until(lambda: bool(app.state.engine.asked))
        end()
        refused(asked.result(10), 503, "engine_unavailable")


def test_a_part_that_waits_for_the_disk_does_not_hold_the_end(
    base: FrozenBase, store: AdapterStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(AccessControl, "stop", lambda access: answers.wait(20))
    monkeypatch.setattr(app_module, "_END_S", 0.1)
    engine = StubEngine(base)

    async def serve() -> None:
        app = build_app(engine, store, ServeSettings(store=store.root))
        async with app.router.lifespan_context(app):
            pass

    began = time.monotonic()
    asyncio.run(serve())
    answers.set()
    assert time.monotonic() - began < 15
    assert not engine.started and "the keys did not end within" in caplog.text


def test_a_request_in_flight_finishes_within_the_grace_time(base: FrozenBase, store: AdapterStore) -> None:
    settings = ServeSettings(store=store.root, pool_mib=4, kv_cache_tokens=4096, cpu_threads=1)
    engine = ServingEngine(base, store, settings)
    with slow_steps(0.05), ThreadPoolExecutor(1) as clients, stopping(build_app(engine, store, settings)) as (url, end):
        body = {"prompt": "Once upon a time", "max_new_tokens": 20}
        asked = clients.submit(httpx.post, f"{url}/v1/generate", json=body, timeout=60)
        wait_until(lambda: engine.in_flight() == 1)
        end()
        assert len(asked.result(10).json()["token_ids"]) == 20


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/adapters"])
def test_requests_that_have_not_arrived_do_not_hold_the_end(
    base: FrozenBase, store: AdapterStore, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "_BODY_AT_SHUTDOWN_S", 0.3)
    app = build_app(StubEngine(base), store, ServeSettings(store=store.root))
    with stopping(app) as (url, end), RawClient(url) as body, RawClient(url) as head, RawClient(url) as idle:
        kind = "multipart/form-data; boundary=b" if path == "/v1/adapters" else "application/json"
        body.send(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n".encode())
        body.send(b"Content-Length: 1000\r\n\r\n--b\r\n")
        head.send(b"GET /healthz HTTP/1.1\r\nHost: loc")
        idle.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle.response().status == 200
        assert end() < GRACE_S
        error = body.response().refused(503, "engine_unavailable")
        assert "stopping" in error["message"]
        assert head.ended() and idle.ended()


def test_a_body_that_comes_during_the_end_is_served(base: FrozenBase, store: AdapterStore) -> None:
    app = build_app(StubEngine(base), store, ServeSettings(store=store.root))
    with ThreadPoolExecutor(1) as clients, stopping(app) as (url, end), RawClient(url) as client:
        content = json.dumps({"prompt": "x"}).encode()
        client.send(b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        client.send(b"Content-Length: %d\r\n\r\n" % len(content) + content[:4])
        time.sleep(0.1)
        ending = clients.submit(end)
        time.sleep(0.5)
        client.send(content[4:])
        response = client.response()
        assert (response.status, response.headers["connection"]) == (200, "close")
        ending.result(30)


def test_the_threads_of_probes_and_scrapes_end_with_the_app(base: FrozenBase, store: AdapterStore) -> None:
    before = set(threading.enumerate())
    engine = StubEngine(base)
    with stopping(build_app(engine, store, ServeSettings(store=store.root))) as (url, stop):
        for path in ("/readyz", "/metrics"):
            assert httpx.get(url + path).status_code == 200
        names = {"a check of the store", "a check of the engine", "metrics"}
        started = [each for each in threading.enumerate() if each not in before and each.name in names]
        assert {each.name for each in started} == names
        stop()
        for each in started:
            each.join(10)
            assert not each.is_alive(), each.name
