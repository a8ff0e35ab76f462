"""What one request may ask, how it ends, and that ending it at any stage gives everything back."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest

from adapters_store import AdapterNotFound, AdapterStore, StoreError
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.engine import GenerateParams, GenerationResult
from sera_serve.engine.stream import Detokenizer
from sera_serve.errors import EngineUnavailable, InvalidRequest, Overloaded, PromptTooLong, UnsupportedTask
from support.engine import SHAPE, Start, collect, generate, settled
from support.factories import greedy, random_adapter, random_encoder


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def test_result_and_deltas_agree(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    store.publish(random_adapter(decoder, SHAPE, 1), "acme/a")
    engine = start_engine(decoder, store)

    async def main() -> None:
        stream = await generate(engine, GenerateParams(adapter="acme/a", prompt="hello", max_new_tokens=12))
        deltas = [delta async for delta in stream]
        assert stream.result is not None
        assert [t for delta in deltas for t in delta.token_ids] == stream.result.token_ids
        assert "".join(delta.text for delta in deltas) == stream.result.text
        assert stream.result.prompt_tokens == 5
        assert stream.result.completion_tokens == 12
        assert (stream.result.adapter, stream.result.version) == ("acme/a", 1)

    run(main())


@pytest.mark.parametrize("ends_by", ["length", "stop"])
def test_an_interval_joins_tokens_and_changes_nothing_else(
    ends_by: str, decoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    params = GenerateParams(prompt="hello", max_new_tokens=30, ignore_eos=True)
    whole = run(collect(start_engine(decoder, store), **vars(params)))
    if ends_by == "stop":
        params = replace(params, stop=[whole.text[20:24]])
        whole = run(collect(start_engine(decoder, store), **vars(params)))
        assert 4 < len(whole.token_ids) < 30
    engine = start_engine(decoder, store, stream_interval=7)

    async def main() -> None:
        stream = await generate(engine, params)
        deltas = [delta async for delta in stream]
        assert stream.result is not None
        assert (stream.result.token_ids, stream.result.text) == (whole.token_ids, whole.text)
        assert "".join(delta.text for delta in deltas) == whole.text
        assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
        # Some may be more at once, where the loop is late.
        assert deltas[0].token_ids and all(len(delta.token_ids) >= 7 for delta in deltas[1:-1])
        await settled(engine)

    run(main())


def test_versions_and_aliases_choose_the_weights(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    for seed in (1, 2):
        store.publish(random_adapter(decoder, SHAPE, seed), "acme/a")
    engine = start_engine(decoder, store)

    async def main() -> None:
        first, second, latest = [
            await collect(engine, adapter=ref, prompt="hello") for ref in ("acme/a@v1", "acme/a@v2", "acme/a")
        ]
        assert first.token_ids != second.token_ids == latest.token_ids
        assert [r.version for r in (first, second, latest)] == [1, 2, 2]

    run(main())


def test_stop_strings_end_the_text_and_are_left_out(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    engine = start_engine(decoder, store)

    async def main() -> None:
        whole = await collect(engine, prompt="hello", max_new_tokens=40)
        assert whole.finish_reason == "length"
        printable = [c for c in whole.text[3:] if c.isascii()]
        stop = printable[0]
        cut = await collect(engine, prompt="hello", max_new_tokens=40, stop=["never there", stop])
        assert cut.finish_reason == "stop"
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        await settled(engine)

    run(main())


def test_end_token_ends_the_text(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    prompt = decoder.tokenizer("hello")["input_ids"]
    tokens = greedy(decoder, prompt, 20)
    # A token that first comes at position 5 or later is made the end token of this base.
    position, end = next((i, t) for i, t in enumerate(tokens) if i >= 5 and t not in tokens[:i])
    base = decoder.share_weights()
    base.model.generation_config.eos_token_id = end
    engine = start_engine(base, store)
    result = run(collect(engine, prompt="hello", max_new_tokens=20))
    assert result.finish_reason == "stop"
    assert result.token_ids == tokens[: position + 1]


def test_seeded_sampling_is_repeatable_in_any_batch(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    engine = start_engine(decoder, store, max_batch_tokens=24)
    asked = {"prompt": "hello", "temperature": 1.0, "top_p": 0.9, "top_k": 50, "max_new_tokens": 16}

    async def main() -> None:
        alone = await collect(engine, **asked, seed=5)
        others = [collect(engine, **asked, seed=seed) for seed in range(12)]
        together = await asyncio.gather(*others, collect(engine, prompt="x" * 60, max_new_tokens=30))
        assert together[5].token_ids == alone.token_ids
        assert len({tuple(r.token_ids) for r in together}) == 13
        unseeded = [await collect(engine, **asked) for _ in range(2)]
        assert unseeded[0].token_ids != unseeded[1].token_ids

    run(main())


@pytest.mark.parametrize("when", ["at once", "after one", "waiting for room"])
def test_closing_gives_everything_back(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start, when: str
) -> None:
    for name in ("a", "b"):
        store.publish(random_adapter(decoder, SHAPE, ord(name)), f"acme/{name}")
    engine = start_engine(decoder, store, max_resident=1)

    async def main() -> None:
        params = GenerateParams(adapter="acme/a", prompt="hello", max_new_tokens=200)
        stream = await generate(engine, params)
        if when == "after one":
            await anext(stream)
        if when == "waiting for room":
            waiting = asyncio.create_task(collect(engine, adapter="acme/b", prompt="hello"))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        await stream.aclose()
        await settled(engine)
        assert (await collect(engine, adapter="acme/b", prompt="hello")).completion_tokens == 64

    run(main())


def test_abandoned_event_loop_does_not_hurt_the_engine(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    store.publish(random_adapter(decoder, SHAPE, 1), "acme/a")
    engine = start_engine(decoder, store)

    async def leave() -> None:
        await generate(engine, GenerateParams(adapter="acme/a", prompt="hello", max_new_tokens=200))

    run(leave())
    gc.collect()
    run(settled(engine))
    assert run(collect(engine, adapter="acme/a", prompt="hello", max_new_tokens=3)).completion_tokens == 3


def test_refusals_name_the_field_and_hold_nothing(
    decoder: FrozenBase, encoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    store.publish(random_adapter(decoder, SHAPE, 1, labels=["no", "yes"]), "acme/classifier")
    store.publish(random_adapter(random_encoder(), SeraConfig(4, 4, 4.0, ("query",)), 1), "acme/other-base")
    engine = start_engine(decoder, store)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"adapter": "acme/missing", "prompt": "x"}, AdapterNotFound, "adapter"),
        ({"adapter": "../etc/passwd", "prompt": "x"}, StoreError, "adapter"),
        ({"adapter": "acme/classifier", "prompt": "x"}, UnsupportedTask, "adapter"),
        ({"adapter": "acme/other-base", "prompt": "x"}, StoreError, "base"),
        ({"prompt": ""}, InvalidRequest, "prompt"),
        ({"token_ids": []}, InvalidRequest, "token_ids"),
        ({"token_ids": [259]}, InvalidRequest, "token_ids"),
        ({"token_ids": [-1]}, InvalidRequest, "token_ids"),
        ({"prompt": "x" * 250, "max_new_tokens": 10}, PromptTooLong, "prompt"),
    ]
    for params, error, param in cases:
        with pytest.raises(error) as refusal:
            run(collect(engine, **params))
        assert param in str(refusal.value.param), params  # type: ignore[attr-defined]
    assert engine.in_flight() == 0 and engine.residency.leases() == 0
    stats = engine.stats()
    assert not any(stats.failed_loads.values()) and not any(stats.granted.values()), "nothing was loaded to be refused"
    encoder_engine = start_engine(encoder, store)
    with pytest.raises(UnsupportedTask):
        run(collect(encoder_engine, prompt="x"))


def test_admission_is_bounded(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    engine = start_engine(decoder, store, max_queue=3)

    async def main() -> None:
        results = await asyncio.gather(
            *(collect(engine, prompt="x", max_new_tokens=20) for _ in range(8)), return_exceptions=True
        )
        refused = [r for r in results if isinstance(r, Overloaded)]
        assert len(refused) == 5 and refused[0].retry_after >= 1
        assert sum(isinstance(r, GenerationResult) for r in results) == 3

    run(main())


def test_prompt_longer_than_the_cache_is_refused_not_fatal(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    engine = start_engine(decoder, store, kv_cache_tokens=64)
    with pytest.raises(PromptTooLong, match="context of 64"):
        run(collect(engine, prompt="x" * 60, max_new_tokens=5))
    assert run(collect(engine, prompt="x" * 60, max_new_tokens=4)).completion_tokens == 4


def test_a_dead_engine_says_so(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    base = decoder.share_weights()
    engine = start_engine(base, store)

    async def main() -> None:
        stream = await generate(engine, GenerateParams(prompt="x", max_new_tokens=250))
        await anext(stream)
        engine.runners["generate"].runner.decoder.model.model.lm_head.forward = None  # the next forward pass raises
        with pytest.raises(EngineUnavailable, match="generation failed"):
            await stream.collect()
        with pytest.raises(EngineUnavailable, match=r"stopped on an error|is stopping"):
            await collect(engine, prompt="x")
        await settled(engine)

    run(main())


def test_detokenizer_holds_back_what_may_change(decoder: FrozenBase) -> None:
    def chunks(text: str, stop: list[str]) -> tuple[list[str], Detokenizer]:
        prompt = decoder.tokenizer("p")["input_ids"]
        detokenizer = Detokenizer(decoder.tokenizer, prompt, stop)
        out = [detokenizer.push(token) for token in decoder.tokenizer(text)["input_ids"] if not detokenizer.stopped]
        return [*out, detokenizer.flush()], detokenizer

    out, detokenizer = chunks("añb", [])
    assert out == ["a", "", "ñ", "b", ""]
    out, detokenizer = chunks("one END", ["END", "EN!"])
    assert (detokenizer.text, detokenizer.stopped) == ("one ", True)
    out, detokenizer = chunks("one ENT", ["END"])
    assert (detokenizer.text, detokenizer.stopped, out[-1]) == ("one ENT", False, "")
    out, detokenizer = chunks("one EN", ["END"])
    assert (detokenizer.text, out[-1]) == ("one EN", "EN")
