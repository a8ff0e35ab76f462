"""Two tenants with the same content: neither sees, or ends, what the other does with it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from adapters_store import AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.engine import GenerateParams, Presence, ServingEngine
from sera_serve.engine.adapter_uses import AdapterUses
from sera_serve.errors import CannotPin
from support.engine import GatedStore, generate, until
from support.factories import random_adapter

SHAPE = SeraConfig(4, 4, 8.0, ("q_proj",))


@pytest.fixture
def engine(decoder: FrozenBase, store: AdapterStore, start_engine: Callable[..., ServingEngine]) -> ServingEngine:
    for name in ("acme/own", "evil/copy"):
        store.publish(random_adapter(decoder, SHAPE, seed=1), name)
    return start_engine(decoder, store)


async def ask(engine: ServingEngine, adapter: str) -> None:
    await (await generate(engine, GenerateParams(adapter=adapter, prompt="Once", max_new_tokens=2))).collect()


def places(engine: ServingEngine, store: AdapterStore) -> list[Presence]:
    return engine.presence([(name, store.resolve(name).digest) for name in ("acme/own", "evil/copy")])


def test_a_tier_is_shown_to_the_adapter_that_was_used(engine: ServingEngine, store: AdapterStore) -> None:
    asyncio.run(ask(engine, "acme/own"))
    assert places(engine, store) == [Presence("device", False), Presence("store", False)]
    asyncio.run(ask(engine, "evil/copy@v1"))
    assert places(engine, store) == [Presence("device", False), Presence("device", False)]


def test_a_pin_is_of_one_adapter(engine: ServingEngine, store: AdapterStore) -> None:
    digest = store.resolve("acme/own").digest
    asyncio.run(engine.pin(digest, "acme/own@v1"))
    assert places(engine, store) == [Presence("device", True), Presence("store", False)]
    # Not pinned by this one: nothing ends.
    engine.unpin(digest, "evil/copy")
    assert engine.residency.pinned_digests() == [digest]
    asyncio.run(engine.pin(digest, "evil/copy"))
    engine.unpin(digest, "acme/own")
    assert engine.residency.pinned_digests() == [digest]
    assert places(engine, store) == [Presence("device", False), Presence("device", True)]
    engine.unpin(digest, "evil/copy")
    assert engine.residency.pinned_digests() == []


def test_the_pin_of_a_deleted_adapter_ends_and_not_that_of_another(engine: ServingEngine, store: AdapterStore) -> None:
    digest = store.resolve("acme/own").digest
    for name in ("acme/own", "evil/copy"):
        asyncio.run(engine.pin(digest, name))
    store.delete("acme/own")
    engine.drop_deleted_pins()
    assert engine.residency.pinned_digests() == [digest]
    engine.unpin(digest, "evil/copy")
    assert engine.residency.pinned_digests() == []
    # Nothing of the first pin has stayed.
    store.publish(store.load(digest), "acme/own")
    asyncio.run(engine.pin(digest, "evil/copy"))
    assert [place.is_pinned for place in places(engine, store)] == [False, True]


def test_a_pin_that_fails_leaves_nothing(
    engine: ServingEngine, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.resolve("acme/own").digest
    pin = engine.residency.pin

    def refuse(asked: str) -> None:
        raise CannotPin("no room")

    monkeypatch.setattr(engine.residency, "pin", refuse)
    with pytest.raises(CannotPin):
        asyncio.run(engine.pin(digest, "acme/own"))
    monkeypatch.setattr(engine.residency, "pin", pin)
    asyncio.run(engine.pin(digest, "evil/copy"))
    engine.unpin(digest, "evil/copy")
    assert engine.residency.pinned_digests() == []


@pytest.mark.parametrize("leaves", [0, 1])
def test_a_call_that_gives_up_leaves_the_pin_of_another_call(
    decoder: FrozenBase, gated: GatedStore, start_engine: Callable[..., ServingEngine], leaves: int
) -> None:
    engine = start_engine(decoder, gated)
    digest = gated.resolve("a/writer").digest

    async def main() -> None:
        gated.gate = threading.Event()
        calls = [asyncio.create_task(engine.pin(digest, "a/writer")) for _ in range(2)]
        entries = engine.residency._table.entries
        await until(lambda: digest in entries and len(entries[digest].waiters) == 2)
        calls[leaves].cancel()
        with pytest.raises(asyncio.CancelledError):
            await calls[leaves]
        gated.gate.set()
        await calls[1 - leaves]
        await until(lambda: not engine.residency.leases())

    asyncio.run(main())
    # Not pinned by this one: nothing ends.
    engine.unpin(digest, "b/copy")
    assert engine.residency.pinned_digests() == [digest]
    assert [place.is_pinned for place in engine.presence([("a/writer", digest)])] == [True]


@pytest.mark.parametrize("leaves", [0, 1])
def test_a_call_that_gives_up_in_the_moment_of_success_leaves_the_pin_of_another_call(
    engine: ServingEngine, store: AdapterStore, monkeypatch: pytest.MonkeyPatch, leaves: int
) -> None:
    digest = store.resolve("acme/own").digest
    pin, told = engine.residency.pin, [Future[None]() for _ in range(2)]
    waiting = list(told)
    monkeypatch.setattr(engine.residency, "pin", lambda asked: waiting.pop())

    async def main() -> None:
        calls = [asyncio.create_task(engine.pin(digest, "acme/own")) for _ in told]
        await until(lambda: not waiting)
        await asyncio.wrap_future(pin(digest))
        for future in told:
            future.set_result(None)
        # The calls are about to go on.
        await asyncio.sleep(0)
        calls[leaves].cancel()
        with pytest.raises(asyncio.CancelledError):
            await calls[leaves]
        await calls[1 - leaves]

    asyncio.run(main())
    assert engine.residency.pinned_digests() == [digest]
    engine.unpin(digest, "evil/copy")
    assert engine.residency.pinned_digests() == [digest], "it is the pin of another adapter"
    engine.unpin(digest, "acme/own")
    assert engine.residency.pinned_digests() == []


def test_the_oldest_uses_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sera_serve.engine.adapter_uses._MOST", 2)
    uses = AdapterUses()
    for name in ("a/a", "a/b", "a/a", "a/c"):
        uses.note(name, "d")
    on_device = [Presence("device", True)] * 3
    seen = uses.visible([("a/a", "d"), ("a/b", "d"), ("a/c", "d")], on_device)
    assert [place.tier for place in seen] == ["device", "store", "device"]
    assert not any(place.is_pinned for place in seen)
