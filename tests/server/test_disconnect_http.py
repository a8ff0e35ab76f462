"""When a client disconnects, the engine releases what the request holds, in every phase of the request."""

from __future__ import annotations

import time

import httpx
import pytest

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.server import build_app
from support.live_server import live_server, wait_until
from support.stub_engine import HANGS, SLOW, StubEngine


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/generate", {"prompt": SLOW}),
        ("/v1/generate", {"prompt": HANGS}),
        ("/v1/generate", {"prompt": HANGS, "stream": True}),
        ("/v1/classify", {"adapter": "demo/sorter", "inputs": [HANGS]}),
    ],
)
def test_a_disconnect_before_the_response_cancels(
    client: httpx.Client, engine: StubEngine, path: str, body: dict[str, object]
) -> None:
    with pytest.raises(httpx.ReadTimeout):
        client.post(path, json=body, timeout=0.2)
    wait_until(lambda: engine.cancelled == 1)
    assert engine.open_streams == 0
    assert client.get("/readyz").status_code == 200
    assert 'status="499"' in client.get("/metrics").text


def test_a_disconnect_from_a_stream_cancels(client: httpx.Client, engine: StubEngine) -> None:
    with client.stream("POST", "/v1/generate", json={"prompt": SLOW, "stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        assert engine.open_streams == 1
    wait_until(lambda: engine.open_streams == 0)
    assert engine.cancelled == 1


def test_many_disconnects_at_once(url: str, engine: StubEngine) -> None:
    clients = [httpx.Client(base_url=url, timeout=10) for _ in range(8)]
    streams = []
    for client in clients:
        request = client.build_request("POST", "/v1/generate", json={"prompt": SLOW, "stream": True})
        streams.append(client.send(request, stream=True))
    assert engine.open_streams == 8
    for stream, client in zip(streams, clients, strict=True):
        stream.close()
        client.close()
    wait_until(lambda: engine.open_streams == 0)
    assert engine.cancelled == 8


def test_a_shutdown_ends_an_endless_request_after_the_grace_period(base: FrozenBase, store: AdapterStore) -> None:
    engine = StubEngine(base)
    with live_server(build_app(engine, store, ServeSettings(store=store.root))) as url:
        client = httpx.Client(base_url=url, timeout=10)
        body = {"prompt": SLOW, "stream": True}
        response = client.send(client.build_request("POST", "/v1/generate", json=body), stream=True)
        started = time.monotonic()
    # The grace period of the test server is two seconds.
    assert 1 < time.monotonic() - started < 8
    response.close()
    client.close()
    assert (engine.open_streams, engine.started) == (0, False)
