"""Structured output in the step loop: in one batch with free requests, in chunks, after preemptions."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from typing import Any

import jsonschema
import pytest

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import (
    ConstraintSpec,
    GenerateParams,
    GenerationResult,
    ServingEngine,
    structured,
)
from sera_serve.engine.loop import masks
from sera_serve.engine.loop.masks import MaskThreads, RowMasks
from sera_serve.engine.request import GenerationRequest
from sera_serve.engine.structured import LARGE, SMALL, Room
from sera_serve.engine.tenant_memory import TenantMemory
from sera_serve.errors import ConstraintUnsatisfiable, InvalidRequest, TenantOverloaded
from support.engine import SHAPE, Start, acting_for, collect, generate, settled, until
from support.factories import random_adapter

ADAPTERS = ["a/one", None, "b/one"]
SCHEMA = {
    "type": "object",
    "properties": {"id": {"type": "integer"}, "tags": {"type": "array", "items": {"enum": ["x", "yy"]}, "maxItems": 3}},
    "required": ["id", "tags"],
    "additionalProperties": False,
}
REGEX = r"[a-z]{4,40}-\d{2,9}"
GRAMMAR = 'start: sum\nsum: sum "+" NUMBER | NUMBER\nNUMBER: /[0-9]{1,3}/'
FORMS = [
    None,
    ConstraintSpec("json_schema", json.dumps(SCHEMA)),
    ConstraintSpec("regex", REGEX),
    ConstraintSpec("grammar", GRAMMAR),
]
# Eight pages of 32 tokens, for requests of one or two pages that grow.
FEW_PAGES = 256
NEW_TOKENS = 50


def requests(count: int = 12) -> list[GenerateParams]:
    sampling: list[dict[str, Any]] = [{"temperature": 1.0}, {}, {"temperature": 0.8, "top_k": 20, "logprobs": 1}]
    return [
        GenerateParams(
            adapter=ADAPTERS[number % 3],
            prompt=f"{number} " + "sail on, " * (number % 5),
            max_new_tokens=NEW_TOKENS,
            seed=number,
            constraint=FORMS[number % 4],
            **sampling[number // 2 % 3],
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def adapters(decoder: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    store = AdapterStore(tmp_path_factory.mktemp("structured") / "store")
    for seed, name in enumerate(filter(None, ADAPTERS)):
        store.publish(random_adapter(decoder, SHAPE, seed, strength=0.5), name)
    return store


@pytest.fixture(scope="module")
def alone(decoder: FrozenBase, adapters: AdapterStore) -> list[GenerationResult]:
    """What each request gives where it is the only one, and has room."""
    engine = ServingEngine(decoder, adapters, ServeSettings(pool_mib=8, kv_cache_tokens=8192))
    engine.start()

    async def one_by_one() -> list[GenerationResult]:
        return [await (await generate(engine, params)).collect() for params in requests()]

    results = asyncio.run(one_by_one())
    engine.stop()
    return results


def conforms(params: GenerateParams, text: str) -> None:
    match params.constraint and params.constraint.kind:
        case "json_schema":
            jsonschema.validate(json.loads(text), SCHEMA)
        case "regex":
            assert re.fullmatch(REGEX, text)
        case "grammar":
            assert re.fullmatch(r"\d{1,3}(\+\d{1,3})*", text)


def test_each_form_is_kept_alone(alone: list[GenerationResult]) -> None:
    ended = set()
    for params, result in zip(requests(), alone, strict=True):
        if params.constraint is not None and result.finish_reason == "stop":
            conforms(params, result.text)
            ended.add(params.constraint.kind)
    assert ended == {"json_schema", "regex", "grammar"}


@pytest.mark.parametrize(
    ("settings", "preempts"),
    # With five rows a tenant that waits may get one of another tenant's, by the clock: there both is right.
    [({}, False), ({"max_batch_tokens": 16, "max_sequences": 5}, None), ({"kv_cache_tokens": FEW_PAGES}, True)],
    ids=["one batch", "chunks", "preemptions"],
)
def test_beside_others_each_request_gets_the_tokens_that_it_gets_alone(
    decoder: FrozenBase,
    adapters: AdapterStore,
    alone: list[GenerationResult],
    start_engine: Start,
    settings: dict[str, Any],
    preempts: bool | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        preempted: list[GenerationRequest] = []
        move = GenerationRequest.move

        def noted(request: GenerationRequest, state: Any) -> None:
            if state.name == "PREEMPTED" and request.constraint is not None:
                preempted.append(request)
            move(request, state)

        monkeypatch.setattr(GenerationRequest, "move", noted)
        engine = start_engine(decoder, adapters, **settings)

        async def one(params: GenerateParams) -> GenerationResult:
            return await (await generate(engine, params)).collect()

        # The first time, schemas are compiled while other requests run: those may end before all are there.
        for _ in range(5 if preempts else 1):
            results = await asyncio.gather(*map(one, requests()))
            assert [result.token_ids for result in results] == [result.token_ids for result in alone]
            assert [result.finish_reason for result in results] == [result.finish_reason for result in alone]
            if preempted:
                break
        assert preempts is None or bool(preempted) == preempts
        await settled(engine)

    asyncio.run(scenario())


@pytest.mark.parametrize("settings", [{}, {"max_batch_tokens": 16}, {"kv_cache_tokens": FEW_PAGES}])
def test_a_mask_that_has_to_wait_changes_no_token(
    decoder: FrozenBase,
    adapters: AdapterStore,
    alone: list[GenerationResult],
    start_engine: Start,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("_PATIENCE", "_LEAST_PATIENCE_S"):
        monkeypatch.setattr(masks, name, 0.0)
    postponed = []
    compute, take = masks.allowed_tokens, MaskThreads.take

    def slow(request: GenerationRequest, *arguments: Any) -> Any:
        if request.generated % 3 == 1:
            time.sleep(0.01)
        return compute(request, *arguments)

    def noted(self: MaskThreads, *arguments: Any, **options: Any) -> RowMasks:
        taken = take(self, *arguments, **options)
        postponed.extend(taken.postponed)
        return taken

    monkeypatch.setattr(masks, "allowed_tokens", slow)
    monkeypatch.setattr(MaskThreads, "take", noted)

    async def scenario() -> None:
        engine = start_engine(decoder, adapters, **settings)

        async def one(params: GenerateParams) -> GenerationResult:
            return await (await generate(engine, params)).collect()

        results = await asyncio.gather(*map(one, requests()))
        assert [result.token_ids for result in results] == [result.token_ids for result in alone]
        for result, before in zip(results, alone, strict=True):
            assert [one.token for one in result.logprobs or []] == [one.token for one in before.logprobs or []]
        await settled(engine)

    asyncio.run(scenario())
    assert postponed


def test_a_system_that_refuses_further_threads_has_one_for_masks(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name == "masks":
            raise RuntimeError("can't start new thread")
        start(thread)

    async def scenario() -> None:
        engine = start_engine(decoder, adapters)
        monkeypatch.setattr(threading.Thread, "start", refused)
        # As many as use every thread that there could be.
        asked = [collect(engine, prompt="x", constraint=FORMS[2], max_new_tokens=20) for _ in range(8)]
        async with asyncio.timeout(20):
            for result in await asyncio.gather(*asked):
                assert result.completion_tokens
        await settled(engine)

    asyncio.run(scenario())


def test_a_text_that_nobody_has_read_yet_holds_no_constraint(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start
) -> None:
    async def scenario() -> None:
        engine = start_engine(decoder, adapters)
        params = GenerateParams(prompt="x", constraint=ConstraintSpec("regex", "[a-z]{5}"), max_new_tokens=20)
        stream = await generate(engine, params)
        await settled(engine)
        assert stream.request.is_finished and stream.request.constraint is None
        assert re.fullmatch("[a-z]{5}", (await stream.collect()).text)

    asyncio.run(scenario())


def test_a_form_that_outgrows_the_memory_of_its_tenant_ends_its_own_text(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured, "SMALL", Room(100, SMALL.nbytes))
    monkeypatch.setattr(TenantMemory, "tenant_bytes", LARGE.nbytes)
    growing = ConstraintSpec("json_schema", '{"type":"integer","multipleOf":9973}')

    async def scenario() -> None:
        engine = start_engine(decoder, adapters)
        params = GenerateParams(prompt="x", constraint=growing, max_new_tokens=250, temperature=1.0, seed=1)
        stream, other = await generate(engine, params), await generate(engine, GenerateParams(prompt="x"))
        with pytest.raises(TenantOverloaded, match="cannot be compiled now"):
            await stream.collect()
        assert (await other.collect()).completion_tokens
        await settled(engine)

    asyncio.run(scenario())


def test_the_choices_of_one_request_have_states_of_their_own(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start
) -> None:
    async def scenario() -> None:
        engine = start_engine(decoder, adapters)
        params = GenerateParams(prompt="x", n=6, temperature=1.0, seed=3, max_new_tokens=80, constraint=FORMS[2])
        streams = await engine.generate_choices(params, acting_for(None))
        results = await asyncio.gather(*(stream.collect() for stream in streams))
        assert len({result.text for result in results}) > 1
        for result in results:
            assert result.finish_reason == "stop"
            conforms(params, result.text)
        await settled(engine)

    asyncio.run(scenario())


def test_the_end_of_a_value_ends_the_text_without_an_end_token(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start
) -> None:
    async def scenario() -> None:
        engine = start_engine(decoder, adapters)
        spec = ConstraintSpec("json_schema", '{"const":{"a":[1,2]}}')
        result = await collect(engine, prompt="x", constraint=spec, ignore_eos=True, max_new_tokens=100)
        assert (json.loads(result.text), result.finish_reason) == ({"a": [1, 2]}, "stop")

    asyncio.run(scenario())


def test_the_compiling_of_one_tenant_holds_up_no_other(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, begun, make = threading.Event(), list[str](), structured._compile

    def gated(tokenizer: Any, spec: ConstraintSpec, states: int) -> Any:
        if spec.text.startswith("slow"):
            begun.append(spec.text)
            assert opened.wait(20)
        return make(tokenizer, spec, states)

    monkeypatch.setattr(structured, "_compile", gated)

    async def scenario() -> None:
        engine = start_engine(decoder, adapters, max_queue_per_tenant=8)

        async def ask(adapter: str, text: str) -> str:
            spec = ConstraintSpec("regex", text)
            return (await collect(engine, adapter=adapter, prompt="x", constraint=spec, max_new_tokens=20)).text

        assert await ask("b/one", "known") == "known"
        slow = [asyncio.ensure_future(ask("a/one", f"slow{number}")) for number in range(4)]
        await until(lambda: bool(begun))
        # Neither what is compiled already nor a new text waits.
        async with asyncio.timeout(10):
            assert await ask("b/one", "known") == "known"
            assert await ask("b/one", "new") == "new"
        assert len(begun) == 1
        opened.set()
        assert await asyncio.gather(*slow) == [f"slow{number}" for number in range(4)]
        await settled(engine)

    asyncio.run(scenario())


def test_a_constraint_does_not_end_a_text_before_its_least_tokens(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start
) -> None:
    async def scenario() -> None:
        engine = start_engine(decoder, adapters)
        too_short = ConstraintSpec("regex", "ab")
        for ignore_eos in (False, True):
            with pytest.raises(ConstraintUnsatisfiable, match=r"only end after \d tokens, and min_tokens is 10"):
                await collect(engine, prompt="x", constraint=too_short, min_tokens=10, ignore_eos=ignore_eos)
            ends = decoder.preprocessor.end_tokens
            result = await collect(
                engine,
                prompt="x",
                constraint=ConstraintSpec("regex", "a{1,40}"),
                min_tokens=10,
                ignore_eos=ignore_eos,
                logit_bias=dict.fromkeys(ends, 100.0),
            )
            # The end token comes as soon as it may.
            assert (result.finish_reason, len(result.token_ids)) == ("stop", 11)
            assert ends.isdisjoint(result.token_ids[:10])
        await settled(engine)

    asyncio.run(scenario())


def test_the_limit_ends_a_text_in_mid_value(decoder: FrozenBase, adapters: AdapterStore, start_engine: Start) -> None:
    async def scenario() -> None:
        engine = start_engine(decoder, adapters)
        spec = ConstraintSpec("json_schema", '{"type":"array","minItems":1000000}')
        result = await collect(engine, prompt="x", constraint=spec, max_new_tokens=30)
        assert (result.finish_reason, len(result.token_ids)) == ("length", 30)
        assert result.text.startswith("[")

    asyncio.run(scenario())


def test_what_cannot_be_enforced_is_refused_before_anything_runs(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start
) -> None:
    async def scenario() -> None:
        engine = start_engine(decoder, adapters)
        with pytest.raises(InvalidRequest, match="look-around") as refusal:
            await collect(engine, prompt="x", constraint=ConstraintSpec("regex", "(?=a)b"))
        assert refusal.value.param == "regex"
        await settled(engine)

    asyncio.run(scenario())


def test_a_grammar_that_becomes_too_complex_ends_its_own_request_alone(
    decoder: FrozenBase, adapters: AdapterStore, alone: list[GenerationResult], start_engine: Start
) -> None:
    async def scenario() -> None:
        engine = start_engine(decoder, adapters)
        hostile = ConstraintSpec("grammar", "start: e\ne: e e | e e e | X\nX: /[a-z]/")
        others = [generate(engine, params) for params in requests(4)]
        streams = await asyncio.gather(
            generate(
                engine,
                GenerateParams(prompt="x", constraint=hostile, max_new_tokens=200, temperature=1.0, min_tokens=199),
            ),
            *others,
        )
        outcomes = await asyncio.gather(*(stream.collect() for stream in streams), return_exceptions=True)
        assert isinstance(outcomes[0], InvalidRequest)
        assert outcomes[0].param == "grammar"
        assert [result.token_ids for result in outcomes[1:]] == [result.token_ids for result in alone[:4]]  # type: ignore[union-attr]
        await settled(engine)

    asyncio.run(scenario())


def test_a_text_without_calls_is_as_it_is_without_the_constraint(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start
) -> None:
    # Bytes at random are no text.
    fields: dict[str, Any] = {"logit_bias": dict.fromkeys(range(32, 127), 50.0), "max_new_tokens": NEW_TOKENS}
    call = ConstraintSpec("tool_calls", json.dumps({"type": "object"}))

    async def scenario() -> None:
        engine = start_engine(decoder, adapters)
        for adapter in ADAPTERS:
            results = []
            for constraint in (None, call):
                params = GenerateParams(adapter=adapter, prompt="so", seed=1, constraint=constraint, **fields)
                results.append(await (await generate(engine, params)).collect())
            assert results[0].token_ids == results[1].token_ids
            assert len(results[0].text) == NEW_TOKENS

    asyncio.run(scenario())
