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
from sera_serve.engine import GenerateParams, GenerationResult, ServingEngine
from sera_serve.engine.loop import runner
from sera_serve.engine.loop.pages import PAGE_SIZE, SCRATCH
from sera_serve.engine.loop.plan import StepPlan
from sera_serve.engine.loop.row_tables import DeviceRows
from sera_serve.engine.loop.static_step import StaticBatch, StaticKey, StaticLaunch, StaticStep
from support.engine import Start, generate, settled
from support.factories import byte_tokenizer, random_adapter
from support.graph_recorder import SIZES, Recording, Replayed
from support.static_batches import ADAPTERS, BATCHES, all_at_once, ask

pytestmark = pytest.mark.usefixtures("memory_given_back")

# Two slots for six adapters, and pages for half of the requests: rows, slots and pages change hands.
SMALL: dict[str, Any] = {"max_resident": 2, "host_cache_mib": 0, "kv_cache_tokens": 288}
with_room_and_without = pytest.mark.parametrize(
    "settings", [pytest.param({}, id="room"), pytest.param(SMALL, id="evicted and preempted")]
)


def run(engine: ServingEngine) -> dict[str, list[list[int]]]:
    return {
        name: [result.token_ids for result in asyncio.run(all_at_once(engine, batch))]
        for name, batch in BATCHES.items()
    }


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
