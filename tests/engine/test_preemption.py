"""Too few pages for all: requests are preempted and computed again, and nobody can tell from what they are given."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import GenerateParams, GenerationResult, ServingEngine, TokenDelta
from sera_serve.engine.fair_queue import OUTPUT_WEIGHT, PROMPT_WEIGHT, FairQueue
from sera_serve.engine.request import FinishReason, GenerationRequest
from support.engine import SHAPE, Start, collect, generate, settled
from support.factories import greedy, random_adapter

# Eight pages of 32 tokens, for requests of one page that grow to two or three.
FEW_PAGES = 256
NEW_TOKENS = 44
ADAPTERS = ["a/one", "a/two", "b/one", None]


def requests(count: int = 12) -> list[GenerateParams]:
    """Of the base and of three adapters, greedy and sampled, with and without log-probabilities."""
    sampling: list[dict[str, Any]] = [{}, {"temperature": 1.0, "top_k": 50, "top_p": 0.9}]
    return [
        GenerateParams(
            adapter=ADAPTERS[number % 4],
            prompt=f"{number} " + "sail on " * (number % 5),
            max_new_tokens=NEW_TOKENS,
            seed=number,
            logprobs=2 if number % 3 == 0 else None,
            prompt_logprobs=0 if number % 5 == 0 else None,
            **sampling[number // 2 % 2],
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def adapters(decoder: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    store = AdapterStore(tmp_path_factory.mktemp("preemption") / "store")
    for seed, name in enumerate(filter(None, ADAPTERS)):
        store.publish(random_adapter(decoder, SHAPE, seed), name)
    return store


@pytest.fixture(scope="module")
def alone(decoder: FrozenBase, adapters: AdapterStore) -> list[GenerationResult]:
    """What each request gives where it is the only one, and has room."""
    engine = ServingEngine(decoder, adapters, ServeSettings(pool_mib=8, kv_cache_tokens=8192))
    engine.start()

    async def one_by_one() -> list[GenerationResult]:
        return [await collected(engine, params) for params in requests()]

    results = asyncio.run(one_by_one())
    engine.stop()
    assert engine.loads()["generate"].preemptions == 0
    assert len({tuple(result.token_ids) for result in results}) == len(results)
    for result, params in zip(results, requests(), strict=True):
        if params.adapter is None and params.temperature == 0:
            assert result.token_ids == greedy(decoder, decoder.tokenizer(params.prompt)["input_ids"], NEW_TOKENS)
    return results


async def collected(engine: ServingEngine, params: GenerateParams) -> GenerationResult:
    return await (await generate(engine, params)).collect()


async def exhaust(engine: ServingEngine, params: GenerateParams) -> tuple[list[TokenDelta], GenerationResult]:
    stream = await generate(engine, params)
    deltas = [delta async for delta in stream]
    assert stream.result is not None
    return deltas, stream.result


def check_same(got: GenerationResult, want: GenerationResult) -> None:
    assert got.token_ids == want.token_ids and got.text == want.text
    assert (got.prompt_tokens, got.completion_tokens) == (want.prompt_tokens, want.completion_tokens)
    for mine, its in ((got.logprobs, want.logprobs), (got.prompt_logprobs, want.prompt_logprobs)):
        assert [one.token for one in mine] == [one.token for one in its]
        # Another batch adds in another order: float32 rounding over two layers, far below any two tokens' distance.
        assert [one.logprob for one in mine] == pytest.approx([one.logprob for one in its], abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="few pages"),
        pytest.param({"max_batch_tokens": 20}, id="and chunked prefill"),
        # The adapter of a preempted request may leave the device before it runs again.
        pytest.param({"max_resident": 2, "host_cache_mib": 0}, id="and few slots"),
    ],
)
def test_streams_are_what_each_gives_alone(
    settings: dict[str, int],
    decoder: FrozenBase,
    adapters: AdapterStore,
    alone: list[GenerationResult],
    start_engine: Start,
) -> None:
    engine = start_engine(decoder, adapters, kv_cache_tokens=FEW_PAGES, **settings)

    async def together() -> list[tuple[list[TokenDelta], GenerationResult]]:
        outcomes = await asyncio.gather(*(exhaust(engine, params) for params in requests()))
        await settled(engine)
        return outcomes

    outcomes = asyncio.run(together())
    assert engine.runners["generate"] is not None and engine.runners["generate"].load().preemptions > 0
    for (deltas, result), want, params in zip(outcomes, alone, requests(), strict=True):
        check_same(result, want)
        assert result.completion_tokens == len(result.token_ids)
        assert result.finish_reason == "stop" or result.completion_tokens == NEW_TOKENS
        # No gap, no repeat: the deltas are the result.
        assert [token for delta in deltas for token in delta.token_ids] == result.token_ids
        assert "".join(delta.text for delta in deltas) == result.text
        assert tuple(one for delta in deltas for one in delta.logprobs) == result.logprobs
        assert len(result.logprobs) == (result.completion_tokens if params.logprobs is not None else 0)
        assert len(result.prompt_logprobs) == (result.prompt_tokens if params.prompt_logprobs is not None else 0)


def test_served_tokens_are_charged_once(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    charged: Counter[str] = Counter()
    charge = FairQueue._charge

    def noted(self: FairQueue[GenerationRequest], tenant: str, cost: float) -> None:
        charged[tenant] += cost
        charge(self, tenant, cost)

    monkeypatch.setattr(FairQueue, "_charge", noted)
    # In chunks: a step of a prompt that gives no token yet is not charged either.
    engine = start_engine(decoder, adapters, kv_cache_tokens=FEW_PAGES, max_batch_tokens=20)

    async def main() -> list[GenerationResult]:
        results = await asyncio.gather(*(collected(engine, params) for params in requests()))
        await settled(engine)
        return results

    served: Counter[str] = Counter()
    for result in asyncio.run(main()):
        tenant = "_base" if result.adapter is None else result.adapter.split("/")[0]
        served[tenant] += PROMPT_WEIGHT * result.prompt_tokens + OUTPUT_WEIGHT * result.completion_tokens
    assert engine.loads()["generate"].preemptions > 0
    assert charged == served


def test_the_counter_of_the_only_tenant_is_what_it_was_served(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    engine = start_engine(decoder, store, kv_cache_tokens=FEW_PAGES)

    async def main() -> list[GenerationResult]:
        prompts = ["x" * (10 + number) for number in range(10)]
        return await asyncio.gather(*(collect(engine, prompt=p, max_new_tokens=NEW_TOKENS) for p in prompts))

    results = asyncio.run(main())
    assert engine.runners["generate"] is not None and engine.runners["generate"].load().preemptions > 0
    served = sum(r.prompt_tokens * PROMPT_WEIGHT + r.completion_tokens * OUTPUT_WEIGHT for r in results)
    assert engine.runners["generate"].scheduler.counter("_base") == served


@pytest.mark.parametrize("seed", range(2))
def test_cancelled_at_random_moments_beside_others(
    seed: int, decoder: FrozenBase, adapters: AdapterStore, alone: list[GenerationResult], start_engine: Start
) -> None:
    dice = random.Random(seed)
    engine = start_engine(decoder, adapters, kv_cache_tokens=FEW_PAGES, max_batch_tokens=24)
    states: Counter[str] = Counter()

    async def dropped(params: GenerateParams) -> None:
        if dice.random() < 0.3:
            task = asyncio.ensure_future(generate(engine, params))
            await asyncio.sleep(dice.random() * 0.1)
            task.cancel()
            states["before it ran"] += 1
            await asyncio.gather(task, return_exceptions=True)
            if not task.cancelled() and task.exception() is None:
                await task.result().aclose()
            return
        stream = await generate(engine, params)
        for _ in range(dice.randint(0, 30)):
            await anext(stream, None)
        states[stream.request.state.name] += 1
        await stream.aclose()
        await settle(stream.request)
        assert stream.request.finish_reason in (FinishReason.CANCELLED, FinishReason.LENGTH, FinishReason.STOP)

    async def settle(request: GenerationRequest) -> None:
        while not request.is_finished:
            await asyncio.sleep(0.001)

    async def main() -> list[GenerationResult]:
        keep = [asyncio.ensure_future(collected(engine, params)) for params in requests()]
        await asyncio.gather(*(dropped(dice.choice(requests())) for _ in range(16)))
        results = await asyncio.gather(*keep)
        await settled(engine)
        return results

    for got, want in zip(asyncio.run(main()), alone, strict=True):
        check_same(got, want)
    assert engine.loads()["generate"].preemptions > 0
    assert states["RUNNING"] + states["PREEMPTED"] > 0
