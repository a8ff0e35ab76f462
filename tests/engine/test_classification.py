"""Rows of many classifiers in one batch give what each classifier gives alone on its merged base."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from adapters_store import AdapterBundle, AdapterStore, WrongTask
from sera_kernels import ShapeClasses
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.engine import ClassifyResult, GenerateParams, ServingEngine, row_calls
from sera_serve.engine.request import ClassificationRequest
from sera_serve.engine.tasks.passes import run_pass
from sera_serve.errors import EngineUnavailable, InvalidRequest, UnsupportedTask
from support.engine import acting_for, classify, generate, settled, until
from support.factories import encoded, merged, random_adapter
from support.no_collection import no_collection

Start = Callable[..., ServingEngine]
TEXTS = ["short", "a longer text, of some words", "x", "the quick brown fox jumps over the lazy dog " * 3]


def shapes(base: FrozenBase) -> list[SeraConfig]:
    names = ("q_proj", "v_proj") if base.kind == "decoder" else ("query", "value")
    return [
        SeraConfig(16, 16, 8.0, "all-linear"),
        SeraConfig(8, 2, 8.0, names, use_mixer=False),
        SeraConfig(4, 1, 8.0, "all-linear"),
    ]


def publish(base: FrozenBase, store: AdapterStore) -> dict[str, AdapterBundle]:
    bundles = {}
    for i in range(6):
        labels = [f"label{j}" for j in range(2 + i)]
        pooling = ["last_token", "mean", "cls"][i % 3]
        bundles[f"acme/c{i}"] = random_adapter(
            base, shapes(base)[i % 3], seed=i, labels=labels, strength=0.5, pooling=pooling, max_length=40
        )
        store.publish(bundles[f"acme/c{i}"], f"acme/c{i}")
    return bundles


def expected(base: FrozenBase, bundle: AdapterBundle, text: str) -> torch.Tensor:
    ids, mask = encoded(base, [text], 40)
    assert bundle.config.pooling is not None
    states = merged(base, bundle).pooled_states(ids, mask, bundle.config.pooling)
    logits = states @ bundle.tensors["head.weight"].T + bundle.tensors["head.bias"]
    return logits[0].softmax(0)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("max_resident", [64, 2])
def test_mixed_rows_are_each_alone_and_merged(
    kind: str, max_resident: int, request: pytest.FixtureRequest, store: AdapterStore, start_engine: Start
) -> None:
    base: FrozenBase = request.getfixturevalue(kind)
    bundles = publish(base, store)
    engine = start_engine(base, store, max_resident=max_resident)

    async def together() -> list[ClassifyResult]:
        return await asyncio.gather(*(classify(engine, name, TEXTS) for name in [*bundles, *bundles]))

    for name, result in zip([*bundles, *bundles], asyncio.run(together()), strict=True):
        assert (result.adapter, result.version) == (name, 1)
        for text, scores in zip(TEXTS, result.results, strict=True):
            want = expected(base, bundles[name], text)
            assert list(scores.probabilities) == bundles[name].config.labels
            got = torch.tensor(list(scores.probabilities.values()))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            assert scores.label == bundles[name].config.labels[int(want.argmax())]  # type: ignore[index]


def test_a_pass_is_launched_for_its_own_adapters(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {
        "acme/single": SeraConfig(8, 8, 8.0, ("q_proj",)),
        "other/whole": SeraConfig(100, 1, 8.0, ("q_proj",)),
        "other/segmented": SeraConfig(32, 2, 8.0, ("q_proj",)),
    }
    for seed, (name, shape) in enumerate(shapes.items()):
        store.publish(random_adapter(decoder, shape, seed, labels=["n", "y"]), name)
    engine = start_engine(decoder, store)
    seen: list[ShapeClasses] = []
    run = run_pass

    def spy(base: Any, context: Any, rows: Any, slots: Any, classes: ShapeClasses, embeds: bool) -> Any:
        seen.append(classes)
        return run(base, context, rows, slots, classes, embeds)

    monkeypatch.setattr("sera_serve.engine.tasks.classify.run_pass", spy)
    for name in ("other/whole", "other/segmented", "acme/single"):
        asyncio.run(classify(engine, name, ["x"]))
    asyncio.run(engine.embed(None, ["x"], acting_for("acme/x")))
    assert len(engine.residency.digests()) == 3
    assert seen == [ShapeClasses(whole=256), ShapeClasses(segmented=64), ShapeClasses(single=16), ShapeClasses()]


def test_a_pass_keeps_no_keys_and_values(decoder: FrozenBase) -> None:
    caches: list[Any] = []
    base = decoder.share_weights()
    base.model.base_model.register_forward_hook(lambda module, args, output: caches.append(output.past_key_values))
    base.hidden_states(*encoded(base, TEXTS, 40))
    assert caches == [None]


def test_generate_and_classify_share_a_decoder(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    bundles = publish(decoder, store)
    store.publish(random_adapter(decoder, shapes(decoder)[0], seed=9), "acme/g")
    engine = start_engine(decoder, store)

    async def main() -> None:
        params = GenerateParams(adapter="acme/g", prompt="hello", max_new_tokens=32)
        alone = await (await generate(engine, params)).collect()
        stream = await generate(engine, params)
        results = await asyncio.gather(stream.collect(), *(classify(engine, name, TEXTS) for name in bundles))
        assert results[0].token_ids == alone.token_ids  # type: ignore[union-attr]

    asyncio.run(main())


def test_refusals(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    publish(decoder, store)
    store.publish(random_adapter(decoder, shapes(decoder)[0], seed=9), "acme/g")
    engine = start_engine(decoder, store)
    with pytest.raises(UnsupportedTask, match="/v1/generate"):
        asyncio.run(classify(engine, "acme/g", ["x"]))
    with pytest.raises(InvalidRequest, match="input 1 has no tokens") as refusal:
        asyncio.run(classify(engine, "acme/c0", ["x", ""]))
    assert refusal.value.param == "inputs[1]"


def test_an_adapter_for_longer_texts_than_the_base_reads(
    encoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    engine = start_engine(encoder, store)
    longest = encoder.max_length
    bundle = random_adapter(encoder, shapes(encoder)[0], 1, ["n", "y"], max_length=longest + 1)
    with pytest.raises(WrongTask, match=f"max_length is {longest + 1}, and .* reads {longest} tokens") as refusal:
        engine.check_bundle(bundle)
    assert refusal.value.param == "max_length"
    # One that a store has already: of a base whose tokenizer got a limit since.
    store.publish(bundle, "acme/long")
    (result,) = asyncio.run(classify(engine, "acme/long", ["x" * (longest + 40)])).results
    fits = random_adapter(encoder, shapes(encoder)[0], 1, ["n", "y"], max_length=longest)
    store.publish(fits, "acme/fits")
    assert asyncio.run(classify(engine, "acme/fits", ["x" * (longest + 40)])).results == [result]


def test_a_failing_batch_fails_its_rows_only(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(decoder, store)
    engine = start_engine(decoder, store)

    def broken(rows: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runners["classify"], "_classify", broken)
        with pytest.raises(EngineUnavailable, match="no memory"):
            asyncio.run(classify(engine, "acme/c0", TEXTS))
    assert len(asyncio.run(classify(engine, "acme/c0", TEXTS)).results) == len(TEXTS)


@pytest.mark.parametrize("device_works", [True, False])
def test_a_failing_batch_ends_its_leases_after_the_device(
    device_works: bool, decoder: FrozenBase, store: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(decoder, store)
    engine = start_engine(decoder, store)
    runner = engine.runners["classify"]
    leases: list[int] = []

    class Stream:
        """Runs what a failing pass had launched until it is waited for."""

        def synchronize(self) -> None:
            leases.append(engine.residency.leases())
            if not device_works:
                raise RuntimeError("the device is lost")

    def broken(rows: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(runner, "_classify", broken)
    monkeypatch.setattr(runner, "_stream", Stream())
    with pytest.raises(EngineUnavailable, match="no memory" if device_works else "the device is lost"):
        asyncio.run(classify(engine, "acme/c0", TEXTS))
    assert leases[0] == 1
    assert engine.residency.leases() == 0
    assert (runner.failure() is None) == device_works


def test_cancelled_request_keeps_its_adapter_until_its_rows_are_done(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(decoder, store)
    engine = start_engine(decoder, store, classify_max_batch=1)
    running, proceed = threading.Event(), threading.Event()
    run = engine.runners["classify"]._classify

    def slow(rows: object) -> object:
        running.set()
        proceed.wait(10)
        return run(rows)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.runners["classify"], "_classify", slow)

    async def main() -> None:
        request = asyncio.create_task(classify(engine, "acme/c0", TEXTS))
        await asyncio.to_thread(running.wait, 10)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        # A cancellation acts between two passes.
        await asyncio.sleep(0.2)
        assert engine.residency.leases() >= 1
        proceed.set()
        while engine.residency.leases():
            await asyncio.sleep(0.01)

    asyncio.run(main())


def test_the_rows_of_a_call_that_is_given_up_are_gone(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(decoder, store)
    engine = start_engine(decoder, store)
    parts: list[weakref.ref[ClassificationRequest]] = []
    split_call = row_calls.split_call

    def noted(*arguments: Any) -> list[ClassificationRequest]:
        made = split_call(*arguments)
        parts.extend(map(weakref.ref, made))
        return made

    monkeypatch.setattr(row_calls, "split_call", noted)

    async def main() -> None:
        call = asyncio.ensure_future(classify(engine, "acme/c0", ["some text"] * 1000))
        await until(lambda: any((part := each()) is not None and part.started_at is not None for each in parts))
        # The call has seen that a part runs, and waits for all of them.
        await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        del call
        await settled(engine)
        # What the last pass still refers to goes with the next one.
        await classify(engine, "acme/c1", ["another"])
        await until(lambda: not any(each() for each in parts[:-1]))

    with no_collection():
        asyncio.run(main())
