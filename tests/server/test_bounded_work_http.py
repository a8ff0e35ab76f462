"""Over HTTP, what one client sends does not keep the others waiting: hostile bodies, unread lists, uploads given up."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request

from adapters_store import AdapterBundle, AdapterStore, Page, PeftFiles, Published, parse_json
from sera_serve import threads
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.server import build_app, middleware, strict
from sera_serve.server.metrics import ServerMetrics
from sera_serve.server.native.uploads import Upload
from sera_serve.threads import SharedCall
from support.answers import refused
from support.live_server import live_server, wait_until
from support.loop_lag import watched_loop
from support.stub_engine import StubEngine

BODY_MIB = 4
MAX_LAG_S = 0.25


# A body of it has at most 160,000 items, of two bytes and a comma.
MOST = 440 << 10


def filled(beginning: bytes, unit: bytes, end: bytes, size: int = BODY_MIB << 20) -> bytes:
    """A body of so many bytes, of one repeated unit."""
    count = (size - len(beginning) - len(end)) // len(unit)
    return beginning + (unit * count).rstrip(b",") + end


HOSTILE = {
    "wrong tokens": ("/v1/generate", filled(b'{"token_ids":[', b"-1,", b"]}", MOST), 422, "invalid_value"),
    "wrong stops": ("/v1/generate", filled(b'{"prompt":"a","stop":[', b'"",', b"]}", MOST), 422, "invalid_value"),
    "wrong inputs": ("/v1/classify", filled(b'{"adapter":"a/b","inputs":[', b'"",', b"]}", MOST), 422, "invalid_value"),
    "many inputs": ("/v1/classify", filled(b'{"adapter":"a/b","inputs":[', b'"a",', b"]}", MOST), 422, "invalid_value"),
    "wrong prompt": (
        "/v1/completions",
        filled(b'{"model":"a/b","prompt":[', b"-1,", b"]}", MOST),
        400,
        "invalid_value",
    ),
    "wrong end": (
        "/v1/completions",
        filled(b'{"model":"a/b","prompt":[', b"1,", b',"a"]}', 300 << 10),
        400,
        "invalid_value",
    ),
    "many prompts": (
        "/v1/completions",
        filled(b'{"model":"a/b","prompt":[', b'"a",', b"]}", MOST),
        400,
        "invalid_value",
    ),
    "too many tokens": ("/v1/generate", filled(b'{"token_ids":[', b"1e9,", b"]}"), 400, "invalid_json"),
    "nested lists": (
        "/v1/generate",
        filled(b'{"token_ids":[', b"[" * 900 + b"]" * 900 + b",", b"]}"),
        400,
        "invalid_json",
    ),
    "small lists": ("/v1/generate", filled(b'{"token_ids":[', b"[],", b"]}"), 400, "invalid_json"),
    "small objects": ("/v1/generate", filled(b'{"token_ids":[', b"{},", b"]}"), 400, "invalid_json"),
    "deep": ("/v1/generate", b"[" * (BODY_MIB << 20), 400, "invalid_json"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_body_is_refused_without_a_stall(case: str, base: FrozenBase, store: AdapterStore) -> None:
    path, body, status, code = HOSTILE[case]
    app = build_app(StubEngine(base), store, ServeSettings(store=store.root, max_body_mib=BODY_MIB))

    async def main() -> None:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            async with watched_loop() as lag:
                response = await client.post(path, content=body, headers={"Content-Type": "application/json"})
            refused(response, status, code)
            assert lag.seconds < MAX_LAG_S

    asyncio.run(main())


@pytest.mark.parametrize("flood", ["large bodies", "short bodies", "no bodies"])
def test_others_are_answered_in_the_midst_of_a_flood(
    flood: str, base: FrozenBase, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = build_app(StubEngine(base), store, ServeSettings(store=store.root))
    text = json.dumps({"prompt": "x" * (9000 if flood == "large bodies" else 8000), "adapter": "demo/writer"})
    log: list[str] = []

    def work() -> None:
        log.append("flood")
        time.sleep(0.005)

    def parse(*args: Any) -> Any:
        work()
        return parse_json(*args)

    async def slow() -> None:
        work()

    monkeypatch.setattr(strict, "parse_json", parse)
    app.router.add_api_route("/slow", slow)

    async def main() -> None:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client,
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app, client=("10.0.0.2", 1)), base_url="http://localhost"
            ) as other,
        ):

            def one() -> Coroutine[Any, Any, httpx.Response]:
                if flood == "no bodies":
                    return client.get("/slow")
                return client.post("/v1/generate", content=text, headers={"Content-Type": "application/json"})

            async def one_more() -> None:
                assert (await other.get("/healthz")).status_code == 200
                log.append("another")

            *answers, _ = await asyncio.gather(*(one() for _ in range(20)), one_more())
            assert {response.status_code for response in answers} == {200}

    asyncio.run(main())
    assert log.count("flood") == 20
    # In one turn of the event loop, all 20 would come first.
    assert log.index("another") < 15


def test_a_key_s_requests_take_turns_with_those_of_other_keys_and_addresses() -> None:
    shown = [(b"host", b"localhost"), (b"authorization", b"Bearer one")]
    assert middleware._sender_of({"headers": shown, "client": ("10.0.0.1", 1)}) == b"Bearer one"
    assert middleware._sender_of({"headers": shown[:1], "client": ("10.0.0.1", 1)}) == "10.0.0.1"
    assert middleware._sender_of({"headers": [], "client": None}) == ""


@pytest.mark.parametrize("path", ["/readyz", "/metrics"])
def test_what_operators_ask_for_is_made_once_for_all_and_holds_up_nobody(
    path: str, base: FrozenBase, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = StubEngine(base)
    begun, may_end = threading.Event(), threading.Event()
    was_told: list[bool] = []

    def work(*_: Any) -> bytes:
        begun.set()
        was_told.append(may_end.wait(5))
        return b"made"

    asked: list[SharedCall[Any]] = []
    result = SharedCall.result

    async def noted(call: SharedCall[Any]) -> Any:
        asked.append(call)
        return await result(call)

    monkeypatch.setattr(SharedCall, "result", noted)
    monkeypatch.setattr(engine, "ready", work)
    monkeypatch.setattr(ServerMetrics, "exposition", work)
    app = build_app(engine, store, ServeSettings(store=store.root))

    async def main() -> None:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client,
        ):
            answers = [asyncio.ensure_future(client.get(path)) for _ in range(3)]
            while not begun.is_set() or len(asked) < 3:
                await asyncio.sleep(0.001)
            assert (await client.get("/healthz")).status_code == 200
            may_end.set()
            for answer in await asyncio.gather(*answers):
                assert answer.status_code == 200 and (path == "/readyz" or answer.content == b"made")

    asyncio.run(main())
    assert was_told == [True]


def test_a_long_body_takes_turns_with_the_calls_of_the_engine(base: FrozenBase, store: AdapterStore) -> None:
    engine = StubEngine(base)
    app = build_app(engine, store, ServeSettings(store=store.root))

    async def main() -> None:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client,
        ):
            async with engine.loop_turns().turn("a call of many rows"):
                answers = [
                    asyncio.ensure_future(client.post("/v1/generate", json={"prompt": "a" * length}))
                    for length in (10, 10_000)
                ]
                assert (await answers[0]).status_code == 200
                await asyncio.sleep(0.1)
                assert not answers[1].done()
            assert (await answers[1]).status_code == 200

    asyncio.run(main())


class HeldStore(AdapterStore):
    """A store whose lists and publications wait for the test."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.opened = threading.Event()
        self.listed = self.publishing = 0
        self.names: list[str] = []

    def list_page(
        self,
        tenant: str | None = None,
        after: str | None = None,
        limit: int = 100,
        between: Callable[[], None] | None = None,
    ) -> Page:
        self.listed += 1
        assert self.opened.wait(20)
        return super().list_page(tenant, after, limit, between)

    def publish(self, bundle: AdapterBundle, name: str, *, keep_latest: bool = False) -> Published:
        self.publishing += 1
        self.names.append(name)
        assert self.opened.wait(20)
        return super().publish(bundle, name, keep_latest=keep_latest)


