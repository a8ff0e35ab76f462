"""An idle engine checks the invariants of the adapters' memory; an engine with a broken one serves no more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from adapters_store import AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.engine import GenerateParams, ServingEngine
from sera_serve.errors import EngineUnavailable
from support.engine import generate
from support.factories import random_adapter


def test_an_engine_with_a_broken_invariant_serves_no_more(
    decoder: FrozenBase, store: AdapterStore, start_engine: Callable[..., ServingEngine]
) -> None:
    store.publish(random_adapter(decoder, SeraConfig(4, 4, 8.0, "all-linear"), seed=1), "acme/a")
    engine = start_engine(decoder, store)
    params = GenerateParams(adapter="acme/a", prompt="Once", max_new_tokens=2)

    async def ask() -> None:
        await (await generate(engine, params)).collect()

    asyncio.run(ask())
    engine.ready()
    asyncio.run(ask())
    # As if another adapter's factors had been written over the table's entry.
    engine.residency.pool.tables.offset[0, engine.residency.pool.tables.offset[0].argmax()] += 1
    with pytest.raises(EngineUnavailable, match="not sound"):
        engine.ready()
    for refused in (engine.health, engine.ready):
        with pytest.raises(EngineUnavailable, match="restart the server"):
            refused()
    with pytest.raises(EngineUnavailable):
        asyncio.run(ask())
