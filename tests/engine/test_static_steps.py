"""The decode step on static buffers, recorded once for each key and replayed over other batches, as a graph is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig

from adapters_store import AdapterStore
from sera_kernels import ShapeClasses
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase, freeze_base
from sera_serve.engine import ConstraintSpec, GenerateParams, GenerationResult, ServingEngine
from sera_serve.engine.loop import runner
from sera_serve.engine.loop.captures import NotCaptured
from sera_serve.engine.loop.pages import PAGE_SIZE, SCRATCH
from sera_serve.engine.loop.plan import StepPlan
from sera_serve.engine.loop.row_tables import DeviceRows
from sera_serve.engine.loop.static_step import StaticBatch, StaticKey, StaticLaunch, StaticStep
from sera_serve.errors import EngineUnavailable
from sera_serve.layers import served_linear
from support.engine import Start, collect, generate, settled, until
from support.factories import byte_tokenizer, random_adapter, with_vectors
from support.graph_recorder import SIZES, Recording, Replayed, static_add_updates

pytestmark = pytest.mark.usefixtures("memory_given_back")
MAX_RANK = 16
SHAPES = [
    SeraConfig(16, 16, 8.0, "all-linear"),
    SeraConfig(8, 1, 8.0, ("q_proj", "v_proj"), use_mixer=False),
    SeraConfig(12, 4, 8.0, ("k_proj", "o_proj", "down_proj")),
]
ADAPTERS = [f"acme/a{number}" for number in range(6)]


def ask(number: int, new_tokens: int = 9, **options: Any) -> GenerateParams:
    """Prompts of 1 to 94 tokens."""
    prompt = "".join(chr(97 + (number + place * place) % 26) for place in range(1 + number * 7 % 94))
    return GenerateParams(prompt=prompt, max_new_tokens=new_tokens + number % 5, **options)


def limits(number: int) -> dict[str, Any]:
    choices: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9},
        {"temperature": 1.1, "top_k": 30},
        {"temperature": 1.0, "top_p": 0.8, "top_k": 90},
    ]
    return choices[number % 4]


# Their tokens are chosen by operations beside the step.
CHOSEN: list[dict[str, Any]] = [
    {"logprobs": 2},
    {"repetition_penalty": 1.4, "presence_penalty": 0.5, "temperature": 0.7, "seed": 3},
    {"logit_bias": {101: 4.0, 102: 3.5}, "frequency_penalty": 0.8, "logprobs": 0},
    {"constraint": ConstraintSpec("regex", "([a-f]{2} ?){1,9}"), "temperature": 1.0, "seed": 5, "top_k": 40},
    {"min_tokens": 7, "logprobs": 1},
]


def chosen(number: int) -> dict[str, Any]:
    """Every fourth one is plain."""
    return CHOSEN[number % 5] if number % 4 else {}


BATCHES: dict[str, list[GenerateParams]] = {
    "base": [ask(number) for number in range(7)],
    "adapters": [ask(number, 30, adapter=[*ADAPTERS, None][number % 7]) for number in range(14)],
    "fewer rows": [ask(number, adapter=ADAPTERS[-number]) for number in range(3)],
    "sampled": [ask(number, temperature=0.8, seed=number) for number in range(5)],
    "limited": [ask(number, adapter=ADAPTERS[number % 3], seed=number, **limits(number)) for number in range(11)],
    "chosen by the host": [
        ask(number, adapter=[*ADAPTERS, None][number % 7], **chosen(number)) for number in range(16)
    ],
    "adapters again": [ask(number, adapter=ADAPTERS[5 - number % 6]) for number in range(9)],
}


async def all_at_once(engine: ServingEngine, batch: list[GenerateParams]) -> list[GenerationResult]:
    async def one(params: GenerateParams) -> GenerationResult:
        return await (await generate(engine, params)).collect()

    results = await asyncio.gather(*map(one, batch))
    await settled(engine)
    return results


def run(engine: ServingEngine) -> dict[str, list[list[int]]]:
    return {
        name: [result.token_ids for result in asyncio.run(all_at_once(engine, batch))]
        for name, batch in BATCHES.items()
    }


@pytest.fixture
def adapters(decoder: FrozenBase, store: AdapterStore) -> AdapterStore:
    for seed, name in enumerate(ADAPTERS):
        bundle = random_adapter(decoder, SHAPES[seed % 3], seed, strength=0.5)
        # Two of them with vectors: in batches with others, without them, and in none.
        names = {1: ("q_proj", "v_proj"), 5: ("k_proj", "down_proj")}.get(seed, ())
        store.publish(with_vectors(bundle, gain=names, offset=names[:1], seed=seed), name)
    return store


@pytest.fixture
def static_updates(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have the serving layers compute adapters by torch operations: no mode sees what numba does."""
    return lambda: monkeypatch.setattr(served_linear, "add_updates", static_add_updates(MAX_RANK))


