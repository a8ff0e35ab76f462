"""Adapters that overflow: their requests end with an error, and nobody else's answer changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, OPTConfig, PretrainedConfig, Qwen3Config

from adapters_store import AdapterBundle, AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase, freeze_base
from sera_serve.engine import GenerateParams, GenerationResult, ServingEngine, TokenDelta
from sera_serve.engine.loop.hugging_face import PagedModel
from sera_serve.engine.loop.static_step import StaticBatch, StaticLaunch
from sera_serve.engine.overflow import is_norm
from sera_serve.engine.sampling import NO_TOKEN, SamplingRows, next_tokens, perturbed_scores
from sera_serve.errors import AdapterOverflow, BaseOverflow
from sera_serve.layers import served_linear
from support.engine import SHAPE, Start, classify, collect, generate, settled
from support.factories import byte_tokenizer, random_adapter
from support.graph_recorder import Replayed, static_add_updates

NAN, INF = float("nan"), float("inf")


def enlarged(bundle: AdapterBundle, factor: float) -> AdapterBundle:
    """The adapter with its last factors so much larger."""
    tensors = {name: t * factor if name.endswith("sera_b") else t for name, t in bundle.tensors.items()}
    return AdapterBundle(bundle.config, tensors)


def scaled(bundle: AdapterBundle, scaling: float) -> AdapterBundle:
    modules = {path: spec.model_copy(update={"scaling": scaling}) for path, spec in bundle.config.modules.items()}
    return AdapterBundle(bundle.config.model_copy(update={"modules": modules}), dict(bundle.tensors))


def overflowing(base: FrozenBase, **fields: Any) -> dict[str, AdapterBundle]:
    """Finite adapters: what each computes is not, or a normalization of the base overflows and gives zeros."""
    everywhere = random_adapter(base, SHAPE, 7, **fields)
    paths = [path.rpartition(".")[2] for path in everywhere.config.modules]

    def on(*names: str) -> AdapterBundle:
        return random_adapter(base, SeraConfig(8, 8, 8.0, tuple(n for n in names if n in paths)), 7, **fields)

    return {
        "values": enlarged(everywhere, 1e30),
        "scaling": scaled(everywhere, 1e308),
        "queries": enlarged(on("q_proj", "query"), 1e38),
        "keys": enlarged(on("k_proj", "key"), 1e38),
        # What it gives passes the probe at upload. The base multiplies two such numbers, or adds up their squares.
        "inside": enlarged(on("gate_proj", "up_proj", "fc1", "fc2", "v_proj", "value", "dense"), 1e14),
    }


@pytest.fixture
def adapters(decoder: FrozenBase, store: AdapterStore) -> AdapterStore:
    store.publish(random_adapter(decoder, SHAPE, 1, strength=0.5), "acme/good")
    for name, bundle in overflowing(decoder).items():
        store.publish(bundle, f"bad/{name}")
    return store


def asked(number: int, **options: Any) -> GenerateParams:
    prompt = "".join(chr(97 + (number + place * place) % 26) for place in range((3, 17, 90)[number % 3]))
    return GenerateParams(**({"prompt": prompt, "max_new_tokens": 6} | options))


async def all_at_once(engine: ServingEngine, batch: list[GenerateParams]) -> list[GenerationResult | BaseException]:
    async def one(params: GenerateParams) -> GenerationResult:
        return await (await generate(engine, params)).collect()

    results = await asyncio.gather(*map(one, batch), return_exceptions=True)
    await settled(engine)
    return results


def sound(batch: list[GenerateParams]) -> list[GenerateParams]:
    return [params for params in batch if not (params.adapter or "").startswith("bad/")]


def check(batch: list[GenerateParams], results: list[Any], want: list[Any]) -> None:
    """The sound requests have the tokens of `want`, and each other one the error."""
    good = iter(want)
    for params, result in zip(batch, results, strict=True):
        if (params.adapter or "").startswith("bad/"):
            assert isinstance(result, AdapterOverflow), (params.adapter, result)
            assert f"{params.adapter}@v1" in result.message and "smaller scaling" in result.message
            assert (result.code, result.status, result.param) == ("adapter_overflow", 422, "adapter")
        else:
            assert result.token_ids == next(good).token_ids


BATCH = [
    asked(number, adapter=name)
    for number in range(3)
    for name in ("bad/values", "acme/good", "bad/scaling", None, "bad/queries", "bad/keys", "bad/inside", "acme/good")
]
LIMITED = [
    asked(number, adapter=name, seed=1, **options)
    for number, options in enumerate(
        [
            {"temperature": 0.8},
            {"temperature": 1.0, "top_k": 9},
            {"temperature": 1.0, "top_p": 0.5},
            {"logprobs": 2},
            {"prompt_logprobs": 1},
            {"logprobs": 0, "prompt_logprobs": 0, "temperature": 1.0},
        ]
    )
    for name in ("bad/values", "acme/good", "bad/inside")
]


@pytest.mark.parametrize("batch", [BATCH, LIMITED], ids=["greedy", "sampled, with log-probabilities"])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="room"),
        pytest.param({"max_batch_tokens": 24}, id="chunked"),
        pytest.param({"kv_cache_tokens": 160, "max_sequences": 4}, id="few pages"),
    ],
)
def test_a_request_that_overflows_ends_alone(
    batch: list[GenerateParams],
    settings: dict[str, int],
    decoder: FrozenBase,
    adapters: AdapterStore,
    start_engine: Start,
) -> None:
    want = asyncio.run(all_at_once(start_engine(decoder, adapters, **settings), sound(batch)))
    engine = start_engine(decoder, adapters, **settings)
    for _ in range(2):
        check(batch, asyncio.run(all_at_once(engine, batch)), want)


def test_static_steps_find_overflows_without_reading_the_device(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [asked(number, adapter="acme/good", temperature=number % 2, seed=number) for number in range(4)]
    engine = start_engine(decoder, adapters, max_sequences=16)
    want = asyncio.run(all_at_once(engine, batch))
    monkeypatch.setattr(served_linear, "add_updates", static_add_updates(16))
    engine = start_engine(decoder, adapters, max_sequences=16)
    replayed = Replayed(engine)
    launch, poisoned = replayed.launch, [0]

    def poisoning(batch: StaticBatch, ahead: int) -> StaticLaunch:
        for request in batch.requests:
            assert request.adapter is not None
            if request.adapter.adapter == "bad/values" and len(request.tokens) + ahead > request.prompt_tokens + 2:
                # As if its keys overflowed from here on.
                poisoned[0] += 1
                page = request.pages[0]
                for store in replayed.runner.decoder.pool._stores.values():
                    store[:, page] = NAN
        return launch(batch, ahead)

    replayed.launch = poisoning  # type: ignore[method-assign]
    # It overflows in its third decode.
    adapters.publish(random_adapter(decoder, SHAPE, 3, strength=0.5), "bad/values")
    mixed = [*batch, asked(1, adapter="bad/values@v2")]
    results = asyncio.run(all_at_once(engine, mixed))
    assert poisoned[0] and isinstance(results[-1], AdapterOverflow) and "@v2" in results[-1].message
    assert [r.token_ids for r in results[:-1]] == [r.token_ids for r in want]  # type: ignore[union-attr]
    assert replayed.replays > 0
    replayed.check()


def from_token(model: PagedModel, monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[], bool]) -> None:
    """Make the logits of every row NaN while `is_bad`."""
    logits = model.logits

    def wrapped(*args: Any) -> Tensor:
        result = logits(*args)
        return torch.full_like(result, NAN) if is_bad() else result

    monkeypatch.setattr(model, "logits", wrapped)


def test_a_stream_that_overflows_later_ends_with_the_error_after_its_tokens(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(decoder, adapters)
    runner = engine.runners["generate"]
    first = runner.steps + 3
    from_token(runner.runner.decoder.model, monkeypatch, lambda: runner.steps > first)

    async def read() -> tuple[list[TokenDelta], BaseException | None]:
        stream = await generate(engine, asked(1, adapter="acme/good", max_new_tokens=40))
        deltas: list[TokenDelta] = []
        try:
            async for delta in stream:
                deltas.append(delta)
        except AdapterOverflow as error:
            return deltas, error
        return deltas, None

    deltas, error = asyncio.run(read())
    assert isinstance(error, AdapterOverflow)
    assert sum(len(delta.token_ids) for delta in deltas) <= 3


def test_a_preempted_request_that_overflows_ends(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(decoder, adapters, kv_cache_tokens=192)
    runner = engine.runners["generate"]
    from_token(runner.runner.decoder.model, monkeypatch, lambda: runner.load().preemptions > 0)
    batch = [asked(1, adapter="acme/good", max_new_tokens=60) for _ in range(5)]
    results = asyncio.run(all_at_once(engine, batch))
    assert runner.load().preemptions > 0
    assert any(isinstance(result, AdapterOverflow) for result in results)


def test_the_base_model_alone_gives_another_error(
    decoder: FrozenBase, adapters: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(decoder, adapters)
    from_token(engine.runners["generate"].runner.decoder.model, monkeypatch, lambda: True)
    with pytest.raises(BaseOverflow, match="base model overflows"):
        asyncio.run(collect(engine, prompt="hello", max_new_tokens=3))
    assert engine.failure() is None


@pytest.mark.parametrize("name", ["bad/values", "bad/inside"])
def test_what_overflowed_is_not_found_again(
    name: str, decoder: FrozenBase, adapters: AdapterStore, start_engine: Start
) -> None:
    engine = start_engine(decoder, adapters, max_batch_tokens=40)
    for _ in range(2):
        with pytest.raises(AdapterOverflow):
            asyncio.run(collect(engine, prompt="x" * 150, adapter=name))
        pages = engine.runners["generate"].planner.pages
        assert not pages._page_of and not pages._idle


@pytest.mark.parametrize("settings", [{}, {"max_batch_tokens": 40}], ids=["whole", "chunked"])
def test_a_later_owner_of_its_pages_computes_the_same(
    settings: dict[str, int], decoder: FrozenBase, adapters: AdapterStore, start_engine: Start
) -> None:
    batch = [asked(number, adapter="acme/good", max_new_tokens=40) for number in range(3)]
    want = asyncio.run(all_at_once(start_engine(decoder, adapters, kv_cache_tokens=256), batch))
    engine = start_engine(decoder, adapters, kv_cache_tokens=256, **settings)
    for _ in range(2):
        # All pages.
        with pytest.raises(AdapterOverflow):
            asyncio.run(collect(engine, prompt="x" * 250, adapter="bad/keys", max_new_tokens=4))
        check(batch, asyncio.run(all_at_once(engine, batch)), want)


TINY: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
GROUPED = TINY | {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3}
# How many normalizations of how many are watched.
ARCHITECTURES: dict[str, tuple[PretrainedConfig, int, int]] = {
    "normalized before": (LlamaConfig(**GROUPED), 1, 5),
    "normalized queries and keys": (Qwen3Config(**GROUPED), 5, 9),
    "normalized twice": (Gemma2Config(**GROUPED, attn_logit_softcapping=5.0, final_logit_softcapping=5.0), 5, 9),
    "normalized after": (
        OPTConfig(**TINY, ffn_dim=128, word_embed_proj_dim=64, do_layer_norm_before=False, init_std=0.3),
        4,
        4,
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_normalization_hides_an_overflow(name: str, store: AdapterStore, start_engine: Start) -> None:
    config, watched, norms = ARCHITECTURES[name]
    torch.manual_seed(0)
    base = freeze_base(AutoModelForCausalLM.from_config(config), byte_tokenizer(), "tiny")
    before = {key: tensor.clone() for key, tensor in base.model.state_dict().items()}
    store.publish(random_adapter(base, SHAPE, 1, strength=0.5), "acme/good")
    for kind, bundle in overflowing(base).items():
        store.publish(bundle, f"bad/{kind}")
    batch = [asked(n, adapter=a) for n in range(2) for a in ("acme/good", *(f"bad/{k}" for k in overflowing(base)))]
    engine = start_engine(base, store)
    modules = [m for m in engine.runners["generate"].runner.decoder.model.model.modules() if is_norm(m)]
    assert (sum(bool(m._forward_hooks) for m in modules), len(modules)) == (watched, norms)
    assert all(torch.equal(before[key], tensor) for key, tensor in base.model.state_dict().items())
    check(batch, asyncio.run(all_at_once(engine, batch)), asyncio.run(all_at_once(engine, sound(batch))))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_classification_that_overflows_ends_alone(
    kind: str, decoder: FrozenBase, encoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    base = {"encoder": encoder, "decoder": decoder}[kind]
    labels = {"labels": ["no", "yes"], "strength": 0.5}
    good = random_adapter(base, SHAPE, 1, **labels)  # type: ignore[arg-type]
    store.publish(good, "acme/good")
    store.publish(AdapterBundle(good.config, good.tensors | {"head.weight": torch.full((2, 64), 3e38)}), "bad/head")
    bad = overflowing(base, **labels)
    for name, bundle in bad.items():
        store.publish(bundle, f"bad/{name}")
    texts = ["abc", "some longer words of text", "x" * 50]
    engine = start_engine(base, store, classify_max_batch=64)
    want = asyncio.run(classify(engine, "acme/good", texts))

    async def together() -> list[Any]:
        names = [name for bad_name in ("head", *bad) for name in (f"bad/{bad_name}", "acme/good")]
        # Each alone, too: few keys, and no padding.
        calls = [(name, part) for name in names for part in (texts, texts[:1])]
        results = await asyncio.gather(*(classify(engine, *call) for call in calls), return_exceptions=True)
        await settled(engine)
        return list(zip(calls, results, strict=True))

    for (name, part), result in asyncio.run(together()):
        if name == "acme/good":
            for mine, theirs in zip(result.results, want.results, strict=False):
                assert mine.probabilities == pytest.approx(theirs.probabilities, abs=1e-5)
        else:
            assert isinstance(result, AdapterOverflow), (name, part, result)
            assert name in result.message


def test_the_log_names_the_adapter_once_a_minute(
    decoder: FrozenBase,
    adapters: AdapterStore,
    start_engine: Start,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = start_engine(decoder, adapters)
    digest = adapters.resolve("bad/values").digest

    def warnings() -> list[str]:
        with caplog.at_level(logging.WARNING, "sera_serve.engine"), pytest.raises(AdapterOverflow):
            asyncio.run(collect(engine, prompt="hello", adapter="bad/values"))
        return [record.getMessage() for record in caplog.records if "overflows" in record.getMessage()]

    assert [f"bad/values@v1 ({digest})" in line for line in warnings()] == [True]
    assert len(warnings()) == 1
    monkeypatch.setattr("sera_serve.engine.overflow._WARN_EVERY_S", 0.0)
    assert len(warnings()) == 2


def test_scores_that_are_not_finite_choose_no_token() -> None:
    rows = [
        [1.0, 3.0, 2.0],
        [1.0, NAN, 2.0],
        [NAN, NAN, NAN],
        [1.0, INF, 2.0],
        [-INF, -INF, -INF],
        [-INF, 0.0, -INF],
        [NAN, INF, -INF],
    ]
    scores = torch.tensor(rows)
    want = [1, NO_TOKEN, NO_TOKEN, NO_TOKEN, NO_TOKEN, 1, NO_TOKEN]
    assert next_tokens(scores).tolist() == want
    for temperature in (0.0, 1e-3):
        for top_k, top_p in ((0, 1.0), (2, 1.0), (0, 0.5)):
            drawn = SamplingRows(
                torch.full((len(rows),), temperature),
                torch.full((len(rows),), top_k, dtype=torch.int32),
                torch.full((len(rows),), top_p),
                torch.arange(len(rows), dtype=torch.int32),
            )
            noisy = perturbed_scores(scores, drawn)
            assert next_tokens(noisy).tolist() == want, (temperature, top_k, top_p)


@pytest.mark.parametrize("temperature", [1e-44, 1e-38, 1e-30, 1e-7])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.randn(5, 40) * 10
    drawn = SamplingRows(
        torch.full((5,), temperature),
        torch.zeros(5, dtype=torch.int32),
        torch.ones(5),
        torch.arange(5, dtype=torch.int32),
    )
    noisy = perturbed_scores(logits, drawn)
    assert next_tokens(noisy).tolist() == logits.argmax(1).tolist()
