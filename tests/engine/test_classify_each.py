"""Each input through each of several adapters gives what one call for each adapter gives."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest

from adapters_store import AdapterBundle, AdapterStore
from adapters_store.errors import AdapterNotFound, StoreError
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase, ModelInputs
from sera_serve.engine import Principal, ServingEngine
from sera_serve.errors import InvalidRequest, TenantOverloaded, UnsupportedTask
from support.engine import classify, settled
from support.factories import random_adapter

Start = Callable[..., ServingEngine]
ACME = Principal("acme")
TEXTS = ["short", "a longer text, of some words", "the quick brown fox jumps over the lazy dog " * 3]
# Lengths at which an adapter cuts its inputs: the longest text is cut by all, the middle one by the last.
LENGTHS = (100, 40, 100, 16)


@pytest.fixture
def guards(decoder: FrozenBase, store: AdapterStore) -> list[str]:
    names = []
    for seed, length in enumerate(LENGTHS):
        labels = [f"l{place}" for place in range(2 + seed)]
        pooling = ("mean", "last_token")[seed % 2]
        shape = SeraConfig(8, 4, 8.0, ("q_proj", "v_proj"))
        bundle = random_adapter(decoder, shape, seed, labels, 0.5, pooling=pooling, max_length=length)
        store.publish(bundle, f"acme/g{seed}")
        names.append(f"acme/g{seed}")
    return names


@pytest.mark.parametrize("max_resident", [64, 2])
def test_one_call_gives_what_a_call_for_each_gives(
    decoder: FrozenBase, store: AdapterStore, guards: list[str], start_engine: Start, max_resident: int
) -> None:
    engine = start_engine(decoder, store, max_resident=max_resident)

    async def main() -> None:
        each = await engine.classify_each(guards, TEXTS, ACME)
        for name, result in zip(guards, each, strict=True):
            alone = await classify(engine, name, TEXTS)
            assert (result.adapter, result.version) == (name, 1)
            for got, want in zip(result.results, alone.results, strict=True):
                assert got.label == want.label
                assert got.probabilities == pytest.approx(want.probabilities, rel=1e-4, abs=1e-6)

    asyncio.run(main())


def test_an_input_is_tokenized_once_and_again_only_where_it_is_cut_shorter(
    decoder: FrozenBase, store: AdapterStore, guards: list[str], start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(decoder, store)
    asked: list[tuple[int, int]] = []
    rows = decoder.preprocessor.rows

    def counted(
        inputs: Sequence[Any], max_length: int, field: str = "inputs", *, offsets: bool = False
    ) -> list[ModelInputs]:
        asked.append((len(inputs), max_length))
        return rows(inputs, max_length, field, offsets=offsets)

    monkeypatch.setattr(engine.base.preprocessor, "rows", counted)
    asyncio.run(engine.classify_each(guards, TEXTS, ACME))
    assert sorted(asked, reverse=True) == [(3, 100), (2, 16), (1, 40)]


def test_the_call_counts_once_and_its_tenant_pays_for_every_row(
    decoder: FrozenBase, store: AdapterStore, guards: list[str], start_engine: Start
) -> None:
    engine = start_engine(decoder, store, max_queue_per_tenant=1)

    async def main() -> None:
        await engine.classify_each(guards, TEXTS[:2], ACME)
        tokens = sum(min(len(text), length) for text in TEXTS[:2] for length in LENGTHS)
        assert engine.runners["classify"].scheduler.counter("acme") == tokens
        results = await asyncio.gather(
            *(engine.classify_each(guards, TEXTS, ACME) for _ in range(3)), return_exceptions=True
        )
        assert sorted(isinstance(result, TenantOverloaded) for result in results) == [False, True, True]
        await settled(engine)

    asyncio.run(main())


def test_a_refusal_names_the_adapters_place(
    decoder: FrozenBase, store: AdapterStore, guards: list[str], start_engine: Start
) -> None:
    store.publish(random_adapter(decoder, SeraConfig(8, 4, 8.0, ("q_proj",)), 9), "acme/writer")
    engine = start_engine(decoder, store)
    for adapters, inputs, error, param in [
        ([*guards, "acme/none"], TEXTS, AdapterNotFound, "adapters[4]"),
        (["acme/writer", *guards], TEXTS, UnsupportedTask, "adapters[0]"),
        (guards, ["x"] * 257, InvalidRequest, "inputs"),
        (guards, ["x", ""], InvalidRequest, "inputs[1]"),
    ]:
        with pytest.raises(error) as refusal:
            asyncio.run(engine.classify_each(adapters, inputs, ACME))
        assert refusal.value.param == param  # type: ignore[attr-defined]


def test_a_call_without_inputs_or_adapters_is_refused(
    decoder: FrozenBase, store: AdapterStore, guards: list[str], start_engine: Start
) -> None:
    """It has no part whose end would be its own."""
    engine = start_engine(decoder, store)

    async def main() -> None:
        async with asyncio.timeout(20):
            for call, param in [
                (engine.classify(guards[0], [], ACME), "inputs"),
                (engine.classify_each(guards, [], ACME), "inputs"),
                (engine.classify_each([], TEXTS, ACME), "adapters"),
                (engine.embed(None, [], ACME), "inputs"),
            ]:
                with pytest.raises(InvalidRequest, match="is empty") as caught:
                    await call
                assert caught.value.param == param
        await settled(engine)

    asyncio.run(main())


def test_a_part_that_fails_ends_the_whole_call(
    guards: list[str], decoder: FrozenBase, store: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(decoder, store, classify_max_batch=1)
    lost = store.resolve(guards[1]).digest
    own_loading, own_acquire, runner = store.loading, engine.residency.acquire, engine.runners["classify"]
    own_run, passes = runner._classify, []
    asked, ran, ended = threading.Event(), threading.Event(), threading.Event()

    def acquire(digest: str, *claim: Any) -> Any:
        if digest == lost:
            asked.set()
        return own_acquire(digest, *claim)

    def loading(digest: str) -> Any:
        # The parts of the first adapter begin when one of the second waits for its load, which fails while they run.
        assert (ran if digest == lost else asked).wait(20)
        if digest == lost:
            raise StoreError("the bundle is damaged", param="adapter")
        return own_loading(digest)

    def run(rows: Any) -> Any:
        passes.append(rows)
        ran.set()
        if not ended.wait(20):
            # The call goes on, and the test is to end.
            ended.set()
        return own_run(rows)

    monkeypatch.setattr(engine.residency, "acquire", acquire)
    monkeypatch.setattr(store, "loading", loading)
    monkeypatch.setattr(runner, "_classify", run)
    with pytest.raises(StoreError, match="damaged"):
        asyncio.run(engine.classify_each(guards[:2], ["x"] * 200, ACME))
    ended.set()
    asyncio.run(settled(engine))
    assert len(passes) == 1


def test_a_call_that_is_cancelled_leaves_nothing(
    decoder: FrozenBase, store: AdapterStore, guards: list[str], start_engine: Start
) -> None:
    engine = start_engine(decoder, store, max_resident=2, classify_max_batch=1)

    async def main() -> None:
        for pause in (0.0, 0.002, 0.01):
            call = asyncio.ensure_future(engine.classify_each(guards * 8, TEXTS, ACME))
            await asyncio.sleep(pause)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await settled(engine)

    asyncio.run(main())


class SlowDisk(AdapterStore):
    """The disk's own time limit ends the reads of some bundles, once the test lets it."""

    lost: str | None = None

    def __init__(self, root: Any) -> None:
        super().__init__(root)
        self.gate = threading.Event()

    def loading(self, digest: str) -> AbstractContextManager[AdapterBundle]:
        if digest == self.lost:
            assert self.gate.wait(30)
            raise TimeoutError(110, "Connection timed out")
        return super().loading(digest)


@pytest.mark.parametrize("timeout_s", [None, 600.0])
def test_a_disks_own_time_limit_is_not_told_as_the_clients(
    decoder: FrozenBase, tmp_path: Any, start_engine: Start, monkeypatch: pytest.MonkeyPatch, timeout_s: float | None
) -> None:
    store = SlowDisk(tmp_path / "store")
    shape = SeraConfig(8, 4, 8.0, ("q_proj",))
    store.publish(random_adapter(decoder, shape, 1, ["x", "y"]), "acme/first")
    store.lost = store.publish(random_adapter(decoder, shape, 2, ["x", "y"]), "acme/second").digest
    engine = start_engine(decoder, store)
    runner = engine.runners["classify"]
    step = runner.step

    def tells() -> bool:
        ran = step()
        if ran:
            # The first part has run: the call waits for its parts to finish.
            store.gate.set()
        return ran

    monkeypatch.setattr(runner, "step", tells)

    async def main() -> None:
        with pytest.raises(TimeoutError, match="Connection timed out"):
            await engine.classify_each(["acme/first", "acme/second"], ["hi"], ACME, timeout_s=timeout_s)
        await settled(engine)

    asyncio.run(main())
