"""The official client's embeddings on a real server, and what the route refuses."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from adapters_store import AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import BASE_PRINCIPAL, GenerateParams, Principal, ServingEngine, WeightedAdapter
from sera_serve.loop_turns import LoopTurns
from sera_serve.server import build_app
from sera_serve.server.long_answers import written
from sera_serve.server.openai.embeddings import _pieces
from support.answers import events, refused
from support.factories import random_adapter
from support.live_server import live_server, wait_until
from support.loop_lag import watched_loop

TEXTS = ["short", "a longer text, of some words", "☠"]
MODELS = ["random-llama", "acme/writer", "acme/labels"]


@pytest.fixture(scope="module")
def real_engine(base: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> ServingEngine:
    store = AdapterStore(tmp_path_factory.mktemp("embeddings") / "store")
    shape = SeraConfig(8, 4, 8.0, ("q_proj", "v_proj"))
    store.publish(random_adapter(base, shape, 1, strength=0.5), "acme/writer")
    store.publish(random_adapter(base, shape, 4, strength=0.5), "acme/other")
    store.publish(random_adapter(base, shape, 2, labels=["no", "yes"], pooling="mean"), "acme/labels")
    store.publish(random_adapter(base, shape, 3, strength=1e22), "acme/bad")
    return ServingEngine(base, store, ServeSettings(store=store.root, pool_mib=4, kv_cache_tokens=1024))


@pytest.fixture(scope="module")
def address(real_engine: ServingEngine) -> Iterator[str]:
    with live_server(build_app(real_engine, real_engine.store, real_engine.settings)) as url:
        yield url


@pytest.fixture(autouse=True)
def _nothing_left(real_engine: ServingEngine) -> Iterator[None]:
    yield
    wait_until(lambda: real_engine.in_flight() == 0 and real_engine.residency.leases() == 0)


@pytest.fixture(scope="module")
def official(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def vectors_of(engine: ServingEngine, model: str, inputs: list[str], **options: Any) -> np.ndarray[Any, Any]:
    adapter = None if model == MODELS[0] else model
    principal = BASE_PRINCIPAL if adapter is None else Principal("acme")
    return np.stack(asyncio.run(engine.embed(adapter, inputs, principal, **options)).vectors)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("encoding", ["float", "base64", openai.omit])
def test_the_client_gets_the_engines_vectors(
    official: openai.OpenAI, real_engine: ServingEngine, model: str, encoding: Any
) -> None:
    # The client asks for base64 by itself, and decodes it.
    answer = official.embeddings.create(model=model, input=TEXTS, encoding_format=encoding)
    assert (answer.object, answer.model) == ("list", model)
    assert [row.index for row in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(text.encode()) for text in TEXTS)
    rows = [row.embedding for row in answer.data]
    got = np.array([np.frombuffer(base64.b64decode(row), "<f4") if isinstance(row, str) else row for row in rows])
    np.testing.assert_allclose(got, vectors_of(real_engine, model, TEXTS), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)


def test_one_text_and_token_lists_are_inputs_too(official: openai.OpenAI, real_engine: ServingEngine) -> None:
    want = vectors_of(real_engine, MODELS[0], TEXTS[:1])[0]
    tokens = real_engine.base.preprocessor.prompt(TEXTS[0], None)
    for value in (TEXTS[0], tokens, [tokens], [tokens, tokens]):
        answer = official.embeddings.create(model=MODELS[0], input=value)  # type: ignore[arg-type]
        for row in answer.data:
            np.testing.assert_allclose(row.embedding, want, atol=1e-6)


def test_the_async_client_and_the_own_options(address: str, real_engine: ServingEngine) -> None:
    async def ask() -> list[float]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            options = {"pooling": "cls", "normalize": False, "priority": "high", "timeout_s": 20}
            answer = await client.embeddings.create(
                model="acme/writer", input="short", user="someone", dimensions=64, extra_body=options
            )
            return answer.data[0].embedding

    want = vectors_of(real_engine, "acme/writer", ["short"], pooling="cls", normalize=False)[0]
    np.testing.assert_allclose(asyncio.run(ask()), want, atol=1e-5)


def test_errors_are_the_official_clients(official: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="acme/none"):
        official.embeddings.create(model="acme/none", input="x")
    with pytest.raises(openai.BadRequestError, match="shorten the input") as refusal:
        official.embeddings.create(model=MODELS[0], input=["x", "y" * 300])
    assert (refusal.value.code, refusal.value.param) == ("context_length_exceeded", "input[1]")
    # As LangChain's client sends texts: the tokens of another tokenizer.
    with pytest.raises(openai.BadRequestError, match=r"the token ids of input\[1\] must lie in 0 to ") as refusal:
        official.embeddings.create(model=MODELS[0], input=[[1, 2], [3, 15339]])
    assert refusal.value.param == "input[1]" and "send texts (LangChain" in refusal.value.message
    with pytest.raises(openai.BadRequestError, match="leave dimensions out") as refusal:
        official.embeddings.create(model=MODELS[0], input="x", dimensions=32)
    assert refusal.value.param == "dimensions"
    with pytest.raises(openai.BadRequestError, match="overflows") as refusal:
        official.embeddings.create(model="acme/bad", input="x")
    assert refusal.value.code == "adapter_overflow"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": None}, "input"),
        ({"input": {"text": "x"}}, "input"),
        ({"input": [""]}, "input[0]"),
        ({"input": [{"text": "x"}]}, "input[0]"),
        ({"input": [[]]}, "input[0]"),
        ({"input": [[-1]]}, "input[0]"),
        ({"input": ["x", ""]}, "input[1]"),
        ({"input": ["x", [1]]}, "input[1]"),
        ({"input": [[1], "x"]}, "input[1]"),
        ({"input": [[1], []]}, "input[1]"),
        ({"input": [1, "x"]}, "input"),
        ({"input": [True]}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": [[1], [-1]]}, "input[1]"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": [1] * 150_001}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"pooling": "max"}, "pooling"),
        ({"normalize": 1}, "normalize"),
        ({"dimensions": 0}, "dimensions"),
        ({"truncate": True}, "truncate"),
        ({"model": ""}, "model"),
    ],
)
def test_a_wrong_field_is_named(address: str, changes: dict[str, Any], param: str) -> None:
    body = {"model": MODELS[0], "input": "x"} | changes
    response = httpx.post(f"{address}/v1/embeddings", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_many_inputs_come_in_order(address: str) -> None:
    texts = [str(index) for index in range(300)]
    answer = httpx.post(f"{address}/v1/embeddings", json={"model": MODELS[0], "input": texts}, timeout=60).json()
    assert [row["index"] for row in answer["data"]] == list(range(300))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, texts))


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_a_large_answer_leaves_turns_to_others(encoding: Any) -> None:
    vectors = list(np.random.default_rng(0).standard_normal((256, 4096)).astype(np.float32))

    async def write() -> float:
        async with watched_loop() as lag:
            await written(_pieces("{}", vectors, encoding, "{}"), LoopTurns(), "acme")
        return lag.seconds

    assert asyncio.run(write()) < 0.1


@pytest.mark.parametrize("stream", [False, True])
def test_generate_takes_a_weighted_sum(address: str, real_engine: ServingEngine, stream: bool) -> None:
    parts = [WeightedAdapter("acme/writer", 0.5), WeightedAdapter("acme/other", -0.25)]

    async def tokens() -> list[int]:
        params = GenerateParams(adapter=parts, prompt="hello", max_new_tokens=8)
        return (await (await real_engine.generate(params, Principal("acme"))).collect()).token_ids

    body = {"adapter": [vars(part) for part in parts], "prompt": "hello", "max_new_tokens": 8, "stream": stream}
    response = httpx.post(f"{address}/v1/generate", json=body, timeout=30)
    assert response.status_code == 200
    answers = events(response.text)[:-1] if stream else [response.json()]
    assert [token for answer in answers for token in answer["token_ids"]] == asyncio.run(tokens())
    assert {(answer["adapter"], answer["version"]) for answer in answers} == {
        ("0.5*acme/writer@v1 + -0.25*acme/other@v1", None)
    }


def test_native_errors_keep_their_shape(address: str) -> None:
    refused(
        httpx.post(f"{address}/v1/classify", json={"adapters": ["acme/writer"], "inputs": ["x"]}),
        422,
        "unsupported_task",
    )