@pytest.fixture
def held(tmp_path: Path, writer: AdapterBundle) -> HeldStore:
    AdapterStore(tmp_path / "held").publish(writer, "demo/writer")
    return HeldStore(tmp_path / "held")


@pytest.fixture
def held_app(held: HeldStore, engine: StubEngine) -> FastAPI:
    return build_app(engine, held, ServeSettings(store=held.root, max_uploads=3))


@pytest.fixture
def held_url(held: HeldStore, held_app: FastAPI) -> Iterator[str]:
    with live_server(held_app) as address:
        yield address
        held.opened.set()


def send(url: str, content: bytes) -> socket.socket:
    """Send bytes on a connection of its own, and leave the connection open."""
    place = urlsplit(url)
    connection = socket.create_connection((place.hostname, place.port), timeout=10)
    connection.sendall(content)
    return connection


def list_request(url: str) -> bytes:
    return f"GET /v1/adapters?limit=1000 HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n\r\n".encode()


@pytest.mark.parametrize("path", ["/v1/adapters", "/v1/models"])
def test_a_page_is_read_and_written_with_pauses(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    slices: list[float] = []
    monkeypatch.setattr(threads._Pace, "pause", lambda self, slice_s=0.0: slices.append(slice_s))
    assert client.get(path).status_code == 200
    # Before each of the two adapters is read, and before each is written, at least.
    assert len([slice_s for slice_s in slices if slice_s]) >= 4


def test_lists_that_nobody_reads_are_not_made(held: HeldStore, held_url: str, held_app: FastAPI) -> None:
    for _ in range(150):
        send(held_url, list_request(held_url)).close()
    wait_until(lambda: held.listed == held_app.state.executors.listing.calls() == 1)
    with httpx.Client(base_url=held_url, timeout=10) as client:
        # Other work has threads of its own.
        assert client.get("/v1/adapters/demo/writer").status_code == 200
        assert client.delete("/v1/adapters/demo/none").status_code == 404
        assert client.post("/v1/generate", json={"adapter": "demo/writer", "prompt": "a"}).status_code == 200
        assert held.listed == 1
        held.opened.set()
        assert client.get("/v1/adapters").status_code == 200


def test_more_lists_than_may_wait_are_refused(held: HeldStore, held_url: str, held_app: FastAPI) -> None:
    waiting = [send(held_url, list_request(held_url)) for _ in range(1 + 64)]
    wait_until(lambda: held_app.state.executors.listing.calls() == 65)
    with httpx.Client(base_url=held_url, timeout=10) as client:
        response = client.get("/v1/adapters")
        error = refused(response, 503, "overloaded")
        assert "listing" in error["message"] and response.headers["retry-after"] == "1"
        held.opened.set()
        for connection in waiting:
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
            connection.close()


def upload_request(url: str, data: bytes, name: str) -> bytes:
    place = urlsplit(url)
    request = httpx.Request(
        "POST", f"{url}/v1/adapters", files={"bundle": ("x.safetensors", data)}, data={"name": name}
    )
    request.read()
    lines = [f"POST /v1/adapters HTTP/1.1\r\nHost: {place.netloc}"]
    lines += [f"{key}: {request.headers[key]}" for key in ("Content-Type", "Content-Length")]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + request.content


def test_an_upload_that_is_given_up_is_published_whole_or_not_at_all(
    held: HeldStore,
    held_url: str,
    held_app: FastAPI,
    engine: StubEngine,
    writer: AdapterBundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files: list[Any] = []
    read = Upload.read

    def noted(self: Upload, max_bytes: int) -> AdapterBundle | PeftFiles:
        files.append(self.bundle.file)
        return read(self, max_bytes)

    monkeypatch.setattr(Upload, "read", noted)
    data = writer.to_bytes()
    begun = send(held_url, upload_request(held_url, data, "acme/begun"))
    wait_until(lambda: held.publishing == 1)
    assert engine.checked == [writer.digest]
    waiting = [send(held_url, upload_request(held_url, data, f"acme/waits{number}")) for number in range(2)]
    wait_until(lambda: held_app.state.executors.publishing.calls() == 3)
    with httpx.Client(base_url=held_url, timeout=10) as client:
        upload = {"bundle": ("x.safetensors", data)}
        refused(client.post("/v1/adapters", files=upload, data={"name": "acme/late"}), 503, "too_many_uploads")
        for connection in (begun, *waiting):
            connection.close()
        wait_until(lambda: 'status="499"} 2.0' in client.get("/metrics").text)
        # The publication under way still has its file.
        assert [file.closed for file in files] == [False]
        held.opened.set()
        wait_until(lambda: files[0].closed)
        assert client.get("/v1/adapters/acme/begun").json()["version"] == 1
        wait_until(lambda: 'status="499"} 3.0' in client.get("/metrics").text)
        assert client.get("/v1/adapters/acme/waits0").status_code == 404
        assert held.publishing == 1


def test_publications_take_turns_by_tenant(
    held: HeldStore, held_url: str, held_app: FastAPI, writer: AdapterBundle
) -> None:
    data = writer.to_bytes()
    sent = []
    for name in ("acme/first", "acme/second", "zeta/first"):
        sent.append(send(held_url, upload_request(held_url, data, name)))
        wait_until(lambda: held_app.state.executors.publishing.calls() == len(sent))
    held.opened.set()
    for connection in sent:
        assert connection.recv(15) == b"HTTP/1.1 201 Cr"
        connection.close()
    assert held.names == ["acme/first", "zeta/first", "acme/second"]


def test_time_of_arrival_reaches_the_engine(
    client: httpx.Client, engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the protocol does, in the scope's state.
    received = time.monotonic() - 3
    monkeypatch.setattr(Request, "state", _StateWith(Request.state, received))
    for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}):
        client.post("/v1/generate", json=body).raise_for_status()
    client.post("/v1/classify", json={"adapter": "demo/sorter", "inputs": ["a"]}).raise_for_status()
    assert engine.received == [received] * 3


class _StateWith:
    def __init__(self, state: Any, received_at: float) -> None:
        self._state, self._received_at = state, received_at

    def __get__(self, request: Request, owner: type[Request]) -> Any:
        state = self._state.__get__(request, owner)
        state.received_at = self._received_at
        return state


def test_unpinning_what_is_gone_drops_the_pins_of_deleted_adapters(client: httpx.Client, engine: StubEngine) -> None:
    refused(client.delete("/v1/adapters/demo/none/pin"), 404, "adapter_not_found")
    assert engine.dropped == 1


def test_a_page_has_the_documented_json(client: httpx.Client) -> None:
    response = client.get("/v1/adapters?limit=1")
    assert response.headers["content-type"] == "application/json"
    assert json.loads(response.text)["next"] == response.json()["adapters"][0]["adapter"]


def half_body(url: str, size: int) -> tuple[socket.socket, bytes]:
    """Send the first half of a valid body of `size` bytes; returns the connection and the other half."""
    body = whole(size)
    head = f"POST /v1/generate HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
    connection = send(url, head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body[: size // 2])
    return connection, body[size // 2 :]


def status_of(connection: socket.socket) -> bytes:
    with connection:
        return connection.recv(1 << 16).split(b" ", 2)[1]


def test_all_bodies_together_are_bounded_and_short_ones_are_served(
    base: FrozenBase, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "_MAX_HELD", 500 << 10)
    monkeypatch.setattr(middleware, "_MAX_HELD_BODIES", 0)
    app = build_app(StubEngine(base), store, ServeSettings(store=store.root))
    with live_server(app) as url, httpx.Client(base_url=url, timeout=10) as client:
        # 150 KiB each; the fourth is one too many.
        halves = [half_body(url, 300 << 10) for _ in range(3)]
        assert client.post("/v1/generate", json={"prompt": "a"}).status_code == 200
        assert status_of(half_body(url, 300 << 10)[0]) == b"503"
        connection, rest = halves[0]
        connection.sendall(rest)
        assert status_of(connection) == b"503"
        for connection, _ in halves[1:]:
            connection.close()
        # What has ended is not counted any more.
        wait_until(lambda: client.post("/v1/generate", content=whole(400 << 10), headers=JSON).status_code == 200)


JSON = {"Content-Type": "application/json"}


def whole(size: int) -> bytes:
    return b'{"prompt":"a"%s}' % (b" " * (size - 14))
