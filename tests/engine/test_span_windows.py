"""Long texts for token-classify: spans of the whole text by windows, as by hand, in training and on the server."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase, preprocess
from sera_serve.base.spans import Span, bio_tags, encode_tags
from sera_serve.engine import Principal, Score, ServingEngine, Spans, row_calls
from sera_serve.errors import DeadlineExceeded, InvalidRequest
from sera_serve.layers import attach_layers, detach_adapter
from sera_serve.sera_config import SeraConfig
from sera_serve.trainer.data.labelled import Examples
from sera_serve.trainer.data.targets import Example
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tables.faults import Row
from sera_serve.trainer.tasks import TokenClassifyTask
from sera_serve.trainer.tasks.token_classify import span_metrics
from support.engine import classify, settled, until
from support.factories import byte_tokenizer, random_decoder, random_encoder
from support.head_tasks import regressor, span_finder
from support.span_windows import owner_of, spans_by_hand, windows_of

Start = Callable[..., ServingEngine]
ROOM = 14
WORDS = ["Anna", "met", "Bob", "in", "Rome", "Zoë", "🙂", "the", "brown", "fox", "Łódź"]


@pytest.fixture(scope="module")
def encoder() -> FrozenBase:
    """An encoder whose tokenizer puts a token before a text and one after it."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 256), ("<eos>", 257)]
    )
    return random_encoder(tokenizer=tokenizer)


