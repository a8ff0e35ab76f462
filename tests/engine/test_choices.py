"""Several answers of one call: one prefill, seeds of their own, all or none, each read and closed on its own."""

from __future__ import annotations

import asyncio
import random
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import GenerateParams, GenerationResult, GenerationStream, Principal, ServingEngine
from sera_serve.engine.choices import derived_seed
from sera_serve.engine.loop.plan import StepPlan
from sera_serve.engine.request import FinishReason, GenerationRequest
from sera_serve.errors import EngineUnavailable, InvalidRequest, Overloaded, TenantOverloaded
from support.engine import SHAPE, Start, acting_for, collect, settled, until
from support.factories import random_adapter
from support.no_collection import no_collection

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


@asynccontextmanager
async def readers_keep_up(engine: ServingEngine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """In the block each step waits until the event loop has read the tokens of the step before."""
    runner, loop = engine.runners["generate"], asyncio.get_running_loop()
    take_news, idle = runner._take_news, threading.Event()
    idle.set()

    async def turns() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    def in_turn() -> None:
        idle.clear()
        asyncio.run_coroutine_threadsafe(turns(), loop).result(30)
        idle.set()
        take_news()

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_take_news", in_turn)
        yield
    # The loop may end after the block.
    await until(idle.is_set)


@contextmanager
def no_steps(engine: ServingEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the block no step begins."""
    runner, gate, arrived = engine.runners["generate"], threading.Event(), threading.Event()
    step = runner.step

    def gated() -> bool:
        arrived.set()
        assert gate.wait(30)
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(runner, "step", gated)
        runner._wake.set()
        assert arrived.wait(30)
        try:
            yield
        finally:
            gate.set()


def always(decoder: FrozenBase, letter: str, **fields: Any) -> GenerateParams:
    """An answer of this letter alone."""
    (token,) = decoder.tokenizer(letter)["input_ids"]
    return GenerateParams(prompt="x", max_new_tokens=200, logit_bias={token: 100.0}, **fields)


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

    def counted(runs_static: Callable[[StepPlan], bool]) -> StepPlan | None:
        step = plan(runs_static)
        if step is not None:
            computed.extend(count for _, count in step.chunks)
            # A prompt's last token, where it was left alone.
            computed.extend(1 for request in step.decodes if not request.generated)
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


@pytest.mark.parametrize("prompts", [1, 3])
def test_answers_that_cannot_start_in_time_are_refused_together(
    prompts: int, decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(decoder, adapters, request_timeout_s=0.05)

    async def main() -> None:
        with no_steps(engine, monkeypatch), pytest.raises(Overloaded, match="not started within"):
            await engine.generate_prompts([GenerateParams(prompt="x", n=4)] * prompts, acting_for(None))
        await settled(engine)

    asyncio.run(main())


def test_a_stop_string_ends_the_first_answers_before_the_last_ones_start(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two rows for six answers.
    engine = start_engine(decoder, adapters, max_sequences=2)

    async def main() -> None:
        async with readers_keep_up(engine, monkeypatch):
            streams = await choices(engine, always(decoder, "a", stop=["aa"], n=6))
            # The call returned before they had rows.
            assert [stream.has_started for stream in streams[2:]] == [False] * 4
            results = await asyncio.gather(*(stream.collect() for stream in streams))
            await settled(engine)
        assert [(result.completion_tokens, result.stop_reason) for result in results] == [(2, "aa")] * 6
        # A step may have begun when the stop string was found.
        assert max(stream.request.generated for stream in streams) <= 3

    asyncio.run(main())


def test_the_answers_to_several_prompts_are_read_while_the_others_wait(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(decoder, adapters, max_sequences=2)
    asked = [GenerateParams(adapter="a/writer", prompt=prompt, max_new_tokens=4, n=2) for prompt in ("ab", "cd", "ef")]

    async def main() -> None:
        want = [result for params in asked for result in await collected(engine, **vars(params))]
        submitted: list[GenerationStream] = []
        async with readers_keep_up(engine, monkeypatch):
            streams = await engine.generate_prompts(asked, acting_for("a/writer"), None, submitted.extend)
            assert submitted == streams
            assert [stream.has_started for stream in streams[2:]] == [False] * 4
            results = await asyncio.gather(*(stream.collect() for stream in streams))
        assert [result.token_ids for result in results] == [result.token_ids for result in want]
        await settled(engine)

    asyncio.run(main())


def test_who_submits_hears_of_the_streams_before_they_run(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(decoder, adapters)
    heard: list[GenerationStream] = []

    async def main() -> None:
        with no_steps(engine, monkeypatch):
            params = GenerateParams(prompt="x", n=3, max_new_tokens=2)
            task = asyncio.ensure_future(engine.generate_choices(params, acting_for(None), None, heard.extend))
            await until(lambda: len(heard) == 3)
            assert not any(stream.has_started or stream.computed_tokens for stream in heard)
        for stream in await task:
            await stream.collect()
        await settled(engine)

    asyncio.run(main())


@pytest.mark.parametrize("prompt", ["x", PROMPT])
def test_a_call_whose_streams_are_all_closed_before_one_runs_returns_at_once(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    engine = start_engine(decoder, adapters)
    heard: list[GenerationStream] = []

    async def main() -> None:
        with no_steps(engine, monkeypatch):
            params = GenerateParams(prompt=prompt, n=3, max_new_tokens=2, timeout_s=300)
            task = asyncio.ensure_future(engine.generate_choices(params, acting_for(None), None, heard.extend))
            await until(lambda: len(heard) == 3)
            for stream in heard:
                assert not task.done()
                await stream.aclose()
            await until(task.done)
        assert task.result() == heard
        for stream in heard:
            assert stream.result is None and [delta async for delta in stream] == []
            assert stream._deadline is None, "a timer holds a closed stream"
            with pytest.raises(EngineUnavailable, match="closed before it finished"):
                await stream.collect()
        await settled(engine)

    asyncio.run(main())


def test_a_later_answer_tells_why_it_was_refused(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(decoder, adapters, max_sequences=2)
    refusal = TenantOverloaded("more than its share; send it again later", param="adapter", retry_after=9)

    async def main() -> None:
        async with readers_keep_up(engine, monkeypatch):
            streams = await choices(engine, always(decoder, "a", n=3))
            assert engine.runners["generate"].scheduler.shed(streams[2].request.tenant, refusal)
            with pytest.raises(TenantOverloaded, match=r"^more than its share"):
                await streams[2].collect()
            assert engine.in_flight() == 2
            for stream in streams:
                await stream.aclose()
        await settled(engine)

    asyncio.run(main())


def test_more_answers_than_a_tenant_may_have_in_flight_are_named(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start
) -> None:
    engine = start_engine(decoder, adapters, max_queue_per_tenant=8)

    async def main() -> None:
        asked = GenerateParams(prompt="x", max_new_tokens=2, n=2)
        for principal, most in ((Principal("t"), 8), (Principal("t", max_in_flight=3), 3)):
            with pytest.raises(InvalidRequest, match=f"^5 prompts with n 2 make 10 answers; ask for at most {most}$"):
                await engine.generate_prompts([asked] * 5, principal)
        streams = await engine.generate_prompts([asked] * 4, Principal("t"))
        assert [(await stream.collect()).completion_tokens for stream in streams] == [2] * 8
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
        for stream in await task:
            with pytest.raises(EngineUnavailable, match="stopping"):
                await stream.collect()
        assert engine.in_flight() == 0

    asyncio.run(main())


def test_one_that_was_closed_is_not_queued(decoder: FrozenBase, adapters: AdapterStore, start_engine: Start) -> None:
    scheduler = start_engine(decoder, adapters).runners["generate"].scheduler
    closed = GenerationRequest(principal=acting_for(None), tokens=[1])
    assert scheduler.cancel(closed, FinishReason.CANCELLED)
    scheduler.submit([closed])
    assert scheduler.waiting() == 0
    scheduler.check_invariants()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("reads", [True, False])
def test_an_answer_is_gone_once_nobody_reads_it(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start, n: int, reads: bool
) -> None:
    engine = start_engine(decoder, store)

    async def main() -> None:
        # What a step of the engine still refers to goes with the next one.
        params = GenerateParams(prompt=PROMPT, n=n, max_new_tokens=20, logprobs=3, ignore_eos=True)
        streams = await choices(engine, params)
        requests = [weakref.ref(stream.request) for stream in streams]
        for stream in streams:
            if reads:
                await stream.collect()
            else:
                await stream.aclose()
        del stream, streams
        await settled(engine)
        await collected(engine, prompt="another one", max_new_tokens=2)
        await until(lambda: not any(request() for request in requests))

    with no_collection():
        asyncio.run(main())
