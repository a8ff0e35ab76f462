"""Limits, fairness and priorities, on a real engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sera_serve.base import FrozenBase
from sera_serve.engine import ClassifyResult, GenerateParams, GenerationResult
from sera_serve.errors import TenantOverloaded
from support.engine import GatedStore, Start, classify, collect, generate, settled, until
from support.factories import greedy, merged
from support.standstill import standstill


def test_limits_of_a_tenant_and_of_all(gated: GatedStore, decoder: FrozenBase, start_engine: Start) -> None:
    engine = start_engine(decoder, gated, max_queue=5, max_queue_per_tenant=3, max_sequences=1)

    async def main() -> None:
        with standstill():
            flood = [asyncio.ensure_future(collect(engine, adapter="a/writer", prompt="x")) for _ in range(3)]
            await until(lambda: engine.running() + engine.waiting() == 3)
            for refused in (collect(engine, adapter="a/writer", prompt="x"), classify(engine, "a/labels", ["x"])):
                with pytest.raises(TenantOverloaded) as refusal:
                    await refused
                assert refusal.value.retry_after >= 1
            others = [asyncio.ensure_future(collect(engine, adapter="b/writer", prompt="x")) for _ in range(2)]
            await until(lambda: engine.running() + engine.waiting() == 5)
            # The server is full: who has none comes in for one that waits of the tenant with three.
            others.append(asyncio.ensure_future(collect(engine, prompt="x")))
            await until(lambda: any(task.done() for task in flood))
            assert engine.in_flight() == 5
        answers = await asyncio.gather(*flood, return_exceptions=True)
        assert sorted(type(answer).__name__ for answer in answers) == ["GenerationResult"] * 2 + ["TenantOverloaded"]
        await asyncio.gather(*others)
        await settled(engine)

    asyncio.run(main())


def test_a_flood_does_not_hold_back_another_tenant(gated: GatedStore, decoder: FrozenBase, start_engine: Start) -> None:
    engine = start_engine(decoder, gated, max_sequences=2)
    order: list[str] = []

    async def ask(adapter: str | None, name: str, **params: Any) -> None:
        await collect(engine, adapter=adapter, prompt="hello", max_new_tokens=8, **params)
        order.append(name)

    async def main() -> None:
        flood = [asyncio.ensure_future(ask("a/writer", "flood", priority="high")) for _ in range(40)]
        await until(lambda: engine.waiting() > 20)
        await asyncio.gather(*flood, ask("b/writer", "b", priority="low"), ask(None, "base_only"))

    asyncio.run(main())
    assert max(order.index("b"), order.index("base_only")) < 15
    assert len(order) == 42


def test_weights_of_tenants_are_kept(gated: GatedStore, decoder: FrozenBase, start_engine: Start) -> None:
    engine = start_engine(decoder, gated, max_sequences=1, tenant_weights={"a": 4.0})
    order: list[str] = []

    async def ask(tenant: str) -> None:
        await collect(engine, adapter=f"{tenant}/writer", prompt="hello", max_new_tokens=4)
        order.append(tenant)

    async def main() -> None:
        with standstill():
            tasks = [asyncio.ensure_future(ask(tenant)) for tenant in "ab" * 12]
            await until(lambda: engine.waiting() + engine.running() == 24)
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert 10 <= order[:15].count("a") <= 13


def test_priority_orders_one_tenants_requests(gated: GatedStore, decoder: FrozenBase, start_engine: Start) -> None:
    engine = start_engine(decoder, gated, max_sequences=1)
    order: list[str] = []

    async def ask(priority: Any) -> None:
        await collect(engine, prompt="hello", max_new_tokens=2, priority=priority)
        order.append(priority)

    async def main() -> None:
        running = await generate(engine, GenerateParams(prompt="x", max_new_tokens=250))
        tasks = [asyncio.ensure_future(ask(priority)) for priority in ("low", "normal", "high", "low", "high")]
        await until(lambda: engine.waiting() == 5)
        await running.aclose()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert order == ["high", "high", "normal", "low", "low"]


def test_a_large_classification_lets_others_in_between(
    gated: GatedStore, decoder: FrozenBase, start_engine: Start
) -> None:
    engine = start_engine(decoder, gated, classify_max_batch=4)
    order: list[str] = []

    async def ask(adapter: str, inputs: list[str]) -> ClassifyResult:
        result = await classify(engine, adapter, inputs)
        order.append(adapter)
        return result

    async def main() -> None:
        with standstill():
            large = asyncio.ensure_future(ask("a/labels", ["some text"] * 400))
            # Four passes' worth of rows are in the batch, and its thread has taken one of them.
            await until(lambda: engine.waiting() == 96 and engine.running() == 4)
            small = asyncio.ensure_future(ask("b/labels", ["some text"]))
            await until(lambda: engine.waiting() == 97)
        await small
        assert order == ["b/labels"]
        assert engine.waiting() > 80, "it came in after the rows that were in the batch"
        assert len((await large).results) == 400
        await settled(engine)

    asyncio.run(main())


def test_rows_of_all_lengths_and_tenants_get_their_own_scores(
    gated: GatedStore, decoder: FrozenBase, start_engine: Start
) -> None:
    engine = start_engine(decoder, gated, classify_max_batch=4, max_batch_tokens=64, classify_max_wait_ms=0)
    inputs = ["x" * (1 + 37 * i % 90) + str(i) for i in range(40)]

    async def main() -> None:
        results = await asyncio.gather(*(classify(engine, f"{tenant}/labels", inputs) for tenant in ("a", "b")))
        for tenant, result in zip(("a", "b"), results, strict=True):
            assert len(result.results) == 40
            for i in (0, 7, 39):
                alone = await classify(engine, f"{tenant}/labels", [inputs[i]])
                assert result.results[i].probabilities == pytest.approx(alone.results[0].probabilities, abs=1e-4)
        await settled(engine)

    asyncio.run(main())


def test_many_prompts_are_tokenized_at_once_by_long_and_short_ways(
    gated: GatedStore, decoder: FrozenBase, start_engine: Start
) -> None:
    base = decoder.share_weights()
    base.tokenizer.model_max_length = base.model.config.max_position_embeddings = 8192
    engine = start_engine(base, gated, kv_cache_tokens=16384)

    async def main() -> None:
        long = "long " * 1000
        answers = await asyncio.gather(
            *(collect(engine, prompt=long, max_new_tokens=1) for _ in range(3)),
            *(collect(engine, prompt="short", max_new_tokens=1) for _ in range(10)),
            *(classify(engine, "a/labels", ["text " * 100] * 50) for _ in range(3)),
        )
        assert [a.prompt_tokens for a in answers if isinstance(a, GenerationResult)] == [5000] * 3 + [5] * 10

    asyncio.run(main())


def test_answers_under_little_cache_are_each_alone(gated: GatedStore, decoder: FrozenBase, start_engine: Start) -> None:
    """Four pages for twelve requests of two pages each: they enter with one, and some are preempted."""
    engine = start_engine(decoder, gated, kv_cache_tokens=128, max_batch_tokens=32)
    bundle = gated.load(gated.resolve("a/writer").digest)
    expected = greedy(merged(decoder, bundle), decoder.tokenizer("x" * 20)["input_ids"], 30)
    most = 0

    async def main() -> None:
        nonlocal most
        tasks = [
            asyncio.ensure_future(collect(engine, adapter="a/writer", prompt="x" * 20, max_new_tokens=30))
            for _ in range(12)
        ]
        while not all(task.done() for task in tasks):
            most = max(most, engine.running())
            await asyncio.sleep(0.001)
        for task in tasks:
            assert task.result().token_ids == expected
        await settled(engine)

    asyncio.run(main())
    assert most > 2, "by the worst case, two would run at a time"
    assert engine.loads()["generate"].preemptions > 0


def test_a_request_that_asks_for_the_whole_context_keeps_no_other_out(
    gated: GatedStore, decoder: FrozenBase, start_engine: Start
) -> None:
    engine = start_engine(decoder, gated, kv_cache_tokens=512)
    most = 0

    async def main() -> None:
        nonlocal most
        streams = await asyncio.gather(
            *(generate(engine, GenerateParams(prompt="x" * 20, max_new_tokens=230)) for _ in range(12))
        )
        for stream in streams:
            await anext(stream)
            most = max(most, engine.running())
        for stream in streams:
            await stream.aclose()
        await settled(engine)

    asyncio.run(main())
    assert most == 12, "by the worst case, two would run at a time"
