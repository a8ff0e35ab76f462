"""What one tenant can hold up on the server, and what stays for every other tenant."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from adapters_store import AdapterBundle, AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.errors import Overloaded
from sera_serve.jobs import Job, Jobs, TrainingFiles
from sera_serve.jobs.files import TrainingFile
from sera_serve.loop_turns import LoopTurns
from sera_serve.server import build_app, middleware
from sera_serve.server.middleware import BodyLimit
from sera_serve.server.native.uploads import TooManyUploads, UploadSlots
from sera_serve.server.openai.texts import Texts
from sera_serve.server.training import StreamSlots
from sera_serve.threads import pause
from support.answers import refused
from support.factories import random_adapter
from support.live_server import live_server, wait_until
from support.stub_engine import StubEngine
from support.tenants import clients, make_key
from support.training import SORTED, jsonl

TEMPLATE = "{{ messages[0].content }}"
HELD_TEXT, HELD_TOKEN = "hold", 7
TENANTS = ("greedy", "modest")


@dataclass
class Served:
    """A running server, and a client of each tenant."""

    url: str
    app: FastAPI
    clients: dict[str, httpx.Client]


@pytest.fixture
def served(base: FrozenBase, tmp_path: Path) -> Iterator[Served]:
    store = AdapterStore(tmp_path / "store")
    own = random_adapter(base, SeraConfig(8, 4, 16, ("q_proj",)), seed=1, chat_template=TEMPLATE)
    for tenant in TENANTS:
        store.publish(own, f"{tenant}/chat")
    secrets = {tenant: make_key(store.root, tenant).secret for tenant in TENANTS}
    app = build_app(StubEngine(base), store, ServeSettings(store=store.root, max_upload_mib=1, max_uploads=5))
    with live_server(app) as url, clients(url, secrets) as found:
        yield Served(url, app, found)


def texts_requests(tenant: str, text: str, token: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """A request for each route that renders, tokenizes or names tokens."""
    model, messages = f"{tenant}/chat", [{"role": "user", "content": text}]
    return {
        "chat": ("/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 1}),
        "responses": ("/v1/responses", {"model": model, "input": text, "max_output_tokens": 1}),
        "echo": ("/v1/completions", {"model": model, "prompt": [token], "echo": True, "max_tokens": 1}),
        "tokenize": ("/tokenize", {"model": model, "messages": messages}),
        "detokenize": ("/detokenize", {"model": model, "tokens": [token]}),
    }


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds the work on HELD_TEXT and HELD_TOKEN, until it is set."""
    opened = threading.Event()

    def held(work: Callable[..., Any], is_held: Callable[..., bool]) -> Callable[..., Any]:
        def run(texts: Texts, *arguments: Any) -> Any:
            if is_held(*arguments):
                assert opened.wait(20)
            return work(texts, *arguments)

        return run

    chat_prompt = held(Texts.chat_prompt, lambda conversation, *_: conversation.messages[0].content == HELD_TEXT)
    monkeypatch.setattr(Texts, "chat_prompt", chat_prompt)
    monkeypatch.setattr(Texts, "decode", held(Texts.decode, lambda tokens, *_: tokens == [HELD_TOKEN]))
    yield opened
    opened.set()


@pytest.mark.parametrize("route", texts_requests("greedy", HELD_TEXT, HELD_TOKEN))
def test_texts_of_one_tenant_hold_up_no_other(served: Served, release: threading.Event, route: str) -> None:
    greedy, modest = (served.clients[tenant] for tenant in TENANTS)
    path, body = texts_requests("greedy", HELD_TEXT, HELD_TOKEN)[route]
    executor = served.app.state.texts.executor
    with ThreadPoolExecutor(4) as threads:
        held = [threads.submit(greedy.post, path, json=body) for _ in range(4)]
        try:
            wait_until(lambda: executor.calls() == len(held))
            for path, body in texts_requests("modest", "hello", HELD_TOKEN + 1).values():
                assert modest.post(path, json=body, timeout=5).status_code == 200, path
            assert not any(call.done() for call in held)
        finally:
            release.set()
        assert [call.result().status_code for call in held] == [200] * len(held)


@contextmanager
def begun_uploads(served: Served, path: str, count: int) -> Iterator[None]:
    """Uploads of the greedy tenant that never end."""
    key = served.clients["greedy"].headers["Authorization"]
    place = served.url.removeprefix("http://")
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {place}\r\nAuthorization: {key}\r\nContent-Length: 1000\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    )
    host, port = place.split(":")
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=10)).sendall(head.encode())
        yield


