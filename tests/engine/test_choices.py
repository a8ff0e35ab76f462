"""Several answers to one prompt: one prefill, seeds of their own, all or none, each closed on its own."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import GenerateParams, GenerationResult, GenerationStream, ServingEngine
from sera_serve.engine.choices import derived_seed
from sera_serve.engine.loop.plan import StepPlan
from sera_serve.engine.request import FinishReason, GenerationRequest
from sera_serve.errors import InvalidRequest, Overloaded, TenantOverloaded
from support.engine import SHAPE, Start, acting_for, collect, settled, until
from support.factories import random_adapter

PROMPT = "One prompt, and many answers to it. " * 5
# Two hundred pass too, in half a minute.
ROUNDS = 48
PAGES = (len(PROMPT) - 1) // 32 * 32
SAMPLED: dict[str, Any] = {"prompt": PROMPT, "temperature": 1.0, "seed": 5, "max_new_tokens": 8}


async def choices(engine: ServingEngine, params: GenerateParams) -> list[GenerationStream]:
    return await engine.generate_choices(params, acting_for(params.adapter))


async def collected(engine: ServingEngine, **fields: Any) -> list[GenerationResult]:
    streams = await choices(engine, GenerateParams(**fields))
    results = await asyncio.gather(*(stream.collect() for stream in streams))
    await settled(engine)
    return results


@pytest.fixture(scope="module")
def adapters(decoder: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    store = AdapterStore(tmp_path_factory.mktemp("choices") / "store")
    store.publish(random_adapter(decoder, SHAPE, 1, strength=0.5), "a/writer")
    return store


@pytest.mark.parametrize("adapter", ["a/writer", None])
@pytest.mark.parametrize("options", [{}, {"logprobs": 1, "prompt_logprobs": 1}], ids=["plain", "log-probabilities"])
def test_the_prompt_is_computed_once(
    options: dict[str, Any],
    adapter: str | None,
    decoder: FrozenBase,
    adapters: AdapterStore,
    start_engine: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The first one's prompt takes four steps.
    engine = start_engine(decoder, adapters, max_batch_tokens=48)
    planner = engine.runners["generate"].planner
    computed: list[int] = []
    plan = planner.plan

    def counted() -> StepPlan | None:
        step = plan()
        computed.extend(count for _, count in step.chunks) if step is not None else None
        return step

    monkeypatch.setattr(planner, "plan", counted)

    async def main() -> list[GenerationResult]:
        results = await collected(engine, **SAMPLED, adapter=adapter, n=16, **options)
        assert sum(computed) == len(PROMPT) + 15 * (len(PROMPT) - PAGES)
        # Nobody else shares what answers of the base model share.
        again = await collected(engine, **SAMPLED, adapter=adapter)
        assert (again[0].cached_tokens > 0) == (adapter is not None)
        assert again[0].token_ids == results[0].token_ids
        return results

    results = asyncio.run(main())
    assert [result.cached_tokens for result in results] == [0] + [PAGES] * 15
    assert len({result.prompt_logprobs for result in results}) == 1
    assert len(results[0].prompt_logprobs) == (len(PROMPT) if options else 0)
    assert len({result.id for result in results}) == 16


def test_each_is_what_its_seed_gives_alone(decoder: FrozenBase, adapters: AdapterStore, start_engine: Start) -> None:
    engine = start_engine(decoder, adapters)

    async def main() -> None:
        results = await collected(engine, **SAMPLED, adapter="a/writer", n=5)
        assert len({tuple(result.token_ids) for result in results}) == 5
        for index, result in enumerate(results):
            alone = await collect(engine, **SAMPLED | {"adapter": "a/writer", "seed": derived_seed(5, index)})
            assert alone.token_ids == result.token_ids
        drawn = await collected(engine, **SAMPLED | {"seed": None}, n=3)
        assert len({tuple(result.token_ids) for result in drawn}) == 3

    asyncio.run(main())
    assert derived_seed(5, 0) == 5 and len({derived_seed(5, index) for index in range(128)}) == 128


@pytest.mark.parametrize("closed", [0, 1, 3])
def test_one_that_is_closed_leaves_the_others(
    closed: int, decoder: FrozenBase, adapters: AdapterStore, start_engine: Start
) -> None:
    engine = start_engine(decoder, adapters, max_batch_tokens=48)

    async def main() -> None:
        want = await collected(engine, **SAMPLED, adapter="a/writer", n=4)
        streams = await choices(engine, GenerateParams(**SAMPLED, adapter="a/writer", n=4))
        await streams[closed].aclose()
        others = [stream for index, stream in enumerate(streams) if index != closed]
        results = await asyncio.gather(*(stream.collect() for stream in others))
        assert [r.token_ids for r in results] == [r.token_ids for i, r in enumerate(want) if i != closed]
        await settled(engine)

    asyncio.run(main())


def test_the_next_one_leads_where_the_first_ends_early(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start
) -> None:
    # A prompt of many steps, so that the first answer ends while its prompt is computed.
    engine = start_engine(decoder, adapters, max_batch_tokens=3)
    runner = engine.runners["generate"]

    async def main() -> None:
        asked = GenerateParams(**SAMPLED | {"prompt": PROMPT[:64]}, adapter="a/writer", n=4, prompt_logprobs=0)
        task = asyncio.ensure_future(choices(engine, asked))
        await until(lambda: bool(runner.in_batch()))
        (first,) = runner.in_batch()
        runner.cancel(first, FinishReason.CANCELLED)
        streams = await task
        results = await asyncio.gather(*(stream.collect() for stream in streams[1:]))
        assert [result.cached_tokens for result in results][1:] == [32, 32]
        assert {len(result.prompt_logprobs) for result in results} == {64}
        assert first.generated == 0
        await settled(engine)

    asyncio.run(main())


def test_all_are_admitted_or_none(decoder: FrozenBase, adapters: AdapterStore, start_engine: Start) -> None:
    engine = start_engine(decoder, adapters, max_queue=8, max_queue_per_tenant=6, request_timeout_s=0.3)

    async def main() -> None:
        with pytest.raises(InvalidRequest, match="n is 7; send 1 to 6"):
            await choices(engine, GenerateParams(**SAMPLED, n=7))
        held = await choices(engine, GenerateParams(prompt="x", max_new_tokens=200, ignore_eos=True, n=4))
        assert engine.in_flight() == 4
        with pytest.raises(TenantOverloaded):
            await choices(engine, GenerateParams(**SAMPLED, n=3))
        with pytest.raises(Overloaded):
            await choices(engine, GenerateParams(**SAMPLED, adapter="a/writer", n=5))
        assert engine.in_flight() == 4
        for stream in held:
            await stream.aclose()
        await settled(engine)

    asyncio.run(main())


def test_answers_that_cannot_start_in_time_are_refused_together(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start
) -> None:
    # Two rows for four answers, each as long as the context.
    engine = start_engine(decoder, adapters, max_sequences=2, request_timeout_s=0.05)

    async def main() -> None:
        asked = GenerateParams(prompt="x", max_new_tokens=None, ignore_eos=True, n=4)
        with pytest.raises(Overloaded, match="not started within"):
            await choices(engine, asked)
        await settled(engine)

    asyncio.run(main())


def test_more_answers_than_rows(decoder: FrozenBase, adapters: AdapterStore, start_engine: Start) -> None:
    want = asyncio.run(collected(start_engine(decoder, adapters), **SAMPLED, n=9))
    few = start_engine(decoder, adapters, max_sequences=2, kv_cache_tokens=320)
    assert [r.token_ids for r in asyncio.run(collected(few, **SAMPLED, n=9))] == [r.token_ids for r in want]


def test_cancelled_in_mid_stream_again_and_again(decoder: FrozenBase, tmp_path: Any, start_engine: Start) -> None:
    store = AdapterStore(tmp_path / "store")
    digest = store.publish(random_adapter(decoder, SHAPE, 1, strength=0.5), "a/writer").digest
    engine = start_engine(decoder, store)
    dice = random.Random(0)

    async def main() -> None:
        started = time.monotonic()
        for round_number in range(ROUNDS):
            asked = GenerateParams(
                adapter="a/writer", prompt=PROMPT[: dice.randint(1, 99)], max_new_tokens=100, logprobs=2, n=16
            )
            streams = await choices(engine, asked)
            await anext(streams[dice.randrange(16)], None)
            dice.shuffle(streams)
            for stream in streams:
                await stream.aclose()
            if round_number % 12 == 11:
                await settled(engine)
        await settled(engine)
        store.delete("a/writer")
        engine.mark_deleted(digest)
        await until(lambda: engine.stats().resident == 0)
        assert engine.stats().device_bytes == 0
        assert time.monotonic() - started < 60

    asyncio.run(main())


def test_a_stopped_engine_tells_all_of_them(decoder: FrozenBase, adapters: AdapterStore) -> None:
    engine = ServingEngine(decoder, adapters, ServeSettings(pool_mib=8, kv_cache_tokens=8192, max_batch_tokens=2))
    engine.start()

    async def main() -> None:
        task = asyncio.ensure_future(choices(engine, GenerateParams(**SAMPLED, n=4)))
        await until(lambda: bool(engine.runners["generate"].in_batch()))
        await asyncio.to_thread(engine.stop)
        with pytest.raises(Exception, match="stopping"):
            await task
        assert engine.in_flight() == 0

    asyncio.run(main())


def test_one_that_was_closed_is_not_queued(decoder: FrozenBase, adapters: AdapterStore, start_engine: Start) -> None:
    scheduler = start_engine(decoder, adapters).runners["generate"].scheduler
    closed = GenerationRequest(principal=acting_for(None), tokens=[1])
    assert scheduler.cancel(closed, FinishReason.CANCELLED)
    scheduler.submit([closed])
    assert scheduler.waiting() == 0
    scheduler.check_invariants()