# Two slots for six adapters, and pages for half of the requests: rows, slots and pages change hands.
SMALL: dict[str, Any] = {"max_resident": 2, "host_cache_mib": 0, "kv_cache_tokens": 288}
with_room_and_without = pytest.mark.parametrize(
    "settings", [pytest.param({}, id="room"), pytest.param(SMALL, id="evicted and preempted")]
)


@pytest.mark.slow
@with_room_and_without
def test_replayed_steps_give_what_the_eager_loop_gives(
    settings: dict[str, int],
    decoder: FrozenBase,
    adapters: AdapterStore,
    start_engine: Start,
    static_updates: Callable[[], None],
) -> None:
    want = run(start_engine(decoder, adapters))
    static_updates()
    engine = start_engine(decoder, adapters, max_sequences=16, **settings)
    replayed = Replayed(engine)
    assert run(engine) == want
    replayed.check()
    assert replayed.replays > 30
    assert replayed.prompts > 10, "short prompts run in static steps too"
    assert replayed.chosen > 30
    assert any(key.tokens > key.requests for key in replayed.recordings)
    assert len({key for key in replayed.recordings if key.classes.width}) >= 2
    assert any(key.sampled and key.truncated for key in replayed.recordings)
    assert {key.classes.vectors for key in replayed.recordings if key.classes.width} == {False, True}
    assert len({row for batch in replayed.batches for _, row in batch}) > 4, "other rows than the recorded ones"
    assert not settings or engine.loads()["generate"].preemptions > 0


@pytest.mark.slow
@with_room_and_without
def test_steps_launched_ahead_of_a_late_device_give_the_same(
    settings: dict[str, int],
    decoder: FrozenBase,
    adapters: AdapterStore,
    start_engine: Start,
    static_updates: Callable[[], None],
) -> None:
    want = run(start_engine(decoder, adapters))
    static_updates()
    # A batch of 14 is padded to 16 tokens, which is more than there are rows.
    engine = start_engine(decoder, adapters, max_sequences=14, **settings)
    late = Replayed(engine, late=True)
    assert run(engine) == want
    assert late.ahead > 20 and late.joined > 5, "prompts too run in steps launched ahead"
    assert late.chosen > 30