def text_of(characters: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    text = ""
    while len(text) < characters:
        text += draw.choice(WORDS) + " "
    return text[:characters]


def placed(spans: list[Span]) -> list[tuple[int, int, str, str]]:
    return [(span.start, span.end, span.label, span.text) for span in spans]


def test_every_token_is_decided_by_one_window_with_the_most_context(encoder: FrozenBase) -> None:
    for max_length in (3, 4, 5, 6, 7, 10, 16):
        room = max_length - 2
        for length in range(1, 3 * room + 5):
            (rows,) = encoder.preprocessor.windows(["a" * length], max_length)
            if len(rows) == 1:
                assert length <= room and rows[0].window is None
                continue
            windows = windows_of(length, room)
            assert len(rows) == len(windows)
            decided: list[int] = []
            for row, (begin, end) in zip(rows, windows, strict=True):
                assert row.window is not None and list(row.input_ids) == [256, *[64] * (end - begin), 257]
                assert len(row) <= max_length and not row.is_cut
                assert row.offsets is not None
                own = row.offsets[row.window.first : row.window.last]
                own_tokens = [start for start, after in own if after > start]
                decided += own_tokens
                assert all(owner_of(token, windows) == row.window.index for token in own_tokens)
            assert decided == list(range(length))


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_spans_of_long_texts_are_those_made_by_hand(
    kind: str, encoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    base = random_decoder() if kind == "decoder" else encoder
    bundle = span_finder(base, 3, max_length=ROOM + 2)
    store.publish(bundle, "acme/spans")
    texts = [text_of(length, seed) for seed, length in enumerate((5, ROOM - 2, ROOM + 3, 40, 90, 200))]
    results = asyncio.run(classify(start_engine(base, store), "acme/spans", texts)).results
    late = 0
    for text, result in zip(texts, results, strict=True):
        assert isinstance(result, Spans) and not result.truncated
        want = spans_by_hand(base, bundle, text)
        assert placed(result.spans) == placed(want)
        assert [span.score for span in result.spans] == pytest.approx([span.score for span in want], rel=1e-3)
        late += sum(span.start > 2 * ROOM for span in want)
    assert late > 3, "the check has nothing to compare"


def test_each_adapter_of_a_call_has_its_own_windows(store: AdapterStore, start_engine: Start) -> None:
    base = random_decoder()
    store.publish(span_finder(base, 3, max_length=16), "acme/short")
    store.publish(span_finder(base, 3, max_length=24), "acme/long")
    store.publish(regressor(base, 4, max_length=20), "acme/number")
    engine = start_engine(base, store)
    texts = [text_of(70), "Bob", text_of(33, 1)]
    names = ["acme/number", "acme/short", "acme/long", "acme/short"]
    found = asyncio.run(engine.classify_each(names, texts, Principal("acme")))
    for name, results in zip(names, found, strict=True):
        alone = asyncio.run(classify(engine, name, texts))
        assert len(results.results) == len(alone.results) == len(texts)
        for together, single in zip(results.results, alone.results, strict=True):
            # A product may add up in another order when its batch has more rows.
            if isinstance(single, Spans):
                assert isinstance(together, Spans) and placed(together.spans) == placed(single.spans)
                scores = [span.score for span in single.spans]
                assert [span.score for span in together.spans] == pytest.approx(scores, rel=1e-4)
            else:
                assert isinstance(together, Score) and isinstance(single, Score)
                assert together.score == pytest.approx(single.score, rel=1e-4)
        assert results.prompt_tokens == alone.prompt_tokens


def test_a_text_has_a_bound_on_its_windows(
    store: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = random_decoder()
    bundle = span_finder(base, 3, max_length=16)
    store.publish(bundle, "acme/spans")
    engine = start_engine(base, store)
    monkeypatch.setattr(preprocess, "MAX_WINDOWS", 3)
    # Windows of 16 tokens that begin 12 tokens after each other.
    whole, cut, far = "ab " * 13 + "x", "ab " * 13 + "xy", "ab " * 5000
    assert (len(whole), len(cut)) == (40, 41)
    results = asyncio.run(classify(engine, "acme/spans", [whole, cut, far])).results
    assert [result.truncated for result in results if isinstance(result, Spans)] == [False, True, True]
    assert all(isinstance(result, Spans) and all(span.end <= 40 for span in result.spans) for result in results)
    monkeypatch.undo()
    (rows,) = base.preprocessor.windows(["ab " * 100_000], 16)
    assert len(rows) == preprocess.MAX_WINDOWS and rows[-1].is_cut
    # What is kept of the text does not grow with it.
    assert len(rows[0].text or "") < 20_000
    many = ["ab " * 300] * 40
    with pytest.raises(InvalidRequest, match="more than 32768 tokens to look for spans in, the overlaps"):
        asyncio.run(classify(engine, "acme/spans", many))


def test_the_spans_of_long_texts_are_joined_beside_the_event_loop(
    store: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = random_decoder()
    store.publish(span_finder(base, 3, max_length=16), "acme/spans")
    engine = start_engine(base, store)
    names: list[str] = []
    joined = row_calls.joined_windows

    def noted(*arguments: Any) -> Any:
        names.append(threading.current_thread().name)
        return joined(*arguments)

    monkeypatch.setattr(row_calls, "joined_windows", noted)
    for text in (text_of(200), text_of(9)):
        asyncio.run(classify(engine, "acme/spans", [text]))
    assert names == ["tokenizing", threading.current_thread().name]


def test_a_call_whose_spans_are_not_joined_yet_is_in_flight_and_has_its_deadline(
    store: AdapterStore, start_engine: Start
) -> None:
    base = random_decoder()
    store.publish(span_finder(base, 3, max_length=16), "acme/spans")
    engine = start_engine(base, store)
    free = threading.Event()

    async def main() -> None:
        # Long texts of others have all threads.
        others = [asyncio.ensure_future(engine._tokenizing.run(free.wait)) for _ in range(2)]
        call = asyncio.ensure_future(classify(engine, "acme/spans", [text_of(200)]))
        await until(lambda: engine._tokenizing.calls() == 3)
        assert engine.waiting() + engine.running() == 0
        assert engine.in_flight("acme") == 1
        with pytest.raises(DeadlineExceeded):
            await engine.classify("acme/spans", [text_of(200)], Principal("acme"), timeout_s=0.5)
        assert engine.in_flight("acme") == 1
        free.set()
        assert len((await call).results) == 1
        await asyncio.gather(*others)
        await settled(engine)

    try:
        asyncio.run(main())
    finally:
        free.set()


def test_a_window_knows_that_a_span_began_before_it() -> None:
    tags = bio_tags(["a"])
    span = Span(2, 8, "a", 1.0, "cdefgh")
    ranges = [(4, 5), (5, 7), (7, 8), (9, 10)]
    assert [tags[tag] for tag in encode_tags(ranges, [span], tags, -1, goes_on=True)] == ["I-a", "I-a", "I-a", "O"]
    # A span whose first character no token stands for begins at its first token.
    assert [tags[tag] for tag in encode_tags(ranges, [span], tags, -1)] == ["B-a", "I-a", "I-a", "O"]
    whole = [None, (1, 3), (3, 5), (5, 8)]
    assert encode_tags(whole, [span], tags, -1, goes_on=True) == [-1, 1, 2, 2]


def test_evaluation_in_training_gives_what_the_server_gives(store: AdapterStore, start_engine: Start) -> None:
    base = random_decoder()
    bundle = span_finder(base, 3, max_length=16)
    store.publish(bundle, "acme/spans")
    texts = [text_of(length, seed) for seed, length in enumerate((9, 60, 110, 31))]
    results = asyncio.run(classify(start_engine(base, store), "acme/spans", texts)).results
    served = [result.spans for result in results if isinstance(result, Spans)]
    # Every second span that is found is one that a person has marked.
    marked = [tuple(Span(s.start, s.end, s.label, 1.0, s.text) for s in spans[::2]) for spans in served]
    examples = [
        Example(text, spans, Row({}, number, number))
        for number, (text, spans) in enumerate(zip(texts, marked, strict=True))
    ]
    config = bundle.config
    shapes = {
        path: SeraConfig(spec.rank, spec.split, spec.scaling * spec.rank, (path,), spec.use_mixer)
        for path, spec in config.modules.items()
    }
    attach_layers(base.model, shapes)
    try:
        kinds = list(dict.fromkeys(tag[2:] for tag in (config.labels or [])[1:]))
        data = Examples(examples, examples, [], {}, [], kinds)
        settings = TrainSettings(base="-", store=Path("-"), name="a/b", task="token-classify", train=Path("-"))
        task = TokenClassifyTask(settings, base, data, 16)
        assert task.tags == config.labels
        task.model.load_stored_tensors(bundle.tensors)
        metrics = task.evaluate(task.eval_rows)
    finally:
        detach_adapter(base.model)
    assert len(task.eval_rows) > len(texts)
    assert task.notes[0] == "3 of 4 training rows have more than 16 tokens and were read in windows that overlap"
    want = span_metrics(marked, served)
    assert {name: metrics[name] for name in want} == want and 0.5 < want["f1"] < 1
    assert torch.isfinite(torch.tensor(metrics["loss"]))
