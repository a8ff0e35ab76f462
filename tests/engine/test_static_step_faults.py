"""What fails in a static step, or cannot be made static: who is told, and what goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.engine import GenerateParams, GenerationResult, ServingEngine
from sera_serve.engine.loop.captures import NotCaptured
from sera_serve.engine.loop.row_tables import DeviceRows
from sera_serve.engine.loop.static_step import StaticBatch, StaticLaunch
from sera_serve.errors import EngineUnavailable
from support.engine import Start, collect, generate, settled, until
from support.graph_recorder import SIZES, Replayed
from support.static_batches import ADAPTERS, BATCHES, all_at_once, ask

pytestmark = pytest.mark.usefixtures("memory_given_back")


class Replaying(Protocol):
    def __call__(
        self, batch: list[GenerateParams], *, late: bool = False
    ) -> tuple[list[list[int]], ServingEngine, Replayed]: ...


@pytest.fixture
def replaying(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, static_updates: Callable[[], None]
) -> Replaying:
    """Makes the tokens that a batch gets without graphs, and then an engine whose graphs are replayed."""

    def make(batch: list[GenerateParams], *, late: bool = False) -> tuple[list[list[int]], ServingEngine, Replayed]:
        want = [one.token_ids for one in asyncio.run(all_at_once(start_engine(decoder, adapters), batch))]
        static_updates()
        engine = start_engine(decoder, adapters, max_sequences=16)
        return want, engine, Replayed(engine, late=late)

    return make


def test_a_launch_that_fails_loses_no_page(
    replaying: Replaying,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A launch ahead is tried again after the step under way, and nobody is told."""
    batch = BATCHES["adapters"]
    want, engine, replayed = replaying(batch)
    launch, upload = replayed.launch, DeviceRows.upload
    failures, is_ahead = 0, False

    def noted(batch: StaticBatch, ahead: int) -> StaticLaunch:
        nonlocal is_ahead
        is_ahead = ahead > 0
        return launch(batch, ahead)

    def failing(self: DeviceRows, staged: Tensor) -> None:
        nonlocal failures
        if is_ahead and len(staged) and failures < 8:
            failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        upload(self, staged)

    replayed.launch = noted  # type: ignore[method-assign]
    monkeypatch.setattr(DeviceRows, "upload", failing)
    assert [one.token_ids for one in asyncio.run(all_at_once(engine, batch))] == want
    assert failures == 8


def test_steps_that_cannot_be_captured_run_packed_for_a_while(replaying: Replaying) -> None:
    """Nobody is told, and nothing else is computed."""
    batch = BATCHES["adapters"]
    want, engine, replayed = replaying(batch)
    launch = replayed.launch
    asked = calls = failures = 0
    # When a shape may run again, in questions for any.
    refused: dict[tuple[int, int], int] = {}

    def shape(batch: StaticBatch) -> tuple[int, int]:
        return len(batch.decodes), len(batch.prompts)

    def can_run(batch: StaticBatch) -> bool:
        nonlocal asked
        asked += 1
        return asked >= refused.get(shape(batch), 0)

    def sometimes_fails(batch: StaticBatch, ahead: int) -> StaticLaunch:
        nonlocal calls, failures
        calls += 1
        # Of two launches one after the other, the second one is often ahead.
        if calls % 5 in (1, 2):
            failures += 1
            refused[shape(batch)] = asked + 5
            raise NotCaptured
        return launch(batch, ahead)

    replayed.launch = sometimes_fails  # type: ignore[method-assign]
    replayed.can_run = can_run  # type: ignore[method-assign]
    assert [one.token_ids for one in asyncio.run(all_at_once(engine, batch))] == want
    assert failures > 1 and replayed.replays and replayed.ahead


@pytest.mark.slow
@pytest.mark.parametrize("odd", [0, 1])
def test_no_step_is_launched_ahead_that_would_run_packed(odd: int, replaying: Replaying) -> None:
    """When a request ends, the next step is of another size, which may be one that could not be captured."""
    batch = BATCHES["adapters"]
    want, engine, replayed = replaying(batch)
    replayed.can_run = lambda batch: len(batch.requests) % 2 == odd  # type: ignore[method-assign]
    assert [one.token_ids for one in asyncio.run(all_at_once(engine, batch))] == want
    assert replayed.batches


