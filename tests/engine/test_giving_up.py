"""Cancelling and deadlines, on a real engine."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from adapters_store import AdapterStore
from adapters_store.errors import AdapterNotFound
from sera_serve.base import FrozenBase
from sera_serve.engine import BASE_PRINCIPAL, GenerateParams, GenerationStream
from sera_serve.engine.request import FinishReason, GenerationRequest, RequestState
from sera_serve.engine.results import TokenLogprobs
from sera_serve.engine.stream import Detokenizer, Mailbox
from sera_serve.errors import AdapterTooLarge, DeadlineExceeded, EngineUnavailable, Overloaded, TenantOverloaded
from support.engine import GatedStore, Start, classify, collect, generate, settled, until
from support.factories import greedy
from support.standstill import standstill


@pytest.mark.parametrize("stage", ["waiting", "loading", "running"])
def test_cancelling_at_each_stage_gives_everything_back(
    gated: GatedStore, decoder: FrozenBase, start_engine: Start, stage: str
) -> None:
    engine = start_engine(decoder, gated, max_sequences=1)

    async def main() -> None:
        holder: GenerationStream | None = None
        if stage == "waiting":
            holder = await generate(engine, GenerateParams(prompt="x", max_new_tokens=250))
        if stage == "loading":
            gated.gate = threading.Event()
        task = asyncio.ensure_future(collect(engine, adapter="a/writer", prompt="x", max_new_tokens=240))
        if stage == "running":
            await until(lambda: engine.running() == 1)
        else:
            await until(lambda: engine.waiting() == 1)
        if stage == "loading":
            await until(lambda: engine.residency.stats().loading == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.waiting() == 0
        if gated.gate is not None:
            gated.gate.set()
        if holder is not None:
            await holder.aclose()
        await settled(engine)
        assert (await collect(engine, adapter="a/writer", prompt="x", max_new_tokens=2)).completion_tokens == 2

    asyncio.run(main())


def test_a_generation_that_is_given_up_tells_what_it_used(
    store: AdapterStore, decoder: FrozenBase, start_engine: Start
) -> None:
    engine = start_engine(decoder, store)

    async def main() -> None:
        whole = await collect(engine, prompt="hello", max_new_tokens=3)
        stream = await generate(engine, GenerateParams(prompt="hello", max_new_tokens=200))
        await anext(stream)
        before = stream.tokens_used
        assert before.prompt == whole.prompt_tokens and before.cached_prompt == 0
        await anext(stream)
        await stream.aclose()
        await settled(engine)
        assert before.completion < stream.tokens_used.completion < 200

        stream = await generate(engine, GenerateParams(prompt="hello", max_new_tokens=3))
        result = await stream.collect()
        assert stream.tokens_used == (result.prompt_tokens, result.cached_tokens, result.completion_tokens)

    asyncio.run(main())


@pytest.mark.parametrize("stage", ["waiting", "loading"])
@pytest.mark.parametrize(
    ("settings", "params", "error"),
    [
        ({}, {"timeout_s": 0.1}, DeadlineExceeded),
        ({"request_timeout_s": 0.1}, {"timeout_s": 5}, Overloaded),
        ({"request_timeout_s": 0.1}, {}, Overloaded),
    ],
)
def test_a_wait_has_an_end(
    gated: GatedStore,
    decoder: FrozenBase,
    start_engine: Start,
    stage: str,
    settings: dict[str, Any],
    params: dict[str, Any],
    error: type[Exception],
) -> None:
    engine = start_engine(decoder, gated, max_sequences=1, **settings)

    async def main() -> None:
        with standstill():
            if stage == "waiting":
                await generate(engine, GenerateParams(prompt="x", max_new_tokens=1))
            else:
                gated.gate = threading.Event()
            with pytest.raises(error):
                await collect(engine, adapter="a/writer", prompt="x", **params)
            if stage == "loading":
                with pytest.raises(error):
                    await classify(engine, "a/labels", ["x"] * 300, timeout_s=params.get("timeout_s"))
            assert engine.waiting() == 0
        if gated.gate is not None:
            gated.gate.set()
        await settled(engine)

    asyncio.run(main())


@pytest.mark.parametrize("reads", [True, False])
def test_a_running_request_ends_at_its_deadline(
    gated: GatedStore, decoder: FrozenBase, start_engine: Start, reads: bool
) -> None:
    engine = start_engine(decoder, gated)

    async def main() -> None:
        stream = await generate(
            engine, GenerateParams(adapter="a/writer", prompt="x", max_new_tokens=250, timeout_s=0.3)
        )
        seen: list[int] = []
        while reads and len(seen) < 5:
            seen += (await anext(stream)).token_ids
        with standstill():
            await until(lambda: stream._expired)
        # Whether or not anybody reads.
        await settled(engine)
        with pytest.raises(DeadlineExceeded) as refusal:
            while True:
                seen += (await anext(stream)).token_ids
        assert (refusal.value.status, refusal.value.param) == (504, "timeout_s")
        # All that it got comes before the error.
        assert 5 * reads <= len(seen) == stream.request.generated < 250
        assert stream.result is None
        whole = await collect(engine, adapter="a/writer", prompt="x", max_new_tokens=250, timeout_s=60)
        assert whole.token_ids[: len(seen)] == seen

    asyncio.run(main())


def test_a_slow_reader_holds_the_tokens_and_nothing_else(decoder: FrozenBase) -> None:
    prompt = decoder.tokenizer("hello")["input_ids"]
    tokens = greedy(decoder, prompt, 30)

    async def main() -> None:
        cancelled: list[bool] = []
        request = GenerationRequest(principal=BASE_PRINCIPAL, tokens=list(prompt), prompt_tokens=5)
        detokenizer = Detokenizer(decoder.tokenizer, prompt, [])
        mailbox = Mailbox(asyncio.get_running_loop())
        stream = GenerationStream(request, detokenizer, mailbox, lambda reason: cancelled.append(True))
        request.move(RequestState.RUNNING)
        request.tokens.append(tokens[0])
        request.notify()
        assert (await anext(stream)).token_ids == tokens[:1]
        for token in tokens[1:]:
            request.tokens.append(token)
            request.notify()
        request.finish(FinishReason.LENGTH)
        request.notify()
        deltas = [delta async for delta in stream]
        assert [delta.token_ids for delta in deltas] == [tokens[1:]]
        assert stream.result is not None and stream.result.token_ids == tokens
        assert not cancelled

    asyncio.run(main())


def test_a_generation_that_is_shed_while_it_waits_again_is_refused_as_others_are(decoder: FrozenBase) -> None:
    async def main() -> None:
        request = GenerationRequest(principal=BASE_PRINCIPAL, tokens=[1], prompt_tokens=1)
        stream = GenerationStream(
            request, Detokenizer(decoder.tokenizer, [1], []), Mailbox(asyncio.get_running_loop()), lambda reason: None
        )
        request.started_at = 0.0
        request.move(RequestState.RUNNING)
        request.tokens.append(70)
        assert (await anext(stream)).token_ids == [70]
        request.move(RequestState.PREEMPTED)
        request.finish(FinishReason.SHED, TenantOverloaded("more than its share; send it again later", retry_after=7))
        with pytest.raises(TenantOverloaded, match=r"^more than its share; send it again later$") as refusal:
            await anext(stream)
        assert refusal.value.retry_after == 7
        # The two no longer hold each other, and nothing more comes.
        assert request.reader is None
        assert [delta async for delta in stream] == []

    asyncio.run(main())


def test_a_generation_that_others_cancel_ends_without_a_result(decoder: FrozenBase) -> None:
    async def main() -> None:
        request = GenerationRequest(principal=BASE_PRINCIPAL, tokens=[1], prompt_tokens=1)
        mailbox, told = Mailbox(asyncio.get_running_loop()), []
        stream = GenerationStream(request, Detokenizer(decoder.tokenizer, [1], []), mailbox, told.append)
        stream.end_at(asyncio.get_running_loop().time() + 60)
        request.move(RequestState.RUNNING)
        request.tokens.append(70)
        request.finish(FinishReason.CANCELLED)
        assert [delta async for delta in stream] == []
        assert (stream.result, request.reader, stream._deadline) == (None, None, None)
        with pytest.raises(EngineUnavailable, match="closed before it finished"):
            await stream.collect()
        assert told == []

    asyncio.run(main())


@pytest.mark.parametrize(
    "error", [AdapterNotFound("adapter a/b was deleted"), AdapterTooLarge("pinned"), OSError("disk")]
)
def test_a_generation_whose_adapter_is_gone_when_it_waits_again_is_refused_as_others_are(
    decoder: FrozenBase, error: Exception
) -> None:
    async def main() -> None:
        request = GenerationRequest(principal=BASE_PRINCIPAL, tokens=[1, 70], prompt_tokens=1)
        request.started_at = 0.0
        stream = GenerationStream(
            request, Detokenizer(decoder.tokenizer, [1], []), Mailbox(asyncio.get_running_loop()), lambda reason: None
        )
        for state in (RequestState.RUNNING, RequestState.PREEMPTED, RequestState.LOADING):
            request.move(state)
        request.finish(FinishReason.FAILED, error)
        with pytest.raises(type(error)) as refusal:
            await anext(stream)
        assert refusal.value is error

    asyncio.run(main())


def test_a_delta_for_a_slow_reader_is_bounded_with_its_log_probabilities(decoder: FrozenBase) -> None:
    async def main() -> None:
        request = GenerationRequest(
            principal=BASE_PRINCIPAL, tokens=[1], prompt_tokens=1, params=GenerateParams(logprobs=20)
        )
        detokenizer = Detokenizer(decoder.tokenizer, [1], [])
        stream = GenerationStream(request, detokenizer, Mailbox(asyncio.get_running_loop()), lambda reason: None)
        request.move(RequestState.RUNNING)
        tokens = [5 + number % 90 for number in range(300)]
        request.tokens += tokens
        request.token_logprobs += [TokenLogprobs(token, -1.0, ((token, -1.0),) * 20) for token in tokens]
        request.finish(FinishReason.LENGTH)
        deltas = [delta async for delta in stream]
        assert max(len(delta.token_ids) for delta in deltas) <= 48
        assert [token for delta in deltas for token in delta.token_ids] == tokens
        assert [one.token for delta in deltas for one in delta.logprobs] == tokens
        assert stream.result is not None and stream.result.token_ids == tokens

    asyncio.run(main())


def test_cancelling_a_classification_takes_its_waiting_parts_back(
    gated: GatedStore, decoder: FrozenBase, start_engine: Start
) -> None:
    engine = start_engine(decoder, gated, classify_max_batch=4)

    async def main() -> None:
        with standstill():
            task = asyncio.ensure_future(classify(engine, "a/labels", ["some text"] * 400))
            await until(lambda: engine.waiting() == 96)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert engine.waiting() == 0 and engine.in_flight() == 0
        await settled(engine)

    asyncio.run(main())


def test_a_classification_ends_at_its_deadline(gated: GatedStore, decoder: FrozenBase, start_engine: Start) -> None:
    engine = start_engine(decoder, gated, classify_max_batch=4)

    async def main() -> None:
        with standstill(), pytest.raises(DeadlineExceeded):
            await classify(engine, "a/labels", ["some text"] * 400, timeout_s=0.2)
        await settled(engine)

    asyncio.run(main())
