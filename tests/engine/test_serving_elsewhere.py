"""Serving on a device that is not the CPU: each tensor is where the others are, and the results are the CPU's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_head_tasks import TEXTS, publish

from adapters_store import AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase, ImageInput
from sera_serve.engine import ClassifyResult, EmbedResult, GenerationResult, LabelScores, LabelSet, Score, ServingEngine
from sera_serve.engine.constraint import ConstraintSpec
from support.engine import SHAPE, acting_for, classify, collect, settled
from support.factories import random_adapter, random_decoder, random_encoder, with_hidden_layer, with_vectors
from support.places import PLACES, PLACES_AND_GRAPHS, Place
from support.vision import image_classifier, image_file, random_clip, random_vit, retriever

Start = Callable[..., ServingEngine]
IMAGES = [ImageInput(image_file(seed), f"inputs[{seed}].image") for seed in range(3)]
LOW_RANK = SeraConfig(4, 1, 8.0, ("q_proj", "v_proj"), use_mixer=False)


def on_both(
    place: Place,
    base: FrozenBase,
    store: AdapterStore,
    start_engine: Start,
    calls: Callable[[ServingEngine], list[Any]],
) -> list[list[Any]]:
    """The results of the calls, all at once, on the CPU and elsewhere. Few adapters fit, so some are evicted."""

    async def together(engine: ServingEngine) -> list[Any]:
        return await asyncio.gather(*calls(engine))

    found = [asyncio.run(together(start_engine(base, store, max_resident=3)))]
    with place.serving():
        engine = start_engine(place.moved(base), store, max_resident=3, device=place.device, **place.engine_settings)
        held = [*engine.base.model.parameters(), *engine.base.model.buffers(), engine.residency.pool.data]
        assert all(place.has(tensor) for tensor in held)
        found.append(asyncio.run(together(engine)))
        # Within the block: the checks read the device.
        asyncio.run(settled(engine))
        engine.stop()
    return found


def numbers_of(result: Any) -> list[float]:
    """Everything that a row of a classification says in numbers."""
    if isinstance(result, Score):
        return [result.score]
    if isinstance(result, LabelScores | LabelSet):
        return list(result.probabilities.values())
    return [value for span in result.spans for value in (span.start, span.end, span.score)]


def check_same(here: Any, there: Any) -> None:
    if isinstance(here, ClassifyResult):
        assert len(here.results) == len(there.results)
        for mine, other in zip(here.results, there.results, strict=True):
            assert numbers_of(mine) == pytest.approx(numbers_of(other), rel=1e-3, abs=1e-5)
    elif isinstance(here, EmbedResult):
        np.testing.assert_allclose(here.vectors, there.vectors, rtol=1e-3, atol=1e-5)
    else:
        assert isinstance(here, GenerationResult)
        assert here.token_ids == there.token_ids
        for mine, other in zip(
            [*here.logprobs, *here.prompt_logprobs], [*there.logprobs, *there.prompt_logprobs], strict=True
        ):
            assert (mine.logprob is None) == (other.logprob is None)
            if mine.logprob is not None:
                assert mine.logprob == pytest.approx(other.logprob, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("make", [random_decoder, random_encoder])
def test_texts(make: Callable[[], FrozenBase], place: Place, store: AdapterStore, start_engine: Start) -> None:
    base = make()
    names = list(publish(base, store))
    gains = with_vectors(
        random_adapter(base, SHAPE, 7, ["a", "b"]), gain=["q_proj", "query"], offset=["v_proj", "value"]
    )
    store.publish(with_hidden_layer(gains, "tanh", 8), "acme/two_layers")

    def calls(engine: ServingEngine) -> list[Any]:
        return [
            *(classify(engine, name, TEXTS) for name in [*names, "acme/two_layers"]),
            engine.classify_each(names, TEXTS[:2], acting_for(names[0])),
            *(engine.embed(name, TEXTS, acting_for(name)) for name in [None, *names]),
        ]

    for here, there in zip(*on_both(place, base, store, start_engine, calls), strict=True):
        for mine, other in zip(*([r] if not isinstance(r, list) else r for r in (here, there)), strict=True):
            check_same(mine, other)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("make", [random_vit, random_clip])
def test_images(make: Callable[[], FrozenBase], place: Place, store: AdapterStore, start_engine: Start) -> None:
    base = make()
    for seed in range(4):
        store.publish(image_classifier(base, [SHAPE, LOW_RANK][seed % 2], seed, ["a", "b", "c"]), f"acme/c{seed}")
    embedders: list[str | None] = [None]
    inputs: list[Any] = [*IMAGES]
    if base.kind == "dual":
        store.publish(retriever(base, SHAPE, 9), "acme/both")
        embedders.append("acme/both")
        inputs += ["a cat", "a dog on the road"]

    def calls(engine: ServingEngine) -> list[Any]:
        return [
            *(classify(engine, f"acme/c{seed}", IMAGES) for seed in range(4)),
            *(engine.embed(name, inputs, acting_for(name)) for name in embedders),
        ]

    for here, there in zip(*on_both(place, base, store, start_engine, calls), strict=True):
        check_same(here, there)


@pytest.mark.parametrize("place", PLACES_AND_GRAPHS)
def test_generation(place: Place, store: AdapterStore, start_engine: Start) -> None:
    base = random_decoder()
    for seed in range(4):
        store.publish(random_adapter(base, [SHAPE, LOW_RANK][seed % 2], seed), f"acme/w{seed}")
    options: list[dict[str, Any]] = [
        {},
        {"logprobs": 3, "prompt_logprobs": 2},
        {"temperature": 0.9, "seed": 5},
        {"temperature": 0.8, "seed": 6, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
        {"presence_penalty": 0.5, "repetition_penalty": 1.2, "logit_bias": {70: 2.0}},
        {"constraint": ConstraintSpec("json_object")},
    ]

    def calls(engine: ServingEngine) -> list[Any]:
        return [
            collect(engine, adapter=adapter, prompt="the quick brown fox " * (1 + i), max_new_tokens=12, **each)
            for i, each in enumerate(options)
            for adapter in (None, f"acme/w{i % 4}")
        ]

    for here, there in zip(*on_both(place, base, store, start_engine, calls), strict=True):
        check_same(here, there)
