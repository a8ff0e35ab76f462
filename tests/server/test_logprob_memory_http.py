"""Requests whose log-probabilities have no room are told so on each route, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters_store import AdapterStore
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.engine.tenant_memory import _AT_ONCE, LOGPROB_BYTES, TenantMemory
from sera_serve.server.app import build_app
from support.factories import random_decoder
from support.live_server import live_server, wait_until
from support.no_collection import no_collection

ASKED: dict[str, dict[str, Any]] = {
    "/v1/generate": {"prompt": "x", "max_new_tokens": 200, "ignore_eos": True, "logprobs": 20},
    "/v1/completions": {"model": "random-llama", "prompt": "x", "max_tokens": 200, "ignore_eos": True, "logprobs": 20},
}


@pytest.fixture
def engine(tmp_path: Path) -> ServingEngine:
    store = AdapterStore(tmp_path / "store")
    return ServingEngine(random_decoder(), store, ServeSettings(store=store.root, pool_mib=1, kv_cache_tokens=2048))


@pytest.fixture
def client(engine: ServingEngine) -> Iterator[httpx.Client]:
    app = build_app(engine, engine.store, engine.settings)
    with live_server(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.mark.parametrize("blocks", [0, 1], ids=["at once", "while it is generated"])
@pytest.mark.parametrize("route", ASKED)
def test_a_refusal_names_the_field_and_leaves_nothing(
    route: str, blocks: int, client: httpx.Client, engine: ServingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TenantMemory, "tenant_bytes", blocks * _AT_ONCE * LOGPROB_BYTES)
    with no_collection():
        response = client.post(route, json=ASKED[route])
        assert (response.status_code, response.headers["retry-after"]) == (429, "1"), response.text
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("tenant_overloaded", "logprobs")
        wait_until(lambda: not engine._logprob_memory._reservations)
        monkeypatch.undo()
        response = client.post(route, json=ASKED[route])
        assert response.status_code == 200
        wait_until(lambda: not engine._logprob_memory._reservations)
