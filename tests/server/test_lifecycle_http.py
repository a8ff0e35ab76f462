"""Publish, switch, delete, pin and upload again under load: no response comes from wrong weights."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters_store import AdapterBundle, AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import build_app
from support.answers import refused
from support.factories import greedy, merged, random_adapter
from support.live_server import live_server, wait_until
from support.standstill import standstill

PROMPT, NEW_TOKENS, CONTENTS = "Once upon a time", 12, 5
Answer = dict[str, Any]


@pytest.fixture(scope="module")
def contents(base: FrozenBase) -> list[AdapterBundle]:
    shapes = [SeraConfig(8, 4, 16, "all-linear"), SeraConfig(16, 16, 16, ("q_proj", "v_proj", "down_proj"))]
    return [random_adapter(base, shapes[seed % 2], seed) for seed in range(CONTENTS)]


@pytest.fixture
def engine(base: FrozenBase, tmp_path: Path) -> ServingEngine:  # type: ignore[override]
    store = AdapterStore(tmp_path / "store")
    # A small pool, so that adapters are evicted and loaded again throughout the test.
    return ServingEngine(base, store, ServeSettings(store=store.root, pool_mib=1, max_resident=3, kv_cache_tokens=4096))


@pytest.fixture
def url(engine: ServingEngine) -> Iterator[str]:  # type: ignore[override]
    with live_server(build_app(engine, engine.store, engine.settings)) as address:
        yield address
        wait_until(lambda: engine.in_flight() == 0 and engine.residency.leases() == 0)
        engine.residency.check_invariants()


def upload(client: httpx.Client, name: str, bundle: AdapterBundle) -> int:
    answer = client.post("/v1/adapters", files={"bundle": ("a.safetensors", bundle.to_bytes())}, data={"name": name})
    answer.raise_for_status()
    return int(answer.json()["version"])


def expected(base: FrozenBase, bundle: AdapterBundle, new_tokens: int = NEW_TOKENS) -> list[int]:
    return greedy(merged(base, bundle), base.tokenizer(PROMPT)["input_ids"], new_tokens)


def test_every_response_comes_from_the_version_that_it_names(
    url: str, client: httpx.Client, engine: ServingEngine, base: FrozenBase, contents: list[AdapterBundle]
) -> None:
    right = {bundle.digest: expected(base, bundle) for bundle in contents}
    assert len({tuple(tokens) for tokens in right.values()}) == CONTENTS
    # The digest of each version of each adapter. A version number is never used twice.
    held: dict[tuple[str, int], str] = {}
    over = threading.Event()
    seen: list[Answer] = []
    refusals: list[httpx.Response] = []

    def publish(name: str, bundle: AdapterBundle) -> None:
        held[name, upload(client, name, bundle)] = bundle.digest

    def ask(number: int) -> None:
        references = ["t/one", "t/one@stable", "u/two", "u/two", "v/three"]
        with httpx.Client(base_url=url, timeout=30) as own:
            for turn in range(100_000):
                if over.is_set():
                    return
                body = {"adapter": references[(turn + number) % 5], "prompt": PROMPT, "max_new_tokens": NEW_TOKENS}
                response = own.post("/v1/generate", json=body)
                (seen if response.status_code == 200 else refusals).append(
                    response.json() if response.status_code == 200 else response
                )

    def answered(more: int) -> None:
        goal = len(seen) + more
        wait_until(lambda: len(seen) >= goal, 30)

    publish("t/one", contents[0])
    publish("u/two", contents[1])
    publish("v/three", contents[4])
    engine.store.set_alias("t/one", "stable", "t/one@v1")
    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask, number) for number in range(6)]
        try:
            for change in range(4):
                answered(8)
                publish("t/one", contents[(change + 1) % CONTENTS])
                answered(4)
                latest = engine.store.resolve("t/one").version
                client.delete(f"/v1/adapters/t/one@v{latest - 1}/pin").raise_for_status()
                client.put("/v1/adapters/t/one/pin").raise_for_status()
                engine.store.set_alias("t/one", "stable", f"t/one@v{latest}")
                if change:
                    client.delete(f"/v1/adapters/t/one@v{latest - 1}").raise_for_status()
                answered(4)
                client.delete("/v1/adapters/u/two").raise_for_status()
                publish("u/two", contents[(change + 2) % CONTENTS])
        finally:
            over.set()
        for one in asking:
            one.result(30)
    for answer in seen:
        assert answer["token_ids"] == right[held[answer["adapter"], answer["version"]]], answer
    assert len({(answer["adapter"], answer["version"]) for answer in seen}) >= 6
    for response in refusals:
        refused(response, 404, "adapter_not_found")
    assert len(refusals) < len(seen)


def test_a_running_request_keeps_its_version_and_the_memory_is_freed_after_it(
    client: httpx.Client, engine: ServingEngine, base: FrozenBase, contents: list[AdapterBundle]
) -> None:
    old, new = contents[:2]
    upload(client, "t/one", old)
    client.put("/v1/adapters/t/one/pin").raise_for_status()
    assert engine.residency.pinned_digests() == [old.digest]
    body = {"adapter": "t/one", "prompt": PROMPT, "max_new_tokens": 200, "stream": True}
    with client.stream("POST", "/v1/generate", json=body) as stream:
        lines = (line for line in stream.iter_lines() if line)
        first = json.loads(next(lines).removeprefix("data: "))
        with standstill():
            # The request has sent a part of its response, and makes no progress until this block ends.
            assert upload(client, "t/one", new) == 2
            client.delete("/v1/adapters/t/one@v1").raise_for_status()
            client.delete("/v1/adapters/t/one").raise_for_status()
            refused(client.post("/v1/generate", json=body | {"stream": False}), 404, "adapter_not_found")
            refused(client.post("/v1/generate", json=body), 404, "adapter_not_found")
            assert engine.residency.resident_digests() == [old.digest]
            assert engine.residency.leases() == 1 and engine.residency.pinned_digests() == []
            assert engine.residency.host_cache.used == 0
        tokens, version = first["token_ids"], first["version"]
        for line in lines:
            if line != "data: [DONE]":
                tokens += json.loads(line.removeprefix("data: "))["token_ids"]
    assert version == 1
    assert tokens == expected(base, old, 200)
    wait_until(lambda: engine.residency.leases() == 0)
    assert engine.residency.resident_digests() == []
    stats = engine.residency.stats()
    assert (stats.device_bytes, stats.host_bytes, len(engine.residency.host_cache)) == (0, 0, 0)


def test_an_adapter_uploaded_again_after_a_delete_is_served(
    client: httpx.Client, engine: ServingEngine, base: FrozenBase, contents: list[AdapterBundle]
) -> None:
    body = {"adapter": "t/one", "prompt": PROMPT, "max_new_tokens": NEW_TOKENS}
    for version in (1, 2, 3):
        assert upload(client, "t/one", contents[2]) == version
        answer = client.post("/v1/generate", json=body).json()
        assert (answer["version"], answer["token_ids"]) == (version, expected(base, contents[2]))
        client.delete("/v1/adapters/t/one").raise_for_status()
        refused(client.post("/v1/generate", json=body), 404, "adapter_not_found")
        wait_until(lambda: engine.residency.leases() == 0)
        assert engine.residency.stats().device_bytes == 0


def test_a_pinned_adapter_is_not_evicted_by_other_adapters(
    client: httpx.Client, engine: ServingEngine, contents: list[AdapterBundle]
) -> None:
    for number, bundle in enumerate(contents):
        upload(client, f"t/n{number}", bundle)
    client.put("/v1/adapters/t/n0/pin").raise_for_status()
    refusal = client.put("/v1/adapters/t/n1/pin")
    refused(refusal, 409, "cannot_pin")
    for number in (1, 2, 3, 4):
        body = {"adapter": f"t/n{number}", "prompt": PROMPT, "max_new_tokens": 2}
        client.post("/v1/generate", json=body).raise_for_status()
    assert contents[0].digest in engine.residency.resident_digests()
    client.delete("/v1/adapters/t/n0/pin").raise_for_status()
    for number in (1, 2, 3, 4):
        body = {"adapter": f"t/n{number}", "prompt": PROMPT, "max_new_tokens": 2}
        client.post("/v1/generate", json=body).raise_for_status()
    assert contents[0].digest not in engine.residency.resident_digests()
