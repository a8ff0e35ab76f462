"""Many adapters in one batch give, token for token, what each gives alone and what its merged base gives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from adapters_store import AdapterBundle, AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase, load_base
from sera_serve.engine import GenerationResult, ServingEngine
from support.engine import collect
from support.factories import greedy, merged, random_adapter

# Sixteen shapes that differ in rank, split, mixer and targets; every split divides 64, 128 and 32.
SHAPES = [
    SeraConfig(rank, split, 8.0, targets, use_mixer=mixer)  # type: ignore[arg-type]
    for rank, split, targets, mixer in [
        (16, 16, "all-linear", True),
        (16, 16, "all-linear", False),
        (32, 32, "all-linear", True),
        (4, 1, "all-linear", False),
        (8, 1, "all-linear", True),
        (8, 4, ("q_proj", "v_proj"), True),
        (8, 2, ("q_proj", "k_proj", "v_proj", "o_proj"), False),
        (2, 2, ("down_proj",), True),
        (1, 1, ("gate_proj", "up_proj"), False),
        (64, 32, "all-linear", True),
        (4, 4, ("layers.1.self_attn.q_proj",), True),
        (16, 4, "all-linear", True),
        (6, 2, "all-linear", True),
        (12, 4, ("o_proj", "down_proj"), True),
        (32, 2, ("v_proj",), False),
        (24, 8, "all-linear", True),
    ]
]
PROMPTS = [
    "Once upon a time",
    "The quick brown fox jumps over the lazy dog, and then " * 3,
    "a",
    "Rain. " * 9,
]
NEW_TOKENS = 16


async def generate(engine: ServingEngine, adapter: str | None, prompt: str) -> GenerationResult:
    return await collect(engine, adapter=adapter, prompt=prompt, max_new_tokens=NEW_TOKENS)


def publish_all(base: FrozenBase, store: AdapterStore, shapes: list[SeraConfig]) -> dict[str, AdapterBundle]:
    bundles = {f"acme/a{i}": random_adapter(base, shape, seed=i) for i, shape in enumerate(shapes)}
    for name, bundle in bundles.items():
        store.publish(bundle, name)
    return bundles


def requests_over(names: list[str]) -> list[tuple[str | None, str]]:
    """32 requests: two for each adapter, and one in nine for the base model."""
    adapters: list[str | None] = [*names, *names]
    for position in range(0, 32, 9):
        adapters[position] = None
    return [(adapter, PROMPTS[i % len(PROMPTS)] + str(i % 5)) for i, adapter in enumerate(adapters)]


def expected(base: FrozenBase, bundles: dict[str, AdapterBundle], adapter: str | None, prompt: str) -> list[int]:
    model = base if adapter is None else merged(base, bundles[adapter])
    return greedy(model, base.tokenizer(prompt)["input_ids"], NEW_TOKENS)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="all fit"),
        # Prompts of up to 163 tokens, 24 tokens a pass: every prefill is chunked, beside decoding.
        pytest.param({"max_batch_tokens": 24}, id="chunked prefill", marks=pytest.mark.slow),
        # Three slots for sixteen adapters: they are evicted and loaded again throughout.
        pytest.param({"max_resident": 3, "host_cache_mib": 0}, id="evicted", marks=pytest.mark.slow),
        pytest.param({"max_resident": 3, "max_batch_tokens": 24}, id="evicted and chunked"),
        # Less cache than the requests need together: they enter as pages come free.
        pytest.param({"kv_cache_tokens": 512}, id="cache full"),
    ],
)
def test_mixed_batch_is_each_alone_and_merged(
    decoder: FrozenBase,
    store: AdapterStore,
    start_engine: Callable[..., ServingEngine],
    settings: dict[str, int],
) -> None:
    bundles = publish_all(decoder, store, SHAPES)
    engine = start_engine(decoder, store, **settings)
    requests = requests_over(list(bundles))

    async def together() -> list[GenerationResult]:
        return await asyncio.gather(*(generate(engine, *request) for request in requests))

    results = asyncio.run(together())
    texts = set()
    for (adapter, prompt), result in zip(requests, results, strict=True):
        assert result.adapter == adapter
        assert result.token_ids == expected(decoder, bundles, adapter, prompt), (adapter, prompt)
        texts.add(tuple(result.token_ids))
    assert len(texts) > 24, "the adapters hardly change the output: the test would not see a mix-up"

    async def alone() -> list[GenerationResult]:
        return [await generate(engine, *request) for request in requests]

    assert [r.token_ids for r in asyncio.run(alone())] == [r.token_ids for r in results]


def test_mixed_batch_on_real_weights(
    shared_data,
    store: AdapterStore,
    start_engine: Callable[..., ServingEngine],  # type: ignore[no-untyped-def]
) -> None:
    base = load_base(str(shared_data / "weights" / "stories260K"))
    shapes = [
        SeraConfig(4, 4, 4.0, "all-linear"),
        SeraConfig(8, 2, 4.0, ("q_proj", "v_proj")),
        SeraConfig(2, 1, 4.0, "all-linear", use_mixer=False),
    ]
    bundles = {f"acme/a{i}": random_adapter(base, shapes[i % 3], seed=i, strength=0.4) for i in range(8)}
    for name, bundle in bundles.items():
        store.publish(bundle, name)
    engine = start_engine(base, store, max_batch_tokens=16)
    requests: list[tuple[str | None, str]] = [
        (name, f"Once upon a time, there was a {thing}")
        for name in [*bundles, None]
        for thing in ("dog", "small red boat")
    ]

    async def together() -> list[GenerationResult]:
        return await asyncio.gather(*(generate(engine, *request) for request in requests))

    for (adapter, prompt), result in zip(requests, asyncio.run(together()), strict=True):
        assert result.token_ids == expected(base, bundles, adapter, prompt), (adapter, prompt)