def uploads_under_way(served: Served) -> int:
    slots: UploadSlots | None = getattr(served.app.state, "upload_slots", None)
    return slots.count() if slots else 0


@pytest.mark.parametrize("path", ["/v1/adapters", "/v1/files"])
def test_uploads_of_one_tenant_leave_room_for_those_of_others(served: Served, writer: AdapterBundle, path: str) -> None:
    greedy, modest = (served.clients[tenant] for tenant in TENANTS)
    file = {"bundle": writer.to_bytes()}
    with begun_uploads(served, path, 4):
        # Two of the four are half of `max_uploads`.
        wait_until(lambda: uploads_under_way(served) == 2)
        answer = greedy.post("/v1/adapters", data={"name": "greedy/new"}, files=file)
        refused(answer, 503, "too_many_uploads")
        assert int(answer.headers["retry-after"]) > 0 and uploads_under_way(served) == 2
        assert modest.post("/v1/adapters", data={"name": "modest/new"}, files=file).status_code == 201
        rows = b'{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'
        kept = modest.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", rows)})
        assert kept.status_code == 200
    wait_until(lambda: uploads_under_way(served) == 0)
    assert greedy.post("/v1/adapters", data={"name": "greedy/new"}, files=file).status_code == 201


def test_a_single_upload_at_once_is_any_tenants() -> None:
    slots = UploadSlots(1)
    with slots.take("greedy"), pytest.raises(TooManyUploads), slots.take("modest"):
        pass
    with slots.take("modest"):
        assert slots.count() == 1
    assert slots.count() == 0


# By the kind of threads: requests that need them, with the status of their answers. The base takes no images.
HELD_UP: list[tuple[str, str, str, int]] = [
    ("listing", "GET", "/v1/adapters", 200),
    ("listing", "GET", "/v1/models", 200),
    ("changing", "GET", "/v1/adapters/{}/chat", 200),
    ("changing", "PUT", "/v1/adapters/{}/chat/pin", 200),
    ("forms", "POST", "/v1/classify", 422),
]


@pytest.mark.parametrize(("kind", "method", "path", "status"), HELD_UP)
def test_lists_changes_and_forms_of_one_tenant_hold_up_no_other(
    served: Served, kind: str, method: str, path: str, status: int
) -> None:
    """A greedy tenant fills its half of what may wait, and is told so; another one's calls come at once."""
    opened = threading.Event()
    executor = getattr(served.app.state.executors, kind)

    def ask(tenant: str) -> httpx.Response:
        form = {"data": {"adapter": f"{tenant}/chat"}, "files": {"text": b""}} if kind == "forms" else {}
        return served.clients[tenant].request(method, path.format(tenant), timeout=20, **form)

    with ThreadPoolExecutor(40) as threads:
        blocked = threads.submit(lambda: asyncio.run(executor.run_in_turn("greedy", opened.wait, 20)))
        try:
            wait_until(lambda: executor.calls() == 1)
            asked = [threads.submit(ask, "greedy") for _ in range(39)]
            wait_until(lambda: sum(call.done() for call in asked) == 7)
            for call in asked:
                if call.done():
                    refused(call.result(), 429, "tenant_overloaded")
            other = threads.submit(ask, "modest")
            if kind == "changing":
                assert other.result(timeout=5).status_code == status
            else:
                # There is one thread: the other tenant's call is the next one, before all of these.
                wait_until(lambda: executor.calls() == 34)
        finally:
            opened.set()
        assert blocked.result()
        assert other.result().status_code == status
        assert sum(call.result().status_code == status for call in asked) == 32


def test_the_check_of_training_files_rests_for_half_of_its_time(served: Served) -> None:
    owed: list[float] = []

    def work() -> None:
        # Beyond a first burst of 0.1 s.
        for _ in range(3):
            began = time.monotonic()
            while time.monotonic() - began < 0.1:
                pass
            began = time.monotonic()
            pause()
            owed.append(time.monotonic() - began)

    asyncio.run(served.app.state.training.checking.run(work))
    assert owed[0] < 0.1 <= owed[2] + 0.01