def test_the_packed_part_of_a_step_fails_alone(
    replaying: Replaying,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory is short for a long prompt; what a graph runs beside it is right, and has run."""
    batch = BATCHES["adapters"][:5]
    want, engine, replayed = replaying(batch)
    packed, beside = replayed.runner._run_packed, []

    def without_memory(decodes: Any, chunks: Any) -> Any:
        if any(len(request.tokens) > SIZES[-1] for request, _ in chunks):
            beside.append(len(replayed.batches))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 13 GiB")
        return packed(decodes, chunks)

    probe, probes, freed = replayed.runner.probe, [], []
    # It would raise if the device itself had failed.
    replayed.runner.probe = lambda: probes.append(True) or probe()  # type: ignore[method-assign, func-returns-value]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    replayed.runner._run_packed = without_memory  # type: ignore[method-assign]

    async def with_a_long_one() -> list[GenerationResult]:
        others = asyncio.ensure_future(all_at_once(engine, batch))
        await until(lambda: engine.running() == len(batch))
        with pytest.raises(EngineUnavailable, match="Tried to allocate 13 GiB; send the request again"):
            await collect(engine, prompt="x" * (SIZES[-1] + 1), max_new_tokens=3)
        return await others

    assert [one.token_ids for one in asyncio.run(with_a_long_one())] == want
    assert len(beside) == len(probes) == len(freed) == 1 and engine.failure() is None


@pytest.mark.slow
def test_a_failing_step_ends_the_step_launched_ahead_too(replaying: Replaying) -> None:
    batch = BATCHES["adapters"]
    want, engine, late = replaying(batch, late=True)
    launch = late.launch

    def failing(batch: StaticBatch, ahead: int) -> StaticLaunch:
        launched = launch(batch, ahead)

        def failed() -> list[int]:
            late.launch = launch  # type: ignore[method-assign]
            raise RuntimeError("an illegal memory access was encountered")

        return replace(launched, wait=failed) if late.ahead == 3 else launched

    late.launch = failing  # type: ignore[method-assign]

    async def ended() -> list[GenerationResult | BaseException]:
        async def one(params: GenerateParams) -> GenerationResult:
            return await (await generate(engine, params)).collect()

        results = await asyncio.gather(*map(one, batch), return_exceptions=True)
        await settled(engine)
        return results

    failures = [result for result in asyncio.run(ended()) if isinstance(result, BaseException)]
    assert failures and all(isinstance(failure, EngineUnavailable) for failure in failures)
    assert [one.token_ids for one in asyncio.run(all_at_once(engine, batch))] == want


@pytest.mark.parametrize("length", [1, 40])
def test_a_prompt_that_joined_ahead_outlives_the_failure_of_the_step_before(length: int, replaying: Replaying) -> None:
    newcomer = GenerateParams(token_ids=list(range(70, 70 + length)), max_new_tokens=6, adapter=ADAPTERS[0])
    (want,), engine, late = replaying([newcomer], late=True)
    launch = late.launch
    fails: list[bool] = []

    def failing(batch: StaticBatch, ahead: int) -> StaticLaunch:
        launched = launch(batch, ahead)
        if ahead and any(list(request.tokens) == newcomer.token_ids for request in batch.prompts):
            fails.append(True)

        def waited() -> list[int]:
            # By then the step after it has been launched.
            if fails == [True]:
                fails.append(False)
                raise RuntimeError("an illegal memory access was encountered")
            return launched.wait()

        return replace(launched, wait=waited)

    late.launch = failing  # type: ignore[method-assign]

    async def beside_others() -> tuple[GenerationResult, list[GenerationResult | BaseException]]:
        streams = [
            await generate(engine, ask(number, 200, adapter=ADAPTERS[number], ignore_eos=True)) for number in range(3)
        ]
        others = [asyncio.create_task(stream.collect()) for stream in streams]
        while late.ahead < 3:
            await asyncio.sleep(0.001)
        result = await (await generate(engine, newcomer)).collect()
        ended = await asyncio.gather(*others, return_exceptions=True)
        await settled(engine)
        return result, ended

    result, others = asyncio.run(beside_others())
    assert fails == [True, False] and all(isinstance(other, EngineUnavailable) for other in others)
    assert result.token_ids == want


def test_a_choice_that_fails_ends_its_own_requests(
    replaying: Replaying,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = BATCHES["adapters"][:4]
    want, engine, replayed = replaying(batch)

    def without_memory(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(replayed.runner.chooser, "_penalties", without_memory)

    async def with_a_penalty() -> list[GenerationResult]:
        others = asyncio.ensure_future(all_at_once(engine, batch))
        await until(lambda: engine.running() == len(batch))
        with pytest.raises(EngineUnavailable, match="Tried to allocate 3 GiB; send the request again"):
            await collect(engine, prompt="x", max_new_tokens=3, presence_penalty=1.0)
        return await others

    assert [one.token_ids for one in asyncio.run(with_a_penalty())] == want
    assert engine.failure() is None and replayed.chosen == 1
