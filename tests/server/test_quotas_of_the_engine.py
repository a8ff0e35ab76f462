"""Quotas with the real engine: tokens that were computed, and requests in flight."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from adapters_store import AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import Principal, ServingEngine
from sera_serve.engine.request import GenerationRequest
from sera_serve.engine.tasks import ClassificationRunner
from sera_serve.server import build_app
from support.answers import refused
from support.factories import random_adapter
from support.live_server import live_server, wait_until

MOST = 100


@pytest.fixture(scope="module")
def served(base: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServingEngine, str]]:
    store = AdapterStore(tmp_path_factory.mktemp("engine") / "store")
    writer = random_adapter(base, SeraConfig(4, 2, 8, ("q_proj",)), 1)
    sorter = random_adapter(base, SeraConfig(4, 2, 8, ("q_proj",)), 2, labels=["spam", "ham"])
    for tenant in ("whole", "left", "late", "one", "two", "free"):
        store.publish(writer, f"{tenant}/writer")
        store.publish(sorter, f"{tenant}/sorter")
    quotas = {"one": {"requests_in_flight": 1}, "two": {"requests_in_flight": 2}}
    settings = ServeSettings(store=store.root, pool_mib=4, kv_cache_tokens=2048, quotas=quotas)
    engine = ServingEngine(base, store, settings)
    with live_server(build_app(engine, store, settings)) as address:
        yield engine, address


def tokens(client: httpx.Client, tenant: str) -> int:
    return int(client.get(f"/v1/quotas/{tenant}").json()["usage"]["tokens_this_minute"])


def test_a_whole_answer_is_charged_by_its_tokens(served: tuple[ServingEngine, str]) -> None:
    with httpx.Client(base_url=served[1], timeout=30) as client:
        body = {"model": "whole/writer", "prompt": "Once upon a time", "max_tokens": 10, "ignore_eos": True}
        used = client.post("/v1/completions", json=body).json()["usage"]["total_tokens"]
        # Without a limit, the use of the last minute fades slowly.
        assert used - 1 <= tokens(client, "whole") <= used
        client.post("/v1/classify", json={"adapter": "whole/sorter", "inputs": ["abcd", "efgh"]})
        assert tokens(client, "whole") >= used - 1 + 8


def test_a_stream_whose_client_leaves_is_charged_for_what_was_computed(served: tuple[ServingEngine, str]) -> None:
    engine, address = served
    body: dict[str, Any] = {"adapter": "left/writer", "prompt": "a" * 40, "max_new_tokens": MOST, "stream": True}
    with httpx.Client(base_url=address, timeout=30) as client:
        with client.stream("POST", "/v1/generate", json=body | {"ignore_eos": True}) as answer:
            next(answer.iter_lines())
        wait_until(lambda: engine.in_flight("left") == 0)
        wait_until(lambda: tokens(client, "left") > 0)
        assert 40 < tokens(client, "left") < 42 + MOST


@pytest.mark.parametrize("field", ["adapter", "adapters"])
def test_rows_are_charged_whose_answer_was_not_waited_for(
    served: tuple[ServingEngine, str], monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    engine, address = served
    runner = engine.runners["classify"]
    assert isinstance(runner, ClassificationRunner)
    classify, computed = runner._classify, []

    def slowly(rows: list[Any]) -> Any:
        computed.append(sum(len(row.inputs) for row in rows))
        time.sleep(0.1)
        return classify(rows)

    monkeypatch.setattr(runner, "_classify", slowly)
    adapter = {"adapter": "late/sorter", "adapters": ["late/sorter"]}[field]
    with httpx.Client(base_url=address, timeout=30) as client:
        before = tokens(client, "late")
        # Without the time limit, some three seconds.
        body = {field: adapter, "inputs": ["abcdefgh"] * 1024, "timeout_s": 1.0}
        refused(client.post("/v1/classify", json=body), 504, "deadline_exceeded")
        wait_until(lambda: engine.running() == engine.waiting() == 0)
        assert len(computed) > 1 and sum(computed) < 1024 * 8
        # Of a part that was given up while it ran, all rows count. The use of the last minute fades slowly.
        most = sum(computed) + 4 * max(computed)
        assert 0.9 * sum(computed) <= tokens(client, "late") - before <= most


def test_requests_in_flight_are_limited_by_tenant(served: tuple[ServingEngine, str]) -> None:
    with httpx.Client(base_url=served[1], timeout=30) as client:
        body = {"prompt": ["a", "b"], "max_tokens": 4}
        held = GenerationRequest(principal=Principal("two"))
        served[0]._admission.admit(held, lambda tenant: False)
        answer = client.post("/v1/completions", json=body | {"model": "two/writer"})
        error = refused(answer, 429, "quota_exceeded")
        assert "may have 2" in error["message"]
        assert int(answer.headers["retry-after"]) >= 1
        served[0]._admission.release(held)
        for tenant in ("two", "free"):
            assert client.post("/v1/completions", json=body | {"model": f"{tenant}/writer"}).status_code == 200
        # The answers of one request are several in flight. Waiting would not help.
        for field, asked in (("n", {"prompt": "a", "n": 2}), ("prompt", body)):
            answer = client.post("/v1/completions", json=asked | {"model": "one/writer"})
            error = refused(answer, 400, "invalid_request")
            assert error["param"] == field
            assert "retry-after" not in answer.headers
        assert client.post("/v1/completions", json={"model": "one/writer", "prompt": "a"}).status_code == 200