def test_training_files_are_checked_in_turn_by_tenant(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, checked = threading.Event(), list[str]()
    add = TrainingFiles.add

    def held(files: TrainingFiles, tenant: str, *values: Any) -> TrainingFile:
        checked.append(tenant)
        assert opened.wait(20)
        return add(files, tenant, *values)

    monkeypatch.setattr(TrainingFiles, "add", held)
    form: dict[str, Any] = {"data": {"purpose": "fine-tune"}, "files": {"file": ("rows.jsonl", jsonl(SORTED))}}
    checking = served.app.state.training.checking
    with ThreadPoolExecutor(3) as threads:
        asked: list[Future[httpx.Response]] = []
        for tenant in ("greedy", "greedy", "modest"):
            asked.append(threads.submit(served.clients[tenant].post, "/v1/files", **form))
            wait_until(lambda: checking.calls() == len(asked))
        opened.set()
        assert [call.result().status_code for call in asked] == [200] * 3
    assert checked == ["greedy", "modest", "greedy"]


def test_streams_of_events_have_a_limit_of_a_tenant_and_one_together() -> None:
    slots = StreamSlots()
    with ExitStack() as held:
        for tenant in ("a", "b", "c", None):
            for _ in range(16):
                held.enter_context(slots.take(tenant))
            if tenant == "a":
                with pytest.raises(Overloaded), slots.take("a"):
                    pass
        with pytest.raises(Overloaded), slots.take("d"):
            pass
    with slots.take("a"):
        pass


def test_streams_of_events_of_one_tenant_hold_up_no_other(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """They look at the database, one at a time."""
    opened = threading.Event()
    executor = served.app.state.executors.changing
    get = Jobs.get

    def held(jobs: Jobs, job_id: str, tenant: str | None) -> Job:
        assert opened.wait(20)
        return get(jobs, job_id, tenant)

    monkeypatch.setattr(Jobs, "get", held)
    events = "/v1/fine_tuning/jobs/ftjob-0/events?stream=true"
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(served.clients["greedy"].get, events, timeout=20) for _ in range(8)]
        try:
            wait_until(lambda: executor.calls() == len(asked))
            assert served.clients["modest"].get("/v1/adapters/modest/chat", timeout=5).status_code == 200
        finally:
            opened.set()
        for call in asked:
            refused(call.result(), 404, "job_not_found")


def test_work_on_the_event_loop_takes_turns_by_key_and_tenant(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tenants may come from one address, as behind a proxy."""
    owners: list[Hashable] = []
    turn = LoopTurns.short_turn

    async def noted(turns: LoopTurns, owner: Hashable) -> None:
        owners.append(owner)
        await turn(turns, owner)

    monkeypatch.setattr(LoopTurns, "short_turn", noted)
    for tenant in TENANTS:
        client = served.clients[tenant]
        client.post("/v1/generate", json={"adapter": f"{tenant}/chat", "prompt": "a"}).raise_for_status()
        # To begin the request, to parse its body, and to write its answer.
        assert owners == [client.headers["Authorization"].encode(), tenant, tenant]
        owners.clear()


@pytest.fixture
def room_for_bodies(monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of all bodies under way."""
    monkeypatch.setattr(middleware, "_MAX_HELD", 500 << 10)
    monkeypatch.setattr(middleware, "_MAX_HELD_BODIES", 0)
    return 500 << 10


def test_bodies_of_one_tenant_leave_room_for_those_of_others(room_for_bodies: int, served: Served) -> None:
    greedy, modest = (served.clients[tenant] for tenant in TENANTS)
    key = greedy.headers["Authorization"]
    place = served.url.removeprefix("http://")
    head = (
        f"POST /v1/generate HTTP/1.1\r\nHost: {place}\r\nAuthorization: {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {room_for_bodies}\r\n\r\n"
    )
    host, port = place.split(":")
    body = {"prompt": "x" * (100 << 10)}
    limit: Any = served.app.middleware_stack
    while not isinstance(limit, BodyLimit):
        limit = limit.app
    assert greedy.post("/v1/generate", json=body).status_code == 200
    with socket.create_connection((host, int(port)), timeout=10) as begun:
        begun.sendall(head.encode() + b" " * (room_for_bodies // 2 - 1))
        # No other body before all of it is there: this one could be the one that is refused.
        wait_until(lambda: limit._held["greedy"] >= room_for_bodies // 2 - 1)
        refused(greedy.post("/v1/generate", json=body), 429, "tenant_overloaded")
        assert modest.post("/v1/generate", json=body).status_code == 200
        assert greedy.post("/v1/generate", json={"prompt": "short"}).status_code == 200
    wait_until(lambda: greedy.post("/v1/generate", json=body).status_code == 200)
