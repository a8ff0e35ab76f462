"""The whole server with the real engine on real sockets: responses equal the results of the base model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from adapters_store import AdapterBundle, AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase, load_base
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import build_app
from support.answers import events, refused
from support.factories import encoded, greedy, merged, random_adapter
from support.live_server import live_server, wait_until

PROMPT = "Once upon a time, there was a little"
WRITERS = 4


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> FrozenBase:
    return load_base(str(shared_data / "weights" / "stories260K"))


@pytest.fixture(scope="module")
def writers(stories: FrozenBase) -> dict[str, AdapterBundle]:
    config = SeraConfig(4, 2, 8, ("q_proj", "v_proj", "down_proj"))
    return {f"tale/w{seed}": random_adapter(stories, config, seed, strength=0.3) for seed in range(WRITERS)}


@pytest.fixture(scope="module")
def labeler(stories: FrozenBase) -> AdapterBundle:
    return random_adapter(stories, SeraConfig(4, 2, 8, ("q_proj",)), 9, labels=["good", "bad", "dull"])


@pytest.fixture(scope="module")
def real_engine(
    stories: FrozenBase,
    writers: dict[str, AdapterBundle],
    labeler: AdapterBundle,
    tmp_path_factory: pytest.TempPathFactory,
) -> ServingEngine:
    store = AdapterStore(tmp_path_factory.mktemp("whole") / "store")
    for name, bundle in writers.items():
        store.publish(bundle, name)
    store.publish(labeler, "tale/labels")
    settings = ServeSettings(store=store.root, pool_mib=4, kv_cache_tokens=8192)
    return ServingEngine(stories, store, settings)


@pytest.fixture(scope="module")
def whole(real_engine: ServingEngine) -> Iterator[httpx.Client]:
    app = build_app(real_engine, real_engine.store, real_engine.settings)
    with live_server(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(autouse=True)
def _nothing_left(real_engine: ServingEngine) -> Iterator[None]:
    yield
    wait_until(lambda: real_engine.in_flight() == 0 and real_engine.residency.leases() == 0)
    real_engine.residency.check_invariants()


def ask(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/generate", json={"prompt": PROMPT, "max_new_tokens": 24} | body)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


def test_concurrent_requests_get_the_results_of_their_merged_base(
    whole: httpx.Client, stories: FrozenBase, writers: dict[str, AdapterBundle]
) -> None:
    adapters = [*writers, None] * 2
    with ThreadPoolExecutor(len(adapters)) as pool:
        answers = list(pool.map(lambda adapter: ask(whole, adapter=adapter), adapters))
    tokens = stories.tokenizer(PROMPT)["input_ids"]
    expected = {name: greedy(merged(stories, bundle), tokens, 24) for name, bundle in writers.items()}
    expected_base = greedy(stories, tokens, 24)
    for adapter, answer in zip(adapters, answers, strict=True):
        assert answer["token_ids"] == (expected[adapter] if adapter else expected_base)
        assert answer["adapter"] == adapter
        assert answer["version"] == (1 if adapter else None)
    assert len({json.dumps(answer["token_ids"]) for answer in answers}) > 2


def test_a_stream_adds_up_to_the_whole_response(whole: httpx.Client) -> None:
    body = {"adapter": "tale/w1", "prompt": PROMPT, "max_new_tokens": 24}
    plain = whole.post("/v1/generate", json=body).json()
    *parts, done = events(whole.post("/v1/generate", json=body | {"stream": True}).text)
    assert done == "[DONE]"
    assert "".join(part["text"] for part in parts) == plain["text"]
    assert [token for part in parts for token in part["token_ids"]] == plain["token_ids"]
    assert parts[-1]["usage"] == plain["usage"]
    assert parts[-1]["finish_reason"] == plain["finish_reason"]


def test_token_ids_are_not_changed(whole: httpx.Client, stories: FrozenBase) -> None:
    body = {"token_ids": stories.tokenizer(PROMPT)["input_ids"], "max_new_tokens": 24}
    assert whole.post("/v1/generate", json=body).json()["token_ids"] == ask(whole)["token_ids"]


def test_a_seed_repeats_a_sample_and_a_stop_string_ends_it(whole: httpx.Client) -> None:
    samples = [ask(whole, temperature=1.0, top_p=0.9, top_k=50, seed=seed)["text"] for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]
    stop = samples[0][10:14]
    stopped = ask(whole, temperature=1.0, top_p=0.9, top_k=50, seed=1, stop=[stop])
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == samples[0][: samples[0].index(stop)]


def test_classification_equals_head_on_pooled_states(
    whole: httpx.Client, stories: FrozenBase, labeler: AdapterBundle
) -> None:
    texts = ["A dog ran.", "The cat was very sad and did not want to play.", "So it was."]
    answer = whole.post("/v1/classify", json={"adapter": "tale/labels", "inputs": texts}).json()
    base = merged(stories, labeler)
    with torch.inference_mode():
        states = base.pooled_states(*encoded(base, texts, 64), "last_token")
        logits = states @ labeler.tensors["head.weight"].T + labeler.tensors["head.bias"]
    for row, expected in zip(answer["results"], logits.softmax(1).tolist(), strict=True):
        assert list(row["probabilities"]) == ["good", "bad", "dull"]
        assert list(row["probabilities"].values()) == pytest.approx(expected, abs=1e-4)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].__getitem__)


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/generate", {"adapter": "tale/none", "prompt": "a"}, 404, "adapter_not_found"),
        ("/v1/generate", {"adapter": "tale/../w1", "prompt": "a"}, 422, "invalid_adapter_name"),
        ("/v1/generate", {"adapter": "tale/w1@v7", "prompt": "a"}, 404, "adapter_not_found"),
        ("/v1/generate", {"adapter": "tale/labels", "prompt": "a"}, 422, "unsupported_task"),
        ("/v1/classify", {"adapter": "tale/w1", "inputs": ["a"]}, 422, "unsupported_task"),
        ("/v1/generate", {"prompt": "a " * 5000}, 422, "context_length_exceeded"),
        ("/v1/generate", {"prompt": "a", "max_new_tokens": 100_000}, 422, "context_length_exceeded"),
        ("/v1/generate", {"token_ids": [999_999]}, 422, "invalid_request"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(whole: httpx.Client, path: str, body: dict[str, Any], status: int, code: str, stream: bool) -> None:
    streamed = body | {"stream": True} if stream and path == "/v1/generate" else body
    refused(whole.post(path, json=streamed), status, code)


def test_an_uploaded_adapter_serves_at_once_and_a_deleted_adapter_is_not_found(
    whole: httpx.Client, writers: dict[str, AdapterBundle]
) -> None:
    body = {"bundle": ("a.safetensors", writers["tale/w2"].to_bytes())}
    assert whole.post("/v1/adapters", files=body, data={"name": "new/one"}).status_code == 201
    assert ask(whole, adapter="new/one")["token_ids"] == ask(whole, adapter="tale/w2")["token_ids"]
    assert whole.delete("/v1/adapters/new/one").status_code == 200
    refused(whole.post("/v1/generate", json={"adapter": "new/one", "prompt": "a"}), 404, "adapter_not_found")


def test_the_memory_of_a_deleted_adapter_is_freed(
    whole: httpx.Client, real_engine: ServingEngine, stories: FrozenBase
) -> None:
    bundle = random_adapter(stories, SeraConfig(4, 4, 4, ("q_proj",)), 77)
    body = {"bundle": ("a.safetensors", bundle.to_bytes())}
    for name in ("new/two", "new/same"):
        assert whole.post("/v1/adapters", files=body, data={"name": name}).status_code == 201
    ask(whole, adapter="new/two")
    wait_until(lambda: real_engine.residency.leases() == 0)
    assert bundle.digest in real_engine.residency.resident_digests()
    used = real_engine.residency.pool.used, real_engine.residency.host_cache.used
    whole.delete("/v1/adapters/new/two").raise_for_status()
    assert bundle.digest in real_engine.residency.resident_digests(), "another adapter has the same content"
    whole.delete("/v1/adapters/new/same").raise_for_status()
    assert bundle.digest not in real_engine.residency.resident_digests()
    assert real_engine.residency.pool.used < used[0]
    assert real_engine.residency.host_cache.used < used[1]


def test_a_disconnect_releases_slots_and_leases(whole: httpx.Client, real_engine: ServingEngine) -> None:
    for adapter in ("tale/w0", "tale/w1", None):
        body = {"adapter": adapter, "prompt": PROMPT, "max_new_tokens": 400, "stream": True}
        with whole.stream("POST", "/v1/generate", json=body) as response:
            assert next(response.iter_lines()).startswith("data: {")
    wait_until(lambda: real_engine.in_flight() == 0 and real_engine.residency.leases() == 0)
    assert ask(whole)["usage"]["completion_tokens"] > 0
