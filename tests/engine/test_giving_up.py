"""Cancelling and deadlines, on a real engine."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from gated_store import GatedStore, Start, collect, settled, until

from sera_serve.base import FrozenBase
from sera_serve.engine import GenerateParams, GenerationStream
from sera_serve.engine.detokenizer import Detokenizer
from sera_serve.engine.sequences import SequenceUpdate
from sera_serve.errors import DeadlineExceeded, Overloaded
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
            holder = await engine.generate(GenerateParams(prompt="x", max_new_tokens=250))
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
                await engine.generate(GenerateParams(prompt="x", max_new_tokens=1))
            else:
                gated.gate = threading.Event()
            with pytest.raises(error):
                await collect(engine, adapter="a/writer", prompt="x", **params)
            if stage == "loading":
                with pytest.raises(error):
                    await engine.classify("a/labels", ["x"] * 300, timeout_s=params.get("timeout_s"))
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
        stream = await engine.generate(
            GenerateParams(adapter="a/writer", prompt="x", max_new_tokens=250, timeout_s=0.3)
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
        assert 5 * reads <= len(seen) < 250
        assert stream.result is None
        whole = await collect(engine, adapter="a/writer", prompt="x", max_new_tokens=250, timeout_s=60)
        assert whole.token_ids[: len(seen)] == seen

    asyncio.run(main())


def test_a_slow_reader_holds_the_tokens_and_nothing_else(decoder: FrozenBase) -> None:
    prompt = decoder.tokenizer("hello")["input_ids"]
    tokens = greedy(decoder, prompt, 30)

    async def main() -> None:
        cancelled: list[bool] = []
        detokenizer = Detokenizer(decoder.tokenizer, prompt, [])
        cancel = lambda: cancelled.append(True)  # noqa: E731
        stream = GenerationStream("g", None, None, 5, frozenset(), detokenizer, cancel)
        stream.deliver(SequenceUpdate("g", tokens[:1], ended=False))
        assert (await anext(stream)).token_ids == tokens[:1]
        for count in range(2, 31):
            stream.deliver(SequenceUpdate("g", tokens[:count], ended=count == 30))
        deltas = [delta async for delta in stream]
        assert [delta.token_ids for delta in deltas] == [tokens[1:]]
        assert stream.result is not None and stream.result.token_ids == tokens
        assert not cancelled

    asyncio.run(main())


def test_cancelling_a_classification_takes_its_waiting_parts_back(
    gated: GatedStore, decoder: FrozenBase, start_engine: Start
) -> None:
    engine = start_engine(decoder, gated, classify_max_batch=4)

    async def main() -> None:
        with standstill():
            task = asyncio.ensure_future(engine.classify("a/labels", ["some text"] * 400))
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
            await engine.classify("a/labels", ["some text"] * 400, timeout_s=0.2)
        await settled(engine)

    asyncio.run(main())
