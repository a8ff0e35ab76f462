"""A pass of rows waits for the device once, for its results, whatever the number of its adapters."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from adapters_store import AdapterBundle, AdapterStore
from sera_serve.base import FrozenBase, ImageInput
from sera_serve.engine import ServingEngine
from support.device_waits import DeviceWaits
from support.engine import SHAPE, acting_for, classify, settled, until
from support.factories import random_adapter, random_decoder, random_encoder, with_hidden_layer
from support.head_tasks import labeller, regressor, span_finder
from support.places import Place
from support.vision import image_classifier, image_file, random_clip, random_vit, retriever

Start = Callable[..., ServingEngine]
Make = Callable[[FrozenBase, int], AdapterBundle]
ADAPTERS = 4
LABELS = ["a", "b", "c", "d", "e"]
TEXT = "some text"
IMAGE = ImageInput(image_file(1), "inputs[0].image")


def sorter(base: FrozenBase, seed: int) -> AdapterBundle:
    """One that could overflow, so that its pass is watched."""
    pooling = ("last_token", "mean", "cls")[seed % 3]
    return random_adapter(base, SHAPE, seed, LABELS[: 2 + seed % 3], strength=1e5, pooling=pooling)


def any_head(base: FrozenBase, seed: int) -> AdapterBundle:
    if seed == 0:
        return with_hidden_layer(random_adapter(base, SHAPE, seed, LABELS), "tanh", 8)
    if seed == 1:
        return labeller(base, seed, LABELS)
    return regressor(base, seed) if seed == 2 else span_finder(base, seed)


def pictures(base: FrozenBase, seed: int) -> AdapterBundle:
    return image_classifier(base, SHAPE, seed, LABELS[: 2 + seed % 2])


def embedder(base: FrozenBase, seed: int) -> AdapterBundle:
    return retriever(base, SHAPE, seed)


async def labels(engine: ServingEngine, name: str) -> Any:
    return (await classify(engine, name, [IMAGE if engine.base.image_tower else TEXT])).results  # type: ignore[list-item]


async def vectors(engine: ServingEngine, name: str) -> Any:
    return (await engine.embed(name, [TEXT], acting_for(name))).vectors


async def image_vectors(engine: ServingEngine, name: str) -> Any:
    return (await engine.embed(name, [IMAGE], acting_for(name))).vectors


async def both(engine: ServingEngine, name: str) -> Any:
    return await asyncio.gather(labels(engine, name), vectors(engine, name))


@pytest.mark.parametrize(
    ("make_base", "make", "call"),
    [
        (random_decoder, sorter, labels),
        (random_decoder, span_finder, labels),
        (random_encoder, any_head, both),
        (random_vit, pictures, labels),
        (random_clip, pictures, labels),
        (random_clip, embedder, vectors),
        (random_clip, embedder, image_vectors),
    ],
    ids=["sorters", "tags", "all heads and vectors", "images", "images of a dual base", "texts of it", "its vectors"],
)
def test_a_pass_waits_for_the_device_once(
    make_base: Callable[[], FrozenBase],
    make: Make,
    call: Callable[[ServingEngine, str], Awaitable[Any]],
    store: AdapterStore,
    start_engine: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = make_base()
    names = [f"acme/a{seed}" for seed in range(ADAPTERS)]
    for seed, name in enumerate(names):
        store.publish(make(base, seed), name)
    place = Place()
    with place.serving():
        engine = start_engine(place.moved(base), store)
        runner = engine.runners["classify"]
        step, own, may_run = runner.step, runner._classify, threading.Event()
        adapters: list[int] = []

        def counted(rows: Any) -> Any:
            with DeviceWaits() as waits:
                results = own(rows)
            assert waits.found == ["aten._to_copy.default"]
            adapters.append(len({row.request.adapter.digest for row in rows}))
            return results

        async def together(asked: list[str]) -> Any:
            may_run.clear()
            calls = asyncio.gather(*(call(engine, name) for name in asked))
            await until(lambda: runner.scheduler.waiting() == len(asked) * (2 if call is both else 1))
            may_run.set()
            runner._wake.set()
            return await calls

        monkeypatch.setattr(runner, "step", lambda: may_run.is_set() and step())
        # The adapters are loaded, and so is what some libraries keep.
        asyncio.run(together(names))
        monkeypatch.setattr(runner, "_classify", counted)
        asyncio.run(together(names[:1]))
        asyncio.run(together(names))
        assert adapters == [1, ADAPTERS]
        asyncio.run(settled(engine))
        engine.stop()
