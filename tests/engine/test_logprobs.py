"""Log-probabilities are those of the model before temperature and noise, in whatever steps they were computed."""

from __future__ import annotations

import asyncio
import copy
import tracemalloc
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.engine import GenerateParams, GenerationResult, ServingEngine, TokenLogprobs
from sera_serve.engine.loop.choice import take_prompt_logprobs, token_logprobs
from sera_serve.engine.loop.hugging_face import PagedModel
from support.engine import SHAPE, Start, collect, generate, settled
from support.factories import merged, random_adapter
from support.plan_world import ask

# The same numbers in another order of addition: a float32 has 24 bits, a logit here is a sum of at most 128 products
# with sums of at most 128 below it, and the largest logits are about 30. 30 * 2**-24 * sqrt(128) is 2e-5; two layers
# and the merged weights' own rounding (the adapter is added in float64, then rounded) give a few times that.
ATOL = 2e-4
PROMPT = "The quick brown fox jumps over the lazy dog, and then it is over."
SAMPLED = {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "seed": 4}


@torch.no_grad()
def reference(base: FrozenBase, tokens: list[int]) -> Tensor:
    """Log-probabilities after each token, float64 (tokens, vocabulary), by one plain forward pass in float64."""
    model = copy.deepcopy(base.model).double()
    logprobs: Tensor = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return logprobs


def check(got: tuple[TokenLogprobs, ...], tokens: list[int], want: Tensor, top: int) -> None:
    """Compare what was returned for `tokens` with the rows of log-probabilities that came before each of them."""
    assert [one.token for one in got] == tokens
    for one, row in zip(got, want, strict=True):
        assert one.logprob == pytest.approx(row[one.token].item(), abs=ATOL)
        ids, values = [token for token, _ in one.top], [value for _, value in one.top]
        assert len(set(ids)) == top
        assert values == sorted(values, reverse=True)
        assert values == pytest.approx(row[ids].tolist(), abs=ATOL)
        assert values == pytest.approx(row.topk(top).values.tolist(), abs=ATOL)


def check_result(base: FrozenBase, prompt: str, result: GenerationResult, top: int, prompt_top: int | None) -> None:
    tokens = base.tokenizer(prompt)["input_ids"]
    want = reference(base, tokens + result.token_ids)
    check(result.logprobs, result.token_ids, want[len(tokens) - 1 : -1], top)
    if prompt_top is None:
        assert result.prompt_logprobs == ()
    else:
        first, *others = result.prompt_logprobs
        assert first == TokenLogprobs(tokens[0], None)
        check(tuple(others), tokens[1:], want[: len(tokens) - 1], prompt_top)


@pytest.fixture
def writer(decoder: FrozenBase, store: AdapterStore) -> FrozenBase:
    """The base with the adapter `a/writer` of the store merged into it."""
    bundle = random_adapter(decoder, SHAPE, 3, strength=0.5)
    store.publish(bundle, "a/writer")
    return merged(decoder, bundle)


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("adapter", [None, "a/writer"])
@pytest.mark.parametrize("chunk", [512, 7], ids=["whole", "chunked"])
def test_they_are_those_of_plain_forward_passes(
    chunk: int,
    adapter: str | None,
    sampling: dict[str, Any],
    decoder: FrozenBase,
    writer: FrozenBase,
    store: AdapterStore,
    start_engine: Start,
) -> None:
    engine = start_engine(decoder, store, max_batch_tokens=chunk)

    async def main() -> list[GenerationResult]:
        asked = {"adapter": adapter, "logprobs": 3, "max_new_tokens": 12, **sampling}
        return await asyncio.gather(
            collect(engine, prompt=PROMPT, prompt_logprobs=2, **asked),
            # Beside others, whose rows of logits lie between.
            collect(engine, prompt="other " * 4, **asked),
            collect(engine, prompt="x", prompt_logprobs=0, **asked),
            collect(engine, prompt="nothing asked"),
        )

    first, second, third, fourth = asyncio.run(main())
    model = decoder if adapter is None else writer
    check_result(model, PROMPT, first, 3, 2)
    check_result(model, "other " * 4, second, 3, None)
    check_result(model, "x", third, 3, 0)
    assert fourth.logprobs == fourth.prompt_logprobs == ()


