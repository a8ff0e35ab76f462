"""Vectors of the base and of adapters of both tasks, in one batch with classifications, are those of merged weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from adapters_store import AdapterBundle, AdapterStore
from adapters_store.errors import AdapterNotFound
from sera_serve.base import FrozenBase, Pooling
from sera_serve.engine import BASE_PRINCIPAL, EmbedResult, ServingEngine
from sera_serve.errors import AdapterOverflow, InvalidRequest, PromptTooLong
from support.engine import SHAPE, acting_for, classify
from support.factories import encoded, merged, random_adapter

Start = Callable[..., ServingEngine]
TEXTS = ["short", "a longer text, of some words", "x"]
WRITER, LABELS = "acme/writer", "acme/labels"


def published(base: FrozenBase, store: AdapterStore) -> dict[str, AdapterBundle]:
    bundles = {
        WRITER: random_adapter(base, SHAPE, 1, strength=0.5),
        LABELS: random_adapter(base, SHAPE, 2, labels=["no", "yes"], strength=0.5, pooling="mean"),
    }
    for name, bundle in bundles.items():
        store.publish(bundle, name)
    return bundles


def expected(base: FrozenBase, text: str, pooling: Pooling) -> torch.Tensor:
    return base.pooled_states(*encoded(base, [text], 256), pooling)[0].detach()


async def embed(engine: ServingEngine, adapter: str | None, inputs: list[str], **options: object) -> EmbedResult:
    return await engine.embed(adapter, inputs, acting_for(adapter), **options)  # type: ignore[arg-type]


def close(got: NDArray[np.float32], want: torch.Tensor) -> None:
    assert got.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_vectors_are_those_of_merged_weights_in_a_mixed_batch(
    kind: str, request: pytest.FixtureRequest, store: AdapterStore, start_engine: Start
) -> None:
    base: FrozenBase = request.getfixturevalue(kind)
    bundles = published(base, store)
    engine = start_engine(base, store)
    names: list[str | None] = [WRITER, LABELS, None]

    async def together() -> None:
        results = await asyncio.gather(
            *(embed(engine, name, TEXTS, normalize=False) for name in names),
            *(embed(engine, name, TEXTS, pooling="cls") for name in names),
            classify(engine, LABELS, TEXTS),
        )
        for name, plain, first in zip(names, results[:3], results[3:6], strict=True):
            assert isinstance(plain, EmbedResult) and isinstance(first, EmbedResult)
            assert (plain.adapter, plain.version) == (name, name and 1)
            assert plain.prompt_tokens == [len(base.preprocessor.prompt(text, None)) for text in TEXTS]
            used = base if name is None else merged(base, bundles[name])
            # The classifier's own pooling is the mean.
            pooling: Pooling = "mean" if name == LABELS else base.default_pooling
            for text, vector, unit in zip(TEXTS, plain.vectors, first.vectors, strict=True):
                close(vector, expected(used, text, pooling))
                close(unit, torch.nn.functional.normalize(expected(used, text, "cls"), dim=0))

    asyncio.run(together())


def test_token_lists_are_taken_as_they_are(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    engine = start_engine(decoder, store)
    tokens = decoder.preprocessor.prompt(TEXTS[1], None)
    by_tokens = asyncio.run(engine.embed(None, [tokens], BASE_PRINCIPAL))
    by_text = asyncio.run(engine.embed(None, [TEXTS[1]], BASE_PRINCIPAL))
    np.testing.assert_allclose(by_tokens.vectors[0], by_text.vectors[0], rtol=1e-6)
    assert by_tokens.prompt_tokens == [len(tokens)]


def test_refusals_name_the_input(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    engine = start_engine(decoder, store)
    cases: list[tuple[list[str] | list[list[int]], type[Exception], str]] = [
        (["x", "y" * 257], PromptTooLong, "input[1]"),
        (["x", "y" * 100_000], PromptTooLong, "input[1]"),
        ([[1], [2] * 257], PromptTooLong, "input[1]"),
        ([[1], [259]], InvalidRequest, "input[1]"),
        ([[1], []], InvalidRequest, "input[1]"),
        (["x", ""], InvalidRequest, "input[1]"),
        (["x"] * 40_000, InvalidRequest, "input"),
    ]
    for inputs, error, param in cases:
        with pytest.raises(error) as refusal:
            asyncio.run(engine.embed(None, inputs, BASE_PRINCIPAL))
        assert refusal.value.param == param  # type: ignore[attr-defined]
    # The whole context is no error.
    (vector,) = asyncio.run(engine.embed(None, ["y" * 256], BASE_PRINCIPAL)).vectors
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    with pytest.raises(AdapterNotFound):
        asyncio.run(embed(engine, "acme/none", ["x"]))


@pytest.mark.parametrize("labels", [None, ["no", "yes"]])
def test_an_overflow_is_a_typed_error_and_ends_alone(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start, labels: list[str] | None
) -> None:
    published(decoder, store)
    bad = random_adapter(decoder, SHAPE, 3, labels=labels, strength=1e22)
    store.publish(bad, "acme/bad")
    engine = start_engine(decoder, store)

    async def together() -> None:
        good, overflowed = await asyncio.gather(
            embed(engine, WRITER, TEXTS), embed(engine, "acme/bad", TEXTS), return_exceptions=True
        )
        assert isinstance(overflowed, AdapterOverflow)
        assert isinstance(good, EmbedResult)

    asyncio.run(together())
