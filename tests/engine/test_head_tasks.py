"""Numbers, several labels and spans: adapters of different tasks in one batch, each as alone on its merged base."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from adapters_store import AdapterBundle, AdapterStore
from sera_serve.base import FrozenBase, freeze_base
from sera_serve.engine import LabelScores, LabelSet, Principal, Score, ServingEngine, Spans
from sera_serve.errors import AdapterOverflow, InvalidRequest, UnsupportedTask
from support.engine import classify
from support.factories import byte_tokenizer, encoded, merged, random_adapter
from support.head_tasks import SHAPE, labeller, regressor, span_finder
from support.span_windows import spans_by_hand

Start = Callable[..., ServingEngine]
ACME = Principal("acme")
TEXTS = ["Anna met Bob", "in Rome", "x", "the quick brown fox jumps over the lazy dog " * 3, "Zoë 🙂 à Łódź"]
NAMES = ("acme/number", "acme/many", "acme/spans", "acme/one")


def publish(base: FrozenBase, store: AdapterStore) -> dict[str, AdapterBundle]:
    bundles = {
        "acme/number": regressor(base, 1),
        "acme/many": labeller(base, 2, ["a", "b", "c"]),
        "acme/spans": span_finder(base, 3),
        "acme/one": random_adapter(base, SHAPE, 4, ["yes", "no"], 0.5, max_length=40),
    }
    for name, bundle in bundles.items():
        store.publish(bundle, name)
    return bundles


def scores(base: FrozenBase, bundle: AdapterBundle, text: str) -> Tensor:
    """The head's scores of a text, or of each of its tokens, on the merged base."""
    config = bundle.config
    ids, mask = encoded(base, [text], config.max_length or 64)
    whole = merged(base, bundle)
    if config.pooling is None:
        states = whole.hidden_states(ids, mask)[0]
    else:
        states = whole.pooled_states(ids, mask, config.pooling)[0]
    return states @ bundle.tensors["head.weight"].T + bundle.tensors["head.bias"]


