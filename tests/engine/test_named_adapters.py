"""Which adapters serve and which wait, by the references that requests used."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from adapters_store import AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.engine import GenerateParams, ServingEngine, WeightedAdapter
from sera_serve.engine.named_adapters import AdapterNames
from support.engine import GatedStore, generate
from support.factories import random_adapter, random_decoder

SHAPE = SeraConfig(4, 4, 8.0, ("q_proj",))


async def ask(engine: ServingEngine, adapter: str | list[WeightedAdapter]) -> None:
    await (await generate(engine, GenerateParams(adapter=adapter, prompt="Once", max_new_tokens=2))).collect()


def test_names_are_those_that_requests_used(
    decoder: FrozenBase, store: AdapterStore, start_engine: Callable[..., ServingEngine]
) -> None:
    for number, name in enumerate(("a", "b", "c")):
        store.publish(random_adapter(decoder, SHAPE, seed=number), f"acme/{name}")
    engine = start_engine(decoder, store, max_resident=2)
    assert engine.adapter_activity().limit == 2
    assert engine.adapter_activity().running == ()

    async def first() -> None:
        await ask(engine, "acme/a")
        await ask(engine, "acme/a@v1")

    asyncio.run(first())
    # Resident, though no request uses it.
    assert set(engine.adapter_activity().running) == {"acme/a", "acme/a@v1"}

    async def second() -> None:
        await ask(engine, "acme/b")
        await ask(engine, "acme/c")

    asyncio.run(second())
    # The first was evicted. The last one used comes first.
    assert engine.adapter_activity().running == ("acme/c", "acme/b")
    assert engine.adapter_activity().waiting == ()
    asyncio.run(ask(engine, [WeightedAdapter("acme/b", 0.5), WeightedAdapter("acme/c", 0.5)]))
    # A sum is on the device, under no name that a request could have as its model.
    assert engine.residency.stats().resident == 2
    assert len(engine.adapter_activity().running) == 1


def test_a_version_by_its_whole_digest_has_the_name_of_the_adapter(
    decoder: FrozenBase, store: AdapterStore, start_engine: Callable[..., ServingEngine]
) -> None:
    published = store.publish(random_adapter(decoder, SHAPE, seed=1), "acme/a")
    engine = start_engine(decoder, store)
    asyncio.run(ask(engine, f"acme/a@{published.digest}"))
    assert engine.adapter_activity().running == ("acme/a",)


def test_an_alias_names_what_it_last_resolved_to(
    decoder: FrozenBase, store: AdapterStore, start_engine: Callable[..., ServingEngine]
) -> None:
    store.publish(random_adapter(decoder, SHAPE, seed=1), "acme/a")
    engine = start_engine(decoder, store)
    asyncio.run(ask(engine, "acme/a"))
    store.publish(random_adapter(decoder, SHAPE, seed=2), "acme/a")
    asyncio.run(ask(engine, "acme/a"))
    # Both versions are on the device; the name stands for the new one.
    assert engine.residency.stats().resident == 2
    assert engine.adapter_activity().running == ("acme/a",)


def test_an_adapter_that_loads_is_waiting(gated: GatedStore, start_engine: Callable[..., ServingEngine]) -> None:
    engine = start_engine(random_decoder(), gated)
    gated.gate = threading.Event()

    async def run() -> None:
        asked = asyncio.ensure_future(ask(engine, "a/writer"))
        while engine.adapter_activity().waiting != ("a/writer",):
            await asyncio.sleep(0.005)
        assert engine.adapter_activity().running == ()
        assert gated.gate is not None
        gated.gate.set()
        await asked

    asyncio.run(asyncio.wait_for(run(), 20))
    assert engine.adapter_activity().running == ("a/writer",)
    assert engine.adapter_activity().waiting == ()


def test_a_pinned_adapter_has_its_name_before_its_first_request(
    decoder: FrozenBase, store: AdapterStore, start_engine: Callable[..., ServingEngine]
) -> None:
    store.publish(random_adapter(decoder, SHAPE, seed=1), "acme/a")
    engine = start_engine(decoder, store)
    asyncio.run(engine.pin(store.resolve("acme/a").digest, "acme/a"))
    assert engine.adapter_activity().running == ("acme/a",)
    engine.unpin(store.resolve("acme/a").digest)


def test_many_references_are_forgotten_and_one_adapter_has_few() -> None:
    names = AdapterNames(2)
    for number in range(5000):
        names.add(f"acme/a@alias-{number}", "d1")
    names.add("other/b", "d2")
    activity = names.activity(["d1", "d2"], [])
    assert activity.running == (*(f"acme/a@alias-{number}" for number in range(4999, 4995, -1)), "other/b")
    for number in range(2000):
        names.add(f"acme/c@alias-{number}", "d3")
    assert names.activity(["d2"], []).running == ()


def test_the_names_least_recently_used_are_forgotten_first() -> None:
    for max_resident, most in (2, 1024), (600, 1200):
        names = AdapterNames(max_resident)
        for number in range(most):
            names.add(f"acme/a{number}", f"d{number}")
        assert names.activity(["d0"], []).running == ("acme/a0",)
        names.add("acme/a0", "d0")
        names.add("acme/b", "d")
        assert names.activity(["d0", "d1", "d2"], []).running == ("acme/a0", "acme/a2")
