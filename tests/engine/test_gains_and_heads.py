"""Adapters with gains, offsets and heads of two layers, among others in one batch, against their merged bases."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from adapters_store import Activation, AdapterBundle, AdapterStore
from sera_kernels import ShapeClasses, numba_path
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.engine import ClassifyResult, GenerationResult, ServingEngine
from sera_serve.engine.loop.graphs import least_covering
from support.engine import classify, collect
from support.factories import encoded, greedy, merged, random_adapter, with_hidden_layer, with_vectors

Start = Callable[..., ServingEngine]
ALL = SeraConfig(16, 16, 8.0, "all-linear")
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPTS = ["Once upon a time", "Rain. " * 30, "a"]
TEXTS = ["short", "a longer text, of some words", "the quick brown fox jumps over the lazy dog " * 3]
NEW_TOKENS = 12


def writers(base: FrozenBase) -> dict[str, AdapterBundle]:
    plain = [random_adapter(base, ALL, seed, strength=0.5) for seed in range(5)]
    return {
        "acme/plain": plain[0],
        "acme/gain": with_vectors(plain[1], gain=LLAMA, seed=1),
        "acme/offset": with_vectors(plain[2], offset=("q_proj", "up_proj", "down_proj"), seed=2),
        "acme/both": with_vectors(plain[3], gain=("k_proj", "gate_proj"), offset=LLAMA, seed=3),
        "acme/whole": with_vectors(
            random_adapter(base, SeraConfig(4, 1, 8.0, ("v_proj", "down_proj"), use_mixer=False), 4, strength=0.5),
            gain=LLAMA,
            seed=4,
        ),
    }


@pytest.mark.parametrize("settings", [{}, {"max_resident": 2, "kv_cache_tokens": 512, "max_batch_tokens": 64}])
def test_generators_give_what_their_merged_bases_give(
    settings: dict[str, Any], decoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    bundles = writers(decoder)
    for name, bundle in bundles.items():
        store.publish(bundle, name)
    engine = start_engine(decoder, store, **settings)
    asked = [(name, prompt) for name in [*bundles, None] for prompt in PROMPTS]

    async def together() -> list[GenerationResult]:
        calls = [collect(engine, adapter=name, prompt=prompt, max_new_tokens=NEW_TOKENS) for name, prompt in asked]
        return await asyncio.gather(*calls)

    different = set()
    for (name, prompt), result in zip(asked, asyncio.run(together()), strict=True):
        alone = decoder if name is None else merged(decoder, bundles[name])
        want = greedy(alone, decoder.tokenizer(prompt)["input_ids"], NEW_TOKENS)
        assert result.token_ids == want, (name, prompt)
        different.add(tuple(want))
    assert len(different) > len(asked) * 2 // 3, "the adapters do little: the test would see no mix-up"


def test_batches_of_adapters_without_vectors_do_not_look_for_them(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = writers(decoder)
    labels = random_adapter(decoder, ALL, 9, labels=["no", "yes"])
    for name, bundle in {**bundles, "acme/labels": labels}.items():
        store.publish(bundle, name)
    engine = start_engine(decoder, store)
    calls: list[int] = []
    own = numba_path._apply_vectors
    monkeypatch.setattr(numba_path, "_apply_vectors", lambda *values: calls.append(1) or own(*values))

    async def ask(name: str | None) -> None:
        await collect(engine, adapter=name, prompt="a", max_new_tokens=3)

    # Resident beside the others from now on.
    asyncio.run(ask("acme/both"))
    assert calls
    calls.clear()
    asyncio.run(ask("acme/plain"))
    asyncio.run(ask(None))
    asyncio.run(classify(engine, "acme/labels", TEXTS[:1]))
    assert not calls


def test_a_graph_with_vectors_serves_only_batches_that_have_them() -> None:
    small, both, vectors = ShapeClasses(single=64), ShapeClasses(single=64, whole=16), ShapeClasses(64, 16, 16, True)
    captured = [small, ShapeClasses(), both, vectors]
    assert least_covering(captured, ShapeClasses(single=16)) == small
    assert least_covering(captured, ShapeClasses(whole=16)) == both
    assert least_covering(captured, ShapeClasses(single=16, vectors=True)) == vectors
    # The one with vectors would cover it, at the price of its launches.
    for uncovered in (ShapeClasses(segmented=16), ShapeClasses(whole=64, vectors=True)):
        assert least_covering(captured, uncovered) == uncovered
    assert least_covering(captured, ShapeClasses()) == ShapeClasses()


def sorters(base: FrozenBase) -> dict[str, AdapterBundle]:
    names = LLAMA if base.kind == "decoder" else ("query", "key", "value", "dense")

    def sorter(seed: int, labels: int, **fields: Any) -> AdapterBundle:
        fields["labels"] = [f"label{number}" for number in range(labels)]
        return random_adapter(base, ALL, seed, strength=0.5, max_length=40, **fields)

    heads: list[tuple[Activation, int]] = [("tanh", 64), ("relu", 24), ("gelu", 100)]
    bundles = {
        f"acme/{activation}": with_hidden_layer(sorter(seed, 2 + seed), activation, width, seed)
        for seed, (activation, width) in enumerate(heads)
    }
    return {
        **bundles,
        "acme/plain": sorter(5, 4),
        "acme/gain": with_vectors(sorter(6, 3, pooling="mean"), gain=names, offset=names, seed=6),
        "acme/both": with_hidden_layer(with_vectors(sorter(7, 3, pooling="cls"), gain=names, seed=7), "tanh", 8, 7),
    }


def expected(base: FrozenBase, bundle: AdapterBundle, text: str) -> torch.Tensor:
    ids, mask = encoded(base, [text], 40)
    assert bundle.config.pooling is not None
    states = merged(base, bundle).pooled_states(ids, mask, bundle.config.pooling)
    if bundle.config.head is not None:
        dense = states @ bundle.tensors["head.dense.weight"].T + bundle.tensors["head.dense.bias"]
        states = {
            "tanh": torch.tanh,
            "relu": lambda x: x.clamp(min=0),
            "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
        }[bundle.config.head.activation](dense)
    logits = states @ bundle.tensors["head.weight"].T + bundle.tensors["head.bias"]
    return logits[0].softmax(0)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("max_resident", [64, 2])
def test_classifiers_of_all_heads_in_one_batch(
    kind: str, max_resident: int, request: pytest.FixtureRequest, store: AdapterStore, start_engine: Start
) -> None:
    base: FrozenBase = request.getfixturevalue(kind)
    bundles = sorters(base)
    for name, bundle in bundles.items():
        store.publish(bundle, name)
    engine = start_engine(base, store, max_resident=max_resident)

    async def together() -> list[ClassifyResult]:
        return await asyncio.gather(*(classify(engine, name, TEXTS) for name in bundles))

    for name, result in zip(bundles, asyncio.run(together()), strict=True):
        for text, scores in zip(TEXTS, result.results, strict=True):
            got = torch.tensor(list(scores.probabilities.values()))
            torch.testing.assert_close(got, expected(base, bundles[name], text), rtol=1e-4, atol=1e-5)