def test_asking_changes_no_token(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    engine = start_engine(decoder, store)

    async def main() -> list[GenerationResult]:
        options: list[dict[str, Any]] = [{}, {"logprobs": 0}, {"prompt_logprobs": 1}]
        return [await collect(engine, prompt=PROMPT, **SAMPLED, **one) for one in options]  # type: ignore[arg-type]

    results = asyncio.run(main())
    assert len({tuple(result.token_ids) for result in results}) == 1
    assert all(one.top == () for one in results[1].logprobs), "0 is the token's own alone"


def test_more_than_the_vocabulary_is_the_vocabulary(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    engine = start_engine(decoder, store)
    (one,) = asyncio.run(collect(engine, prompt="x", logprobs=1000, max_new_tokens=1)).logprobs
    assert len(one.top) == 259
    assert sum(torch.tensor([value for _, value in one.top]).exp().tolist()) == pytest.approx(1, abs=1e-5)
    assert next(iter(one.top)) == (one.token, one.logprob), "greedy takes the likeliest"


@pytest.mark.parametrize("chunk", [512, 16], ids=["whole", "chunked"])
def test_a_prompt_in_the_prefix_cache_gets_them_all(
    chunk: int, decoder: FrozenBase, writer: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    engine = start_engine(decoder, store, max_batch_tokens=chunk)

    async def main() -> list[GenerationResult]:
        options = [{}, {"prompt_logprobs": 1}, {}]
        asked = {"adapter": "a/writer", "prompt": PROMPT, "logprobs": 1, "max_new_tokens": 4}
        return [await collect(engine, **asked, **one) for one in options]  # type: ignore[arg-type]

    results = asyncio.run(main())
    # Pages that are found are not computed, and have no log-probabilities.
    assert [result.cached_tokens for result in results] == [0, 0, 64]
    for result, prompt_top in zip(results, (None, 1, None), strict=True):
        check_result(writer, PROMPT, result, 1, prompt_top)


@pytest.mark.parametrize("chunk", [512, 16], ids=["whole", "chunked"])
def test_they_go_on_across_a_preemption(
    chunk: int, decoder: FrozenBase, writer: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    engine = start_engine(decoder, store, kv_cache_tokens=192, max_batch_tokens=chunk)
    prompts = [f"{number} " + "sail on, " * (number % 4) for number in range(9)]

    async def main() -> list[GenerationResult]:
        asked = {"adapter": "a/writer", "logprobs": 2, "prompt_logprobs": 1, "max_new_tokens": 40}
        results = await asyncio.gather(*(collect(engine, prompt=prompt, **asked) for prompt in prompts))
        await settled(engine)
        return results

    results = asyncio.run(main())
    assert engine.runners["generate"] is not None and engine.runners["generate"].load().preemptions > 0
    for prompt, result in zip(prompts, results, strict=True):
        check_result(writer, prompt, result, 2, 1)


def test_deltas_have_those_of_their_tokens(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    engine = start_engine(decoder, store)

    async def stream_of(engine: ServingEngine, stop: list[str]) -> GenerationResult:
        stream = await generate(engine, GenerateParams(prompt="hello", logprobs=1, max_new_tokens=30, stop=stop))
        pairs = [(delta.token_ids, delta.logprobs) async for delta in stream]
        result = stream.result
        assert result is not None
        for tokens, logprobs in pairs:
            assert [one.token for one in logprobs] == tokens
        assert tuple(one for _, logprobs in pairs for one in logprobs) == result.logprobs
        assert [one.token for one in result.logprobs] == result.token_ids
        return result

    async def main() -> None:
        whole = await stream_of(engine, [])
        printable = next(character for character in whole.text[5:] if character.isascii())
        cut = await stream_of(engine, [printable])
        assert cut.finish_reason == "stop" and 0 < len(cut.logprobs) < 30
        await settled(engine)

    asyncio.run(main())


def test_a_prompt_with_a_log_probability_that_is_not_finite_overflows() -> None:
    logits = torch.zeros(4, 9)
    logits[1, 3] = torch.inf
    overflowed: set[Any] = set()
    kept = take_prompt_logprobs(logits, [(request := ask("r", [1, 2, 3, 4]), 0, 4)], overflowed)
    assert overflowed == {request} and len(kept) == 1


def test_likely_tokens_take_little_memory_and_read_as_pairs() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    found = [one for one in token_logprobs(logits, [1, 2, 3], 20) if one is not None]
    values, ids = logits.log_softmax(1).topk(20)
    for row, one in enumerate(found):
        assert list(one.top) == list(zip(ids[row].tolist(), values[row].tolist(), strict=True))
        assert list(one.of_top(3).top) == list(one.top)[:3] and len(one.of_top(3).top) == 3
        assert one.of_top(0).top == ()
        assert one.of_top(21) is one
    tracemalloc.start()
    try:
        many = [token_logprobs(logits, [1, 2, 3], 20) for _ in range(100)]
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Of a pair 120 bytes.
    assert taken < 300 * 20 * 30
    assert len(many) == 100


def test_a_step_keeps_few_logits_of_prompts(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(decoder, store, max_sequences=4)
    kept: list[int] = []
    logits = PagedModel.logits

    def noted(model: PagedModel, *arguments: Any) -> Tensor:
        found = logits(model, *arguments)
        kept.append(len(found))
        return found

    monkeypatch.setattr(PagedModel, "logits", noted)
    # 203 tokens each, of the 512 that a step may have.
    prompts = [f"{number}{PROMPT * 3}" for number in range(3)]

    async def main() -> list[GenerationResult]:
        asked: dict[str, Any] = {"logprobs": 0, "prompt_logprobs": 1, "max_new_tokens": 2}
        return await asyncio.gather(*(collect(engine, prompt=prompt, **asked) for prompt in prompts))

    for prompt, result in zip(prompts, asyncio.run(main()), strict=True):
        check_result(decoder, prompt, result, 0, 1)
    assert max(kept) <= 64 + 3
