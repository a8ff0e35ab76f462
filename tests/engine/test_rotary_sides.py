"""Bases whose rotary frequencies depend on the length: a long prompt of one tenant changes no other's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from adapters_store import AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase, freeze_base
from sera_serve.engine import ClassifyResult, GenerateParams, GenerationResult, ServingEngine
from sera_serve.engine.tasks.classify import _Row
from sera_serve.errors import PromptTooLong
from support.engine import Start, classify, collect, generate, settled
from support.factories import byte_tokenizer, greedy, merged, random_adapter
from support.graph_recorder import Replayed
from support.standstill import standstill

THRESHOLD = 32
SHAPE: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
SHORT_PROMPT = "the cat sat on a ma"
LONG_PROMPT = ("it is a long story, " * 9)[:162]
GROWING_PROMPT = "it grows over the thresh"


@pytest.fixture(scope="module")
def phi3() -> FrozenBase:
    """Phi-3 with another set of frequencies for sequences of more than 32 tokens."""
    torch.manual_seed(0)
    config = Phi3Config(
        original_max_position_embeddings=THRESHOLD,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 8.0,
            "short_factor": [1.0] * 8,
            "long_factor": [8.0] * 8,
            "original_max_position_embeddings": THRESHOLD,
        },
        **SHAPE,
    )
    return freeze_base(AutoModelForCausalLM.from_config(config), byte_tokenizer(), "phi3")


@pytest.fixture
def tenants(phi3: FrozenBase, store: AdapterStore) -> AdapterStore:
    for seed, tenant in enumerate(("acme", "rival")):
        store.publish(random_adapter(phi3, SeraConfig(8, 8, 8.0, "all-linear"), seed, strength=0.5), f"{tenant}/writer")
        labeler = random_adapter(
            phi3, SeraConfig(8, 8, 8.0, "all-linear"), seed + 5, ["no", "yes"], strength=0.5, max_length=200
        )
        # Else every probability is 0 or 1, whatever the frequencies.
        labeler.tensors["head.weight"] *= 0.1
        store.publish(labeler, f"{tenant}/labels")
    return store


def expected(base: FrozenBase, store: AdapterStore, adapter: str | None, prompt: str, new_tokens: int) -> list[int]:
    model = base if adapter is None else merged(base, store.load(store.resolve(adapter).digest))
    return greedy(model, base.tokenizer(prompt)["input_ids"], new_tokens)


SETTINGS = [
    pytest.param({}, id="whole"),
    pytest.param({"max_batch_tokens": 24}, id="chunked"),
    pytest.param({"kv_cache_tokens": 256}, id="few pages"),
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("adapters", [(None, None), ("acme/writer", "rival/writer")], ids=["base", "adapters"])
def test_a_long_prompt_changes_no_other_tenants_tokens(
    adapters: tuple[str | None, str | None],
    settings: dict[str, int],
    phi3: FrozenBase,
    tenants: AdapterStore,
    start_engine: Start,
) -> None:
    engine = start_engine(phi3, tenants, **settings)
    mine, others = adapters
    # 13 new tokens end at 32, the last length of the short side; 30 go over it.
    cases = [(mine, SHORT_PROMPT, 13), (mine, GROWING_PROMPT, 30), (others, LONG_PROMPT, 40), (others, SHORT_PROMPT, 8)]

    async def together() -> list[GenerationResult]:
        long = await generate(engine, GenerateParams(adapter=others, prompt=LONG_PROMPT, max_new_tokens=40))
        await anext(long)
        # The long one runs for as long as the others do.
        rest = asyncio.gather(
            *(collect(engine, adapter=a, prompt=p, max_new_tokens=n) for a, p, n in cases if p != LONG_PROMPT)
        )
        last = await long.collect()
        first, second, fourth = await rest
        return [first, second, last, fourth]

    async def alone() -> list[GenerationResult]:
        return [await collect(engine, adapter=a, prompt=p, max_new_tokens=n) for a, p, n in cases]

    want = [expected(phi3, tenants, *case) for case in cases]
    assert [result.token_ids for result in asyncio.run(together())] == want
    assert [result.token_ids for result in asyncio.run(alone())] == want


def test_the_sides_give_different_tokens(phi3: FrozenBase) -> None:
    """Else the tests here would see nothing: the tokens of the long factors are others."""
    tokens = phi3.tokenizer(SHORT_PROMPT)["input_ids"]
    short = greedy(phi3, tokens, 5)
    assert short == [101, 28, 42, 42, 29]
    with torch.no_grad():
        ids, positions = torch.tensor([tokens]), torch.arange(len(tokens))[None]
        beside_long = torch.cat([ids, ids[:, :1].expand(1, 40)], 1)
        far = torch.cat([positions, positions[:, -1:] + 1 + torch.arange(40)[None]], 1)
        long = phi3.model(input_ids=beside_long, position_ids=far).logits[0, len(tokens) - 1].argmax().item()
    assert long == 201


@pytest.mark.parametrize("new_tokens", [8, 9, 10, 40])
def test_a_sequence_that_grows_over_the_threshold_is_computed_again(
    new_tokens: int, phi3: FrozenBase, tenants: AdapterStore, start_engine: Start
) -> None:
    engine = start_engine(phi3, tenants)
    assert len(GROWING_PROMPT) == 24, "with eight new tokens it has as many as the short side holds"
    result = asyncio.run(collect(engine, prompt=GROWING_PROMPT, max_new_tokens=new_tokens))
    assert result.token_ids == greedy(phi3, phi3.tokenizer(GROWING_PROMPT)["input_ids"], new_tokens)
    assert engine.loads()["generate"].preemptions == (new_tokens > 9)
    assert (result.prompt_tokens, result.completion_tokens) == (24, new_tokens)


def test_pages_of_one_side_are_not_found_by_the_other(
    phi3: FrozenBase, tenants: AdapterStore, start_engine: Start
) -> None:
    """The first page of a short prompt is the beginning of a long one."""
    engine = start_engine(phi3, tenants)
    page, tail = LONG_PROMPT[:THRESHOLD], LONG_PROMPT[:70]

    async def main() -> list[GenerationResult]:
        # With one new token the first stays on the short side.
        asked = {"adapter": "acme/writer", "max_new_tokens": 1}
        return [await collect(engine, prompt=prompt, **asked) for prompt in (page, tail, tail)]

    results = asyncio.run(main())
    assert [result.cached_tokens for result in results] == [0, 0, 64]
    for prompt, result in zip((page, tail, tail), results, strict=True):
        assert result.token_ids == expected(phi3, tenants, "acme/writer", prompt, 1)


def test_a_failed_step_of_long_and_short_tokens_fails_nothing_else(
    phi3: FrozenBase, tenants: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(phi3, tenants)
    runner = engine.runners["generate"].runner

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(runner.chooser, "choose", lambda *arguments: 1 / 0)
            with pytest.raises(Exception, match="division by zero"):
                await collect(engine, prompt=LONG_PROMPT, max_new_tokens=2)
        assert engine.failure() is None, "the probe after a failed step has a token of its own length"
        again = await collect(engine, prompt=SHORT_PROMPT, max_new_tokens=5)
        assert again.token_ids == [101, 28, 42, 42, 29]
        await settled(engine)

    asyncio.run(main())


def test_short_and_long_rows_of_two_tenants_are_classified_in_one_pass(
    phi3: FrozenBase, tenants: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(phi3, tenants, classify_max_batch=8)
    passes: list[set[tuple[str, int]]] = []
    classify_rows: Callable[..., Any] = engine.runners["classify"]._classify

    def noted(rows: list[_Row]) -> Any:
        passes.append({(row.request.tenant, len(row.inputs)) for row in rows})
        return classify_rows(rows)

    monkeypatch.setattr(engine.runners["classify"], "_classify", noted)
    # Lengths on both sides of the threshold that one pass takes, and the threshold itself.
    # Of varied tokens: where all values are alike, frequencies change nothing.
    inputs = {"acme": [LONG_PROMPT[:20], LONG_PROMPT[5:37]], "rival": [LONG_PROMPT[3:36], LONG_PROMPT[7:47]]}

    async def together() -> list[ClassifyResult]:
        with standstill():
            first = asyncio.ensure_future(classify(engine, "acme/labels", ["x"]))
            await asyncio.sleep(0.05)
            both = [asyncio.ensure_future(classify(engine, f"{name}/labels", rows)) for name, rows in inputs.items()]
            await asyncio.sleep(0.3)
        await first
        return await asyncio.gather(*both)

    for (tenant, rows), result in zip(inputs.items(), asyncio.run(together()), strict=True):
        bundle = tenants.load(tenants.resolve(f"{tenant}/labels").digest)
        model = merged(phi3, bundle)
        for text, scores in zip(rows, result.results, strict=True):
            ids = torch.tensor([phi3.tokenizer(text)["input_ids"]])
            with torch.no_grad():
                state = model.model.base_model(input_ids=ids).last_hidden_state[0, -1]
                want = (state @ bundle.tensors["head.weight"].T + bundle.tensors["head.bias"]).softmax(0)
            got = torch.tensor(list(scores.probabilities.values()))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    mixed = [rows for rows in passes if len({tenant for tenant, _ in rows}) == 2]
    assert any({length > THRESHOLD for _, length in rows} == {False, True} for rows in mixed), "no pass had both sides"


def test_dynamic_scaling_is_served_up_to_its_original_length(store: AdapterStore, start_engine: Start) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        **SHAPE | {"max_position_embeddings": 64},
    )
    base = freeze_base(AutoModelForCausalLM.from_config(config), byte_tokenizer(), "dynamic")
    assert base.max_length == 64
    engine = start_engine(base, store)
    cases = [(LONG_PROMPT[:60], 4), (LONG_PROMPT[5:15], 54), (LONG_PROMPT[9:39], 34)]

    async def main() -> list[GenerationResult]:
        with pytest.raises(PromptTooLong, match="exceed the context of 64"):
            await collect(engine, prompt="x" * 60, max_new_tokens=5)
        return await asyncio.gather(*(collect(engine, prompt=p, max_new_tokens=n) for p, n in cases))

    for (prompt, new_tokens), result in zip(cases, asyncio.run(main()), strict=True):
        assert result.token_ids == greedy(base, base.tokenizer(prompt)["input_ids"], new_tokens)


def test_static_steps_choose_the_side_of_each_row(phi3: FrozenBase, tenants: AdapterStore, start_engine: Start) -> None:
    engine: ServingEngine = start_engine(phi3, tenants, max_sequences=16)
    replayed = Replayed(engine)
    cases = [(None, SHORT_PROMPT, 13), (None, GROWING_PROMPT, 30), (None, LONG_PROMPT, 20)]

    async def main() -> list[GenerationResult]:
        return await asyncio.gather(*(collect(engine, prompt=p, max_new_tokens=n) for _, p, n in cases))

    want = [expected(phi3, tenants, *case) for case in cases]
    assert [result.token_ids for result in asyncio.run(main())] == want
    assert replayed.replays > 20
    replayed.check()
