"""Sentence pairs: the tokenizer gets both texts, segments reach the model, and the server answers as in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import processors
from trainer_samples import settings_for, write_csv

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase, ModelInputs
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import build_app
from sera_serve.trainer.data.labelled import Example, Examples
from sera_serve.trainer.data.targets import load_classify_data
from sera_serve.trainer.run import train_adapter
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tables.faults import Row
from sera_serve.trainer.tasks import ClassifyTask
from support.factories import byte_tokenizer, random_decoder, random_encoder
from support.live_server import live_server


@pytest.fixture
def bert() -> FrozenBase:
    """An encoder with segments: <bos> first <eos> second <eos>."""
    tokenizer = byte_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        pair="<bos> $A <eos> $B:1 <eos>:1",
        special_tokens=[("<bos>", 256), ("<eos>", 257)],
    )
    return random_encoder(tokenizer=tokenizer)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [["dog", "cat", "same"], ["dog", "sun", "other"], ["sun", "moon", "same"], ["moon", "cat", "other"]]
    long = [["dog " * 30, "sun " * 9, "other"], ["cat", "dog " * 40, "same"]]
    return write_csv(tmp_path / "pairs.csv", rows * 3 + long, ("text", "second", "label"))


def settings(pairs: Path, **options: Any) -> TrainSettings:
    return settings_for(Path("bert"), pairs.parent, pairs, text_pair_column="second", max_length=24, **options)


def test_the_tokens_of_a_pair_are_the_tokenizers_own(bert: FrozenBase, pairs: Path) -> None:
    texts: list[str | tuple[str, str]] = [("ab", "cde"), "ab", ("a" * 50, "b" * 50), ("a" * 9000, "bc")]
    data = Examples([Example(text, "same", Row({}, 1, 1)) for text in texts], [], [], {}, labels=["same"])
    task = ClassifyTask(settings(pairs, pooling="cls"), bert, data, 24)
    assert task.notes == ["2 of 4 training rows were cut to 24 tokens"]
    rows = [row.inputs for row in task.train_rows]
    for text, row in zip(texts, rows, strict=True):
        parts = (text,) if isinstance(text, str) else text
        expected = bert.tokenizer(*parts, truncation=True, max_length=24)
        assert list(row.input_ids) == expected["input_ids"]
        assert list(row.token_type_ids or [0] * len(row)) == expected["token_type_ids"]
    padded = task.collate(task.train_rows)
    assert padded["token_type_ids"][0].tolist() == [0] * 4 + [1] * 4 + [0] * 16
    assert padded["token_type_ids"][1].tolist() == [0] * 24
    assert "token_type_ids" not in task.collate(task.train_rows[1:2])


@pytest.mark.parametrize("method", ["sera", "head-only"])
def test_segments_reach_the_model(bert: FrozenBase, pairs: Path, method: str) -> None:
    options = settings(pairs, method=method, pooling="cls", eval_fraction=0)
    data = load_classify_data(options)
    torch.manual_seed(0)
    task = ClassifyTask(options, bert, data, 24)
    found = task.logits(task.train_rows[:1])[0]
    first, second = data.train[0].text
    inputs = bert.tokenizer(first, second, return_tensors="pt")
    head = task.model.head
    assert head is not None
    with torch.no_grad():
        expected = head(bert.model(**inputs).last_hidden_state[:, 0])[0]
        blind = head(bert.model(input_ids=inputs["input_ids"]).last_hidden_state[:, 0])[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - blind).abs().max() > 1e-3


def test_a_tokenizer_without_separators_gets_a_line_break() -> None:
    base = random_decoder()
    (row,) = base.preprocessor.rows([("ab", "cd")], 24)
    assert row == ModelInputs.of(base.tokenizer("ab\ncd")["input_ids"])


def test_pairs_over_http_get_the_trainers_answers(bert: FrozenBase, pairs: Path) -> None:
    options = settings(pairs, eval=pairs, epochs=1)
    result = train_adapter(options, base=bert)
    store = AdapterStore(options.store)
    serve = ServeSettings(store=store.root, pool_mib=4)
    data = load_classify_data(options)
    texts = [item.text for item in data.eval]
    inputs = [{"text": text[0], "text_pair": text[1]} for text in texts]
    with live_server(build_app(ServingEngine(bert, store, serve), store, serve)) as url:
        answer = httpx.post(f"{url}/v1/classify", json={"adapter": "acme/tiny", "inputs": inputs}, timeout=30).json()
    rows = answer["results"]
    right = sum(row["label"] == item.target for row, item in zip(rows, data.eval, strict=True))
    assert right / len(rows) == result.metrics["accuracy"]
    loss = -sum(
        torch.tensor(row["probabilities"][item.target]).log() for row, item in zip(rows, data.eval, strict=True)
    )
    assert float(loss) / len(rows) == pytest.approx(result.metrics["loss"], rel=1e-4)