@pytest.mark.slow
def test_what_ends_under_a_step_launched_ahead_is_given_back_after_it(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, static_updates: Callable[[], None]
) -> None:
    # Two slots: a lease that ends too early lets the next adapter overwrite what the device has yet to read.
    settings = {"max_sequences": 4, "max_resident": 2, "host_cache_mib": 0}
    stopping = [ask(number, 40, adapter=ADAPTERS[number % 6]) for number in range(18)]
    plain = [one.token_ids for one in asyncio.run(all_at_once(start_engine(decoder, adapters, **settings), stopping))]
    # Each ends by a stop string that it meets on its way, which no plan can foresee.
    stopping = [
        replace(params, stop=[decoder.tokenizer.decode(tokens[len(tokens) // 2 :][:3])])
        for params, tokens in zip(stopping, plain, strict=True)
    ]
    want = asyncio.run(all_at_once(start_engine(decoder, adapters, **settings), stopping))
    assert sum(one.finish_reason == "stop" for one in want) > 9
    static_updates()
    engine = start_engine(decoder, adapters, **settings)
    late = Replayed(engine, late=True)

    async def cancelled(params: GenerateParams, deltas: int) -> None:
        stream = await generate(engine, params)
        async for _ in stream:
            deltas -= 1
            if not deltas:
                break
        await stream.aclose()

    async def beside_cancelled() -> list[GenerationResult]:
        strangers = [cancelled(ask(number, 60, adapter=ADAPTERS[number % 6]), 1 + number % 7) for number in range(9)]
        results, _ = await asyncio.gather(all_at_once(engine, stopping), asyncio.gather(*strangers))
        await settled(engine)
        return results

    assert [one.text for one in asyncio.run(beside_cancelled())] == [one.text for one in want]
    assert late.ahead > 20


def test_a_launch_that_fails_loses_no_page(
    decoder: FrozenBase,
    adapters: AdapterStore,
    start_engine: Start,
    static_updates: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A launch ahead is tried again after the step under way, and nobody is told."""
    batch = BATCHES["adapters"]
    want = [one.token_ids for one in asyncio.run(all_at_once(start_engine(decoder, adapters), batch))]
    static_updates()
    engine = start_engine(decoder, adapters, max_sequences=16)
    replayed = Replayed(engine)
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


def test_steps_that_cannot_be_captured_run_packed_for_a_while(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, static_updates: Callable[[], None]
) -> None:
    """Nobody is told, and nothing else is computed."""
    batch = BATCHES["adapters"]
    want = [one.token_ids for one in asyncio.run(all_at_once(start_engine(decoder, adapters), batch))]
    static_updates()
    engine = start_engine(decoder, adapters, max_sequences=16)
    replayed = Replayed(engine)
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


@pytest.mark.parametrize("odd", [0, 1])
def test_no_step_is_launched_ahead_that_would_run_packed(
    odd: int, decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, static_updates: Callable[[], None]
) -> None:
    """When a request ends, the next step is of another size, which may be one that could not be captured."""
    batch = BATCHES["adapters"]
    want = [one.token_ids for one in asyncio.run(all_at_once(start_engine(decoder, adapters), batch))]
    static_updates()
    engine = start_engine(decoder, adapters, max_sequences=16)
    replayed = Replayed(engine)
    replayed.can_run = lambda batch: len(batch.requests) % 2 == odd  # type: ignore[method-assign]
    assert [one.token_ids for one in asyncio.run(all_at_once(engine, batch))] == want
    assert replayed.batches


def test_the_packed_part_of_a_step_fails_alone(
    decoder: FrozenBase,
    adapters: AdapterStore,
    start_engine: Start,
    static_updates: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory is short for a long prompt; what a graph runs beside it is right, and has run."""
    batch = BATCHES["adapters"][:5]
    want = [one.token_ids for one in asyncio.run(all_at_once(start_engine(decoder, adapters), batch))]
    static_updates()
    engine = start_engine(decoder, adapters, max_sequences=16)
    replayed = Replayed(engine)
    packed, beside = replayed.runner._run_packed, []

    def without_memory(decodes: Any, chunks: Any) -> Any:
        if any(len(request.tokens) > SIZES[-1] for request, _ in chunks):
            beside.append(len(replayed.batches))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 13 GiB")
        return packed(decodes, chunks)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    replayed.runner._run_packed = without_memory  # type: ignore[method-assign]

    async def with_a_long_one() -> list[GenerationResult]:
        others = asyncio.ensure_future(all_at_once(engine, batch))
        await until(lambda: engine.running() == len(batch))
        with pytest.raises(EngineUnavailable, match="Tried to allocate 13 GiB; send the request again"):
            await collect(engine, prompt="x" * (SIZES[-1] + 1), max_new_tokens=3)
        return await others

    assert [one.token_ids for one in asyncio.run(with_a_long_one())] == want
    assert len(beside) == 1 and engine.failure() is None


def test_a_failing_step_ends_the_step_launched_ahead_too(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, static_updates: Callable[[], None]
) -> None:
    batch = BATCHES["adapters"]
    want = [one.token_ids for one in asyncio.run(all_at_once(start_engine(decoder, adapters), batch))]
    static_updates()
    engine = start_engine(decoder, adapters, max_sequences=16)
    late = Replayed(engine, late=True)
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
def test_a_prompt_that_joined_ahead_outlives_the_failure_of_the_step_before(
    length: int, decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, static_updates: Callable[[], None]
) -> None:
    newcomer = GenerateParams(token_ids=list(range(70, 70 + length)), max_new_tokens=6, adapter=ADAPTERS[0])
    (want,) = asyncio.run(all_at_once(start_engine(decoder, adapters), [newcomer]))
    static_updates()
    engine = start_engine(decoder, adapters, max_sequences=16)
    late = Replayed(engine, late=True)
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
    assert result.token_ids == want.token_ids


@pytest.mark.slow
def test_a_pool_full_of_nan_changes_nothing(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, static_updates: Callable[[], None]
) -> None:
    batch = BATCHES["adapters"]
    want = [one.token_ids for one in asyncio.run(all_at_once(start_engine(decoder, adapters), batch))]
    static_updates()
    engine = start_engine(decoder, adapters, max_sequences=16, kv_cache_tokens=1024)
    replayed = Replayed(engine)
    for pages in replayed.runner.decoder.pool._stores.values():
        pages.fill_(float("nan"))
    for _ in range(2):
        assert [one.token_ids for one in asyncio.run(all_at_once(engine, batch))] == want
    assert replayed.replays > 10


@pytest.mark.parametrize("late", [False, True])
def test_tokens_that_the_host_chooses_are_chosen_from_the_logits_of_static_steps(
    late: bool,
    decoder: FrozenBase,
    adapters: AdapterStore,
    start_engine: Start,
    static_updates: Callable[[], None],
) -> None:
    """Nothing of such a request runs packed, its prompt neither, and others in its steps are as without it."""
    # All prompts fit one static step.
    batch = [replace(params, prompt=(params.prompt or "")[:5]) for params in BATCHES["chosen by the host"]]
    want = asyncio.run(all_at_once(start_engine(decoder, adapters), batch))
    static_updates()
    engine = start_engine(decoder, adapters, max_sequences=16)
    replayed = Replayed(engine, late=late)
    replayed.runner._run_packed = lambda *args: 1 / 0  # type: ignore[method-assign]
    got = asyncio.run(all_at_once(engine, batch))
    assert [one.token_ids for one in got] == [one.token_ids for one in want]
    for mine, its in zip(got, want, strict=True):
        assert [one.token for one in mine.logprobs] == [one.token for one in its.logprobs]
        for one, other in zip(mine.logprobs, its.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
    assert sum(bool(one.logprobs) for one in got) > 5
    assert replayed.prompts == len(batch) and replayed.chosen > 50
    replayed.check()


@pytest.mark.parametrize("late", [False, True])
def test_prompts_that_come_at_once_run_in_several_static_steps(
    late: bool,
    decoder: FrozenBase,
    adapters: AdapterStore,
    start_engine: Start,
    static_updates: Callable[[], None],
) -> None:
    """Each fits one beside all others' decodes, and all together are several times as long."""
    batch = [ask(number, adapter=[*ADAPTERS, None][number % 7]) for number in range(16)]
    batch = [replace(params, prompt=(params.prompt or "")[:80]) for params in batch]
    want = [one.token_ids for one in asyncio.run(all_at_once(start_engine(decoder, adapters), batch))]
    static_updates()
    engine = start_engine(decoder, adapters, max_sequences=16)
    replayed = Replayed(engine, late=late)
    replayed.runner._run_packed = lambda *args: 1 / 0  # type: ignore[method-assign]
    planner = engine.runners["generate"].planner
    plan, are_there = planner.plan, False

    def once_all_are_there(runs_static: Callable[[StepPlan], bool]) -> StepPlan | None:
        nonlocal are_there
        are_there = are_there or engine.loads()["generate"].waiting == len(batch)
        return plan(runs_static) if are_there else None

    planner.plan = once_all_are_there
    assert [one.token_ids for one in asyncio.run(all_at_once(engine, batch))] == want
    assert replayed.prompts == len(batch)


def test_a_choice_that_fails_ends_its_own_requests(
    decoder: FrozenBase,
    adapters: AdapterStore,
    start_engine: Start,
    static_updates: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = BATCHES["adapters"][:4]
    want = [one.token_ids for one in asyncio.run(all_at_once(start_engine(decoder, adapters), batch))]
    static_updates()
    engine = start_engine(decoder, adapters, max_sequences=16)
    replayed = Replayed(engine)

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


def test_prompts_that_are_long_or_asked_for_are_computed_packed(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(decoder, adapters, max_sequences=16, max_batch_tokens=120)
    replayed = Replayed(engine)
    prompt = "the quick brown fox jumps over the lazy dog " * 3
    for text, options, static in [
        (prompt[: SIZES[-1]], {}, 1),
        (prompt[: SIZES[-1] + 1], {}, 0),
        # The first part is as long as a pass, and the rest of it is short.
        (prompt[:130], {}, 1),
        (prompt[:50], {"prompt_logprobs": 1}, 0),
        (prompt[:50], {"logit_bias": {65: 1.0}}, 1),
    ]:
        before = replayed.prompts
        asyncio.run(all_at_once(engine, [GenerateParams(prompt=text, max_new_tokens=2, cache_salt=text, **options)]))
        assert replayed.prompts - before == static, (len(text), options)
    monkeypatch.setattr(runner, "_MOST_KEYS", 40 * 40 - 1)
    for length, static in [(39, 1), (40, 0)]:
        before = replayed.prompts
        asyncio.run(
            all_at_once(engine, [GenerateParams(prompt=prompt[:length], max_new_tokens=2, cache_salt=str(length))])
        )
        assert replayed.prompts - before == static


def test_padding_rows_write_to_the_scratch_page_alone(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, static_updates: Callable[[], None]
) -> None:
    static_updates()
    engine = start_engine(decoder, adapters, max_sequences=16)
    replayed = Replayed(engine)
    pool = replayed.runner.decoder.pool
    written: list[set[tuple[int, int]]] = []
    launch = replayed.launch

    def watched(batch: StaticBatch, ahead: int) -> StaticLaunch:
        before = [store.clone() for store in pool._stores.values()]
        launched = launch(batch, ahead)
        changed: set[tuple[int, int]] = set()
        for old, new in zip(before, pool._stores.values(), strict=True):
            different: Tensor = (old != new).flatten(3).any(-1).any(0)
            changed |= {(page, offset) for page, offset in different.nonzero().tolist()}
        places = [(request, len(request.tokens) - 1 + ahead) for request in batch.decodes]
        places += [(one, at) for one in batch.prompts for at in range(one.computed, len(one.tokens))]
        own = {(request.pages[at // PAGE_SIZE], at % PAGE_SIZE) for request, at in places}
        assert len(own) == batch.tokens
        assert own <= changed <= own | {(SCRATCH, 0)}
        written.append(changed)
        return launched

    replayed.launch = watched  # type: ignore[method-assign]
    # Four requests that end one after the other: a row that has had a request becomes padding.
    asyncio.run(all_at_once(engine, [ask(number, adapter=ADAPTERS[-number]) for number in range(4)]))
    assert any((SCRATCH, 0) in changed for changed in written)
    assert any((SCRATCH, 0) not in changed for changed in written)


@pytest.mark.parametrize(("tokens", "requests"), [(1, 1), (16, 16), (96, 16)])
def test_a_step_of_padding_alone_writes_to_the_scratch_page_alone(
    tokens: int, requests: int, decoder: FrozenBase, adapters: AdapterStore, start_engine: Start
) -> None:
    """Each graph is captured over such a step."""
    used = start_engine(decoder, adapters, max_sequences=16).runners["generate"].runner
    model, pool = used.decoder.model, used.decoder.pool
    rows = DeviceRows(used.tables, model.device, model.vocabulary, model.logits_dtype)
    key = StaticKey(tokens, requests, ShapeClasses(), sampled=False, truncated=False)
    step = StaticStep(used.decoder, rows, key)
    before = [store.clone() for store in pool._stores.values()]
    turn = step.stage(StaticBatch(), used.tables)
    step.upload(turn)
    step.run()
    step.download(turn)
    assert step.tokens(turn, 0) == [] and rows.tokens[:-1].tolist() == [0] * 16
    for old, new in zip(before, pool._stores.values(), strict=True):
        changed = (old != new).flatten(2).any(-1).any(0).nonzero().flatten().tolist()
        assert changed == [SCRATCH]


@pytest.mark.parametrize("architecture", ["capped scores and windows", "sinks and experts"])
def test_other_architectures_have_static_steps_too(
    architecture: str, store: AdapterStore, start_engine: Start, static_updates: Callable[[], None]
) -> None:
    shape: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    config = (
        GptOssConfig(num_local_experts=2, num_experts_per_tok=1, **shape)
        if architecture == "sinks and experts"
        else Gemma2Config(attn_logit_softcapping=1.0, final_logit_softcapping=5.0, **shape)
    )
    base = freeze_base(AutoModelForCausalLM.from_config(config), byte_tokenizer(), "tiny")
    store.publish(random_adapter(base, SeraConfig(4, 4, 4.0, "all-linear"), 1, strength=0.5), "acme/a")
    batch = [ask(number, adapter=["acme/a", None][number % 2]) for number in range(5)]
    want = [one.token_ids for one in asyncio.run(all_at_once(start_engine(base, store), batch))]
    static_updates()
    engine = start_engine(base, store, max_sequences=16)
    replayed = Replayed(engine)
    assert [one.token_ids for one in asyncio.run(all_at_once(engine, batch))] == want
    assert replayed.replays > 5
    for recording in replayed.recordings.values():
        # torch computes grouped_mm by a loop over groups on a CPU, which no graph ever holds.
        assert {name for name in recording.data_dependent if "grouped_mm" not in name} == set()


def test_a_recorder_names_what_a_graph_cannot_hold() -> None:
    recording = Recording()
    values = torch.arange(4.0)
    with recording.recording():
        values[values > 1]
        values.sum().item()
        bool(values[0] == 0)
        values.tolist()
    assert {"aten.index.Tensor", "aten._local_scalar_dense.default"} <= set(recording.data_dependent)
    assert {"item", "__bool__", "tolist"} <= set(recording.host_reads)


def test_a_recording_runs_on_the_memory_of_its_buffers() -> None:
    source, target = torch.arange(4.0), torch.zeros(2)
    recording = Recording()
    with recording.recording():
        target.copy_(source.view(2, 2).sum(1) * 2)
    source.fill_(1)
    recording.replay()
    assert target.tolist() == [4, 4]