def check(base: FrozenBase, bundle: AdapterBundle, text: str, result: object) -> None:
    want, config = scores(base, bundle, text), bundle.config
    if config.task == "regress":
        assert isinstance(result, Score)
        assert result.score == pytest.approx(float(want[0]), rel=1e-3, abs=1e-4)
    elif config.task == "token-classify":
        assert isinstance(result, Spans)
        found = spans_by_hand(base, bundle, text)
        assert [(s.start, s.end, s.label, s.text) for s in result.spans] == [
            (s.start, s.end, s.label, s.text) for s in found
        ]
        assert [s.score for s in result.spans] == pytest.approx([s.score for s in found], rel=1e-3)
        assert all(text[s.start : s.end] == s.text for s in result.spans)
        assert not result.truncated
    elif config.multi_label:
        assert isinstance(result, LabelSet)
        assert list(result.probabilities) == config.labels
        assert list(result.probabilities.values()) == pytest.approx(want.sigmoid().tolist(), rel=1e-3, abs=1e-5)
        assert result.labels == [label for label, value in result.probabilities.items() if value >= 0.5]
    else:
        assert isinstance(result, LabelScores)
        assert list(result.probabilities.values()) == pytest.approx(want.softmax(0).tolist(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_adapters_of_all_tasks_share_a_batch(
    kind: str, request: pytest.FixtureRequest, store: AdapterStore, start_engine: Start
) -> None:
    base: FrozenBase = request.getfixturevalue(kind)
    bundles = publish(base, store)
    engine = start_engine(base, store)

    async def main() -> None:
        calls = [classify(engine, name, TEXTS) for name in (*NAMES, *NAMES)]
        each = await engine.classify_each(NAMES, TEXTS, ACME)
        for result in [*await asyncio.gather(*calls), *each]:
            for text, row in zip(TEXTS, result.results, strict=True):
                check(base, bundles[result.adapter], text, row)

    asyncio.run(main())
    spans = asyncio.run(classify(engine, "acme/spans", TEXTS)).results
    assert any(row.spans for row in spans if isinstance(row, Spans)), "the check has nothing to compare"


def test_spans_are_the_same_where_others_read_more(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    """The rows of one call are tokenized once, for the adapter that reads most."""
    store.publish(span_finder(decoder, 3, max_length=16), "acme/spans")
    store.publish(regressor(decoder, 4, max_length=64), "acme/number")
    engine = start_engine(decoder, store)
    alone = asyncio.run(classify(engine, "acme/spans", TEXTS)).results
    both = asyncio.run(engine.classify_each(["acme/number", "acme/spans"], TEXTS, ACME))
    for got, want in zip(both[1].results, alone, strict=True):
        assert isinstance(got, Spans) and isinstance(want, Spans)
        assert got.truncated == want.truncated
        assert [(s.start, s.end, s.label) for s in got.spans] == [(s.start, s.end, s.label) for s in want.spans]


def test_what_has_no_spans_is_refused(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish(span_finder(decoder, 3), "acme/spans")
    engine = start_engine(decoder, store)
    with pytest.raises(InvalidRequest, match="input 1 is a sentence pair") as refusal:
        asyncio.run(classify(engine, "acme/spans", ["a", ("a", "b")]))
    assert refusal.value.param == "inputs[1]"
    with pytest.raises(InvalidRequest, match="more than 32768 tokens to look for spans in"):
        asyncio.run(classify(engine, "acme/spans", ["a" * 64] * 513))
    monkeypatch.setattr(decoder.preprocessor, "has_offsets", False)
    with pytest.raises(UnsupportedTask, match="serve a base with a fast tokenizer"):
        asyncio.run(classify(engine, "acme/spans", ["a"]))


def test_every_task_embeds(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    bundles = publish(decoder, store)
    engine = start_engine(decoder, store)
    for name, bundle in bundles.items():
        result = asyncio.run(engine.embed(name, TEXTS[:3], ACME, normalize=False))
        for text, vector in zip(TEXTS, result.vectors, strict=False):
            ids, mask = encoded(decoder, [text], 64)
            pooling = bundle.config.pooling or decoder.default_pooling
            want = merged(decoder, bundle).pooled_states(ids, mask, pooling)[0]
            np.testing.assert_allclose(vector, want.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [regressor, span_finder])
def test_an_overflow_ends_its_own_request(
    decoder: FrozenBase,
    store: AdapterStore,
    start_engine: Start,
    make: Callable[[FrozenBase, int], AdapterBundle],
) -> None:
    good, bad = make(decoder, 1), make(decoder, 2)
    bad.tensors["head.weight"].clamp_(-1, 1).mul_(3e38)
    store.publish(good, "acme/good")
    store.publish(bad, "acme/bad")
    engine = start_engine(decoder, store)

    async def main() -> None:
        right, wrong = await asyncio.gather(
            classify(engine, "acme/good", TEXTS), classify(engine, "acme/bad", TEXTS), return_exceptions=True
        )
        assert isinstance(wrong, AdapterOverflow)
        assert not isinstance(right, BaseException) and len(right.results) == len(TEXTS)

    asyncio.run(main())


@pytest.mark.parametrize("task", ["generate", "regress"])
def test_each_task_is_sent_to_its_route(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start, task: str
) -> None:
    engine = start_engine(decoder, store)
    if task == "generate":
        store.publish(random_adapter(decoder, SHAPE, 1), "acme/a")
        with pytest.raises(UnsupportedTask, match="send it to /v1/generate"):
            asyncio.run(classify(engine, "acme/a", ["x"]))
    else:
        store.publish(regressor(decoder, 1), "acme/a")
        from sera_serve.engine import GenerateParams
        from support.engine import generate

        with pytest.raises(UnsupportedTask, match="is for regress; send it to /v1/classify"):
            asyncio.run(generate(engine, GenerateParams(adapter="acme/a", prompt="x")))


def test_a_pooler_reads_no_tokens_of_the_batch(store: AdapterStore, start_engine: Start) -> None:
    """BERT's pooler reads one state a text: an update for every token would be written beyond its outputs."""
    torch.manual_seed(0)
    shape = BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=259
    )
    base = freeze_base(BertModel(shape), byte_tokenizer(), "pooled-bert", "encoder")
    bundle = regressor(base, 1)
    assert "pooler.dense" in bundle.config.modules
    store.publish(bundle, "acme/number")
    engine = start_engine(base, store)
    texts = [f"{text} {number}" for number in range(8) for text in TEXTS]
    for text, result in zip(texts, asyncio.run(classify(engine, "acme/number", texts)).results, strict=True):
        check(base, bundle, text, result)


def test_an_update_is_of_the_tokens_of_the_batch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the rows of a layer, nothing is computed for others."""
    from sera_kernels import AdapterBatch
    from sera_serve.layers import AdapterContext, served_linear

    seen: list[int] = []
    monkeypatch.setattr(served_linear, "add_updates", lambda x, *rest: seen.append(len(x)))
    context = AdapterContext(torch.zeros(1), None)  # type: ignore[arg-type]
    group = served_linear.SharedInputGroup(context, [0])
    group.join(torch.nn.Linear(4, 4), 4)
    with context.run(AdapterBatch(torch.zeros(6, dtype=torch.int32))):
        group.output(0, torch.ones(2, 4))
        assert seen == []
        group.output(0, torch.ones(6, 4))
    assert seen == [6]
