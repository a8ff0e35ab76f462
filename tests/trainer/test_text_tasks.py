"""Tasks regress, classify with several labels, and token-classify: what they read, learn, measure and publish."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from span_samples import as_words, marked
from tokenizers import processors
from trainer_samples import WORDS, settings_for, write_csv, write_jsonl

from adapters_store import AdapterBundle, AdapterStore, Task
from sera_serve.base import FrozenBase, load_base, preprocess
from sera_serve.base.spans import Span, bio_tags, decode_tags, encode_tags, token_ranges
from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.data.targets import load_classify_data
from sera_serve.trainer.run import TrainResult, train_adapter
from sera_serve.trainer.settings import TrainSettings, load_options
from sera_serve.trainer.tables.faults import InvalidData
from sera_serve.trainer.tasks import TASKS
from sera_serve.trainer.tasks.multi_label import label_set_metrics
from sera_serve.trainer.tasks.regress import regression_metrics
from sera_serve.trainer.tasks.token_classify import span_metrics
from support.factories import byte_tokenizer, encoded, random_encoder


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> FrozenBase:
    return load_base(str(tiny_base))


def numbers(count: int, seed: int = 0, factor: float = 1.0) -> list[list[str]]:
    """Texts of words; the number is that of animals among them."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(2, 5))]
        rows.append([" ".join(words), str(factor * sum(word in ("dog", "cat", "fish") for word in words))])
    return rows


def label_sets(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of words; the labels are animal, colour, both or none."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(1, 3))]
        labels = [
            label
            for label, of in (("animal", ("dog", "cat", "fish")), ("colour", ("red", "blue")))
            if set(of) & {*words}
        ]
        rows.append({"text": " ".join(words), "label": labels})
    return rows


def published(settings: TrainSettings, result: TrainResult) -> AdapterBundle:
    return AdapterStore(settings.store).load(result.digest)


def run(base: FrozenBase, folder: Path, train: Path, **options: Any) -> tuple[TrainResult, AdapterBundle]:
    settings = settings_for(Path("tiny"), folder, train, learning_rate=1e-2, **options)
    result = train_adapter(settings, base=base)
    return result, published(settings, result)


@pytest.mark.parametrize(("method", "factor"), [("sera", 1e6), ("head-only", 1.0)])
def test_regress_learns_numbers_of_any_size(base: FrozenBase, tmp_path: Path, method: str, factor: float) -> None:
    train = write_csv(tmp_path / "train.csv", numbers(64, factor=factor))
    result, bundle = run(base, tmp_path, train, task="regress", method=method, epochs=3)
    assert set(result.metrics) == {"loss", "pearson", "spearman", "mse"}
    assert result.metrics["pearson"] > 0.3
    config = bundle.config
    assert (config.task, config.labels, config.num_labels, config.pooling) == ("regress", None, 1, "last_token")
    assert bundle.tensors["head.weight"].shape == (1, 32)
    # The stored head is in the units of the numbers.
    rows = numbers(30, seed=9, factor=factor)
    predicted = predict(base, bundle, [row[0] for row in rows])
    assert regression_metrics([float(row[1]) for row in rows], predicted)["pearson"] > 0.3
    assert 0.5 * factor < sum(predicted) / len(predicted) < 3 * factor


def predict(base: FrozenBase, bundle: AdapterBundle, texts: list[str]) -> list[float]:
    """The numbers of a head-only or adapted bundle, by the trainer's own layers."""
    from sera_serve.layers import adapter_tensors, attach_layers, detach_adapter
    from sera_serve.sera_config import SeraConfig

    config = bundle.config
    attach_layers(
        base.model,
        {
            path: SeraConfig(spec.rank, spec.split, spec.scaling * spec.rank, (path,), spec.use_mixer)
            for path, spec in config.modules.items()
        },
    )
    try:
        for name, tensor in adapter_tensors(base.model).items():
            tensor.copy_(bundle.tensors[name])
        ids, mask = encoded(base, texts, config.max_length or 64)
        assert config.pooling is not None
        with torch.no_grad():
            states = base.pooled_states(ids, mask, config.pooling)
            scores = torch.nn.functional.linear(states, bundle.tensors["head.weight"], bundle.tensors["head.bias"])
        return [float(score) for score in scores[:, 0]]
    finally:
        detach_adapter(base.model)


def test_a_stored_head_of_a_regression_is_loaded_with_the_same_bits(base: FrozenBase, tmp_path: Path) -> None:
    settings = settings_for(
        Path("tiny"), tmp_path, write_csv(tmp_path / "t.csv", numbers(20, factor=1e5)), task="regress"
    )
    kind = TASKS["regress"]
    model = kind.build(settings, base, kind.load(settings, None), 32).model
    assert model.head is not None
    torch.nn.init.normal_(model.head.weight)
    before = model.head.weight.detach().clone(), model.head.bias.detach().clone()
    stored = {name: tensor.clone() for name, tensor in model.stored_tensors().items()}
    torch.nn.init.zeros_(model.head.weight)
    model.load_stored_tensors(stored)
    assert torch.equal(model.head.weight, before[0]) and torch.equal(model.head.bias, before[1])
    assert not torch.equal(stored["head.weight"], before[0])
    with pytest.raises(ValueError, match="another adapter"):
        model.load_stored_tensors({"head.bias": stored["head.bias"]})


def test_regress_takes_sentence_pairs_as_pairs(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        pair="<bos> $A <eos> $B <eos>",
        special_tokens=[("<bos>", 256), ("<eos>", 257)],
    )
    base = random_encoder(tokenizer=tokenizer)
    rows = [[text, text[::-1], number] for text, number in numbers(20)]
    train = write_csv(tmp_path / "pairs.csv", rows, header=("text", "other", "label"))
    settings = settings_for(Path("tiny"), tmp_path, train, task="regress", text_pair_column="other")
    kind = TASKS["regress"]
    task = kind.build(settings, base, kind.load(settings, None), 64)
    for row in task.train_rows:
        first, second = row.example.text
        assert list(row.inputs.input_ids) == base.tokenizer(first, second)["input_ids"]
        assert row.inputs.input_ids.count(257) == 2


def test_regress_goes_on_from_an_adapter(base: FrozenBase, tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", numbers(30))
    run(base, tmp_path, train, task="regress", method="head-only", epochs=1)
    fields = {"base": "tiny", "store": tmp_path / "store", "name": "acme/second", "task": "regress", "train": train}
    settings = TrainSettings.model_validate({**fields, "init_from": "acme/tiny", "epochs": 1})
    assert train_adapter(settings, base=base).metrics["mse"] >= 0


@pytest.mark.parametrize("name", ["regress", "classify", "token-classify"])
def test_batches_are_built_on_the_cpu(
    base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Task
) -> None:
    """Whatever the base's device is: a loop on a GPU pins the memory of batches, and then moves them."""
    train = {
        "regress": lambda: write_csv(tmp_path / "rows.csv", numbers(12)),
        "classify": lambda: write_jsonl(tmp_path / "rows.jsonl", label_sets(12)),
        "token-classify": lambda: write_jsonl(tmp_path / "rows.jsonl", marked(12)),
    }[name]()
    settings = settings_for(Path("tiny"), tmp_path, train, task=name, multi_label=name == "classify")
    task = TASKS[name].build(settings, base, TASKS[name].load(settings, None), 64)
    monkeypatch.setattr(FrozenBase, "device", torch.device("meta"))
    assert {tensor.device.type for tensor in task.collate(task.train_rows[:4]).values()} == {"cpu"}


@pytest.mark.parametrize("as_text", [False, True])
def test_several_labels_a_text(base: FrozenBase, tmp_path: Path, as_text: bool) -> None:
    rows = label_sets(64)
    if as_text:
        cells = [[row["text"], " | ".join(row["label"])] for row in rows]
        train = write_csv(tmp_path / "train.csv", cells)
    else:
        train = write_jsonl(tmp_path / "train.jsonl", rows)
    result, bundle = run(base, tmp_path, train, multi_label=True, epochs=3, method="head-only" if as_text else "sera")
    assert set(result.metrics) == {"loss", "micro_f1", "macro_f1", "subset_accuracy"}
    assert result.metrics["micro_f1"] > 0.4
    config = bundle.config
    assert (config.task, config.labels, config.multi_label) == ("classify", ["animal", "colour"], True)
    assert config.format_version == 3


@pytest.mark.parametrize(("kind", "words"), [("decoder", True), ("encoder", False)])
def test_spans_are_learned(tiny_base: Path, tiny_encoder: Path, tmp_path: Path, kind: str, words: bool) -> None:
    base = load_base(str(tiny_base if kind == "decoder" else tiny_encoder))
    rows = marked(48)
    train = write_jsonl(tmp_path / "train.jsonl", [as_words(row) for row in rows] if words else rows)
    options: dict[str, Any] = {"tokens_column": "tokens"} if words else {}
    result, bundle = run(base, tmp_path, train, task="token-classify", epochs=2, **options)
    assert set(result.metrics) == {"loss", "precision", "recall", "f1", "token_accuracy"}
    # Less than that of a guess.
    assert result.metrics["loss"] < 0.95 * math.log(5)
    assert bundle.config.labels == ["O", "B-person", "I-person", "B-place", "I-place"]
    assert (bundle.config.pooling, bundle.config.max_length) == (None, 64)


def test_words_and_spans_give_the_same_rows(base: FrozenBase, tmp_path: Path) -> None:
    kind = TASKS["token-classify"]
    # No sign follows a name, so that words end where spans do.
    rows = [row for row in marked(60) if all(row["text"][s["end"] : s["end"] + 1] in ("", " ") for s in row["spans"])]
    assert any(row["spans"] for row in rows)
    found = []
    for name, content in (("spans", rows), ("words", [as_words(row) for row in rows])):
        train = write_jsonl(tmp_path / f"{name}.jsonl", content)
        options: dict[str, Any] = {"tags_column": "tags"} if name == "words" else {}
        settings = settings_for(Path("tiny"), tmp_path, train, task="token-classify", eval_fraction=0.0, **options)
        data = kind.load(settings, None)
        found.append([(item.text, item.target) for item in data.train])
    assert found[0] == found[1]


def test_tags_of_tokens_become_the_spans_again() -> None:
    text = " Anna met Bob  in New York "
    spans = (Span(1, 5, "who", 1.0, "Anna"), Span(10, 13, "who", 1.0, "Bob"), Span(18, 26, "where", 1.0, "New York"))
    tags = bio_tags(["where", "who"])
    # Special tokens, word pieces, tokens with the space before them, and one of spaces alone.
    offsets = [
        (0, 0),
        (0, 3),
        (3, 5),
        (5, 9),
        (9, 13),
        (13, 15),
        (15, 17),
        (17, 21),
        (21, 22),
        (22, 26),
        (26, 27),
        (0, 0),
    ]
    ranges = token_ranges(text, offsets)
    assert ranges[0] is ranges[5] is ranges[8] is ranges[10] is None
    encoded = encode_tags(ranges, spans, tags, -100)
    named = [tags[tag] if tag >= 0 else "" for tag in encoded]
    assert named == ["", "B-who", "I-who", "O", "B-who", "", "O", "B-where", "", "I-where", "", ""]
    decoded = decode_tags(text, ranges, [max(tag, 0) for tag in encoded], [0.5] * len(encoded), tags)
    assert [(s.start, s.end, s.label, s.text) for s in decoded] == [(s.start, s.end, s.label, s.text) for s in spans]
    assert decoded[0].score == 0.5


def test_a_span_that_begins_with_i_or_changes_its_kind_is_one() -> None:
    tags = bio_tags(["a", "b"])
    ranges = [(0, 1), (1, 2), (2, 3), (3, 4)]
    found = decode_tags("wxyz", ranges, [tags.index(t) for t in ("I-a", "I-b", "B-b", "I-b")], [1, 1, 1, 0.5], tags)
    assert [(s.text, s.label, s.score) for s in found] == [("w", "a", 1), ("x", "b", 1), ("yz", "b", 0.75)]


def test_metrics_of_spans_are_of_whole_spans() -> None:
    one, other = Span(0, 3, "a", 1.0, "abc"), Span(4, 5, "b", 1.0, "x")
    wrong = [Span(0, 2, "a", 1.0, "ab"), Span(4, 5, "a", 1.0, "x")]
    assert span_metrics([[one, other], []], [[one], wrong]) == {"precision": 1 / 3, "recall": 0.5, "f1": 0.4}
    assert span_metrics([[]], [[]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    # The same span in another row is another one.
    assert span_metrics([[one], []], [[], [one]])["f1"] == 0.0


def test_metrics_that_are_not_defined_are_0() -> None:
    assert regression_metrics([1.0, 2.0], [3.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0, "mse": 2.5}
    assert regression_metrics([1.0], [2.0]) == {"pearson": 0.0, "spearman": 0.0, "mse": 1.0}
    nothing = torch.zeros(2, 2, dtype=torch.bool).numpy()
    assert label_set_metrics(nothing, nothing) == {"micro_f1": 0.0, "macro_f1": 0.0, "subset_accuracy": 1.0}


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_metrics_of_label_sets_are_those_of_the_labels_that_rows_have(columns: int) -> None:
    rows = torch.randint(0, 2, (2, 40, columns), generator=torch.Generator().manual_seed(columns)).bool().numpy()
    right, found = (rows[0] & rows[1]).sum(0), rows.sum((0, 1))
    metrics = label_set_metrics(*rows)
    assert metrics["micro_f1"] == pytest.approx(2 * right.sum() / found.sum())
    assert metrics["macro_f1"] == pytest.approx((2 * right / found).mean())
    assert metrics["subset_accuracy"] == (rows[0] == rows[1]).all(1).mean()
    # Where no row gets its label, nothing was found, however many rows have none.
    assert label_set_metrics(rows[0], rows[0] & False)["micro_f1"] == 0.0


def test_long_rows_are_told_and_their_spans_beyond_the_last_window_are_missed(
    base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"text": "x " * 40 + "Rome", "spans": [{"start": 80, "end": 84, "label": "place"}]}
    rows = [*marked(20), row]
    settings = settings_for(
        Path("tiny"), tmp_path, write_jsonl(tmp_path / "t.jsonl", rows), task="token-classify", eval_fraction=0.0
    )
    kind = TASKS["token-classify"]
    task = kind.build(settings, base, kind.load(settings, None), 64)
    assert task.notes == ["1 of 21 training rows have more than 64 tokens and were read in windows that overlap"]
    assert len(task.train_rows) == 22 and not any(row.inputs.is_cut for row in task.train_rows)
    monkeypatch.setattr(preprocess, "MAX_WINDOWS", 1)
    task = kind.build(settings, base, kind.load(settings, None), 64)
    assert task.notes == ["1 of 21 training rows were cut after 1 windows"]
    (cut,) = [row for row in task.train_rows if row.inputs.is_cut]
    assert task.evaluate([cut])["recall"] == 0.0 and len(cut.example.target) == 1


SPAN = {"start": 0, "end": 2, "label": "a"}
BROKEN: dict[str, tuple[dict[str, Any], list[Any], str]] = {
    "no number": ({"task": "regress"}, [["a", "three"]], "label is 'three', not a number; write a number such as 3.8"),
    "a number that is missing": ({"task": "regress"}, [["a", ""]], "label is empty"),
    "NaN": ({"task": "regress"}, [["a", "nan"]], "not a number"),
    "infinite": ({"task": "regress"}, [["a", "inf"]], "at most 1e+15"),
    "digits in groups": ({"task": "regress"}, [["a", "1_000"]], "not a number"),
    "huge": ({"task": "regress"}, [["a", "1e300"]], "in a greater unit"),
    "true": ({"task": "regress"}, [{"text": "a", "label": True}], "label is True, not a number"),
    "one number": ({"task": "regress"}, [["a", "3"]] * 9, "every training row has the number 3"),
    "few": ({"task": "regress"}, [["a", "3"], ["b", "4"]], "has 2 rows; at least 4 are needed"),
    "a label twice": ({"multi_label": True}, [["a", "x|x"]], "has a label twice; remove one"),
    "an empty label": ({"multi_label": True}, [["a", "x||y"]], "has an empty label"),
    "a label that is no name": ({"multi_label": True}, [{"text": "a", "label": [1.5]}], "a label is a name or a whole"),
    "a list as Python writes it": (
        {"multi_label": True},
        [["a", "x|y"], ["b", "['x', 'y']"]],
        "row 2 (line 3): label is the text \"['x', 'y']\", which would be one label; write labels such as a|b",
    ),
    "an empty list as text": ({"multi_label": True}, [["a", "[ ]"]], "or save the lists as JSON lines or Parquet"),
    "a list as JSON writes it": ({"multi_label": True}, [["a", '["x", "y"]']], "which would be one label"),
    "a list of numbers as text": ({"multi_label": True}, [["a", "[1, 2]"]], "which would be one label"),
    "labels null": ({"multi_label": True}, [{"text": "a", "label": None}], "label is missing; write a list of labels"),
    "no labels": ({"multi_label": True}, [["a", ""]] * 9, "no row has a label"),
    "spans no list": ({"task": "token-classify"}, [{"text": "ab", "spans": 3}], "spans must be a list such as"),
    "spans no JSON": ({"task": "token-classify"}, [{"text": "ab", "spans": "[{"}], "spans must be a list such as"),
    "a span without end": (
        {"task": "token-classify"},
        [{"text": "ab", "spans": [{"start": 0, "label": "a"}]}],
        'spans[0] must have "start", "end" and "label"',
    ),
    "a span beyond the text": (
        {"task": "token-classify"},
        [{"text": "ab", "spans": [{**SPAN, "end": 3}]}],
        "spans[0] goes from 0 to 3, and the text has 2 characters",
    ),
    "a span of floats": (
        {"task": "token-classify"},
        [{"text": "ab", "spans": [{**SPAN, "end": 2.0}]}],
        "goes from 0 to 2.0",
    ),
    "a span with a space": (
        {"task": "token-classify"},
        [{"text": "a bc", "spans": [SPAN]}],
        "('a ') begins or ends with white space",
    ),
    "a span without a label": (
        {"task": "token-classify"},
        [{"text": "ab", "spans": [{**SPAN, "label": " "}]}],
        "has the label ' '",
    ),
    "spans that overlap": (
        {"task": "token-classify"},
        [{"text": "abc", "spans": [SPAN, {**SPAN, "start": 1, "end": 3}]}],
        "the spans 0 to 2 and 1 to 3 overlap",
    ),
    "no spans at all": ({"task": "token-classify"}, [{"text": "ab", "spans": []}] * 9, "no row has a span"),
    "no column of spans": (
        {"task": "token-classify"},
        [{"text": "ab", "span": []}],
        "did you mean --spans-column span?",
    ),
    "words without tags": (
        {"task": "token-classify", "tokens_column": "tokens"},
        [{"tokens": ["a", "b"], "tags": ["O"]}],
        "tags has 1 tag for 2 words",
    ),
    "an empty word": (
        {"task": "token-classify", "tokens_column": "tokens"},
        [{"tokens": ["a", " "], "tags": ["O", "O"]}],
        "tokens must be a list of words",
    ),
    "a tag of another form": (
        {"task": "token-classify", "tokens_column": "tokens"},
        [{"tokens": ["a"], "tags": ["S-place"]}],
        "tags has 'S-place'; a tag is O, B-name or I-name",
    ),
    "tags without names": (
        {"task": "token-classify", "tokens_column": "tokens"},
        [{"tokens": ["a"], "tags": [1]}],
        "the file names no tags",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rows_are_refused_by_row(tmp_path: Path, name: str) -> None:
    options, rows, said = BROKEN[name]
    if isinstance(rows[0], list):
        train = write_csv(tmp_path / "rows.csv", rows)
    else:
        train = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = settings_for(Path("tiny"), tmp_path, train, **options)
    with pytest.raises(InvalidData) as refusal:
        TASKS[settings.task].load(settings, None)
    assert said in refusal.value.message
    assert str(train) in refusal.value.message


def test_a_label_may_stand_in_brackets(tmp_path: Path) -> None:
    rows = [[f"t{i}", "[draft]" if i % 2 else "[1]|[2]"] for i in range(20)]
    found = load_classify_data(
        settings_for(Path("tiny"), tmp_path, write_csv(tmp_path / "rows.csv", rows), multi_label=True)
    )
    assert found.labels == ["[1]", "[2]", "[draft]"]


def test_labels_of_the_test_rows_must_be_known(tmp_path: Path) -> None:
    test = write_jsonl(tmp_path / "test.jsonl", [{"text": "a", "label": ["animal"]}, {"text": "b", "label": ["shape"]}])
    train = write_jsonl(tmp_path / "train.jsonl", label_sets(40))
    settings = settings_for(Path("tiny"), tmp_path, train, multi_label=True, test=test)
    with pytest.raises(InvalidData, match=r"row 2 \(line 2\): label 'shape' is not in the training data"):
        TASKS["classify"].load(settings, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "regress", "multi_label": True}, "--multi-label is for tasks classify, image-classify"),
        ({"task": "classify", "label_separator": ";"}, "--label-separator is for --multi-label"),
        ({"task": "classify", "multi_label": True, "select_by": "accuracy"}, "take micro_f1, loss, macro_f1"),
        ({"task": "regress", "select_by": "f1"}, "take pearson, loss, spearman, mse"),
        ({"task": "token-classify", "label_column": "x"}, "--label-column is for tasks classify, regress"),
        ({"task": "token-classify", "spans_column": "s", "tags_column": "t"}, "--spans-column excludes"),
        ({"task": "token-classify", "text_pair_column": "s"}, "--text-pair-column is for tasks classify, regress"),
    ],
)
def test_options_of_other_tasks_are_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidConfiguration) as refusal:
        load_options(None, {"base": "b", "store": tmp_path, "name": "a/b", "train": tmp_path / "t", **options})
    assert said in refusal.value.message


def test_a_slow_tokenizer_is_refused(base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.preprocessor, "has_offsets", False)
    settings = settings_for(
        Path("tiny"), tmp_path, write_jsonl(tmp_path / "t.jsonl", marked(20)), task="token-classify"
    )
    kind = TASKS["token-classify"]
    with pytest.raises(InvalidConfiguration, match="take a base with a fast tokenizer"):
        kind.build(settings, base, kind.load(settings, None), 64)


def test_spans_in_a_cell_of_a_table(tmp_path: Path) -> None:
    rows = [[row["text"], json.dumps(row["spans"])] for row in marked(20)]
    train = write_csv(tmp_path / "t.csv", rows, header=("text", "spans"))
    settings = settings_for(Path("tiny"), tmp_path, train, task="token-classify")
    data = TASKS["token-classify"].load(settings, None)
    assert data.labels == ["person", "place"]
    for cell, fault in (
        ('[{"start": 0, "end": 1, "end": 2, "label": "x"}]', "key 'end' appears twice in an object; keep one"),
        ('[{"start": 0, "end": 1, "label": "\\ud83d"}]', "a string holds half of a surrogate pair"),
    ):
        write_csv(train, [*rows, ["a text", cell]], header=("text", "spans"))
        with pytest.raises(InvalidData, match=f"row 21 .*: spans: {fault}"):
            TASKS["token-classify"].load(settings, None)


def test_labels_of_the_other_kind_cannot_go_on(base: FrozenBase, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", label_sets(30))
    run(base, tmp_path, train, multi_label=True, method="head-only", epochs=1)
    fields = {"base": "tiny", "store": tmp_path / "store", "name": "acme/on", "task": "classify", "train": train}
    with pytest.raises(InvalidConfiguration, match="give --multi-label too"):
        train_adapter(TrainSettings.model_validate({**fields, "init_from": "acme/tiny"}), base=base)
    again = TrainSettings.model_validate({**fields, "init_from": "acme/tiny", "multi_label": True, "epochs": 1})
    assert train_adapter(again, base=base).metrics["micro_f1"] >= 0


def test_names_of_classes_come_from_the_file(tmp_path: Path) -> None:
    import datasets

    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-place", "I-place"]))
    labels = datasets.Sequence(datasets.ClassLabel(names=["animal", "colour"]))
    rows = {"tokens": [["in", "New", "Delhi"]] * 8, "ner_tags": [[0, 1, 2]] * 8, "text": ["x"] * 8, "label": [[1]] * 8}
    features = datasets.Features(
        tokens=datasets.Sequence(datasets.Value("string")), ner_tags=tags, text=datasets.Value("string"), label=labels
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    options = {"task": "token-classify", "tokens_column": "tokens", "tags_column": "ner_tags", "eval_fraction": 0.0}
    settings = settings_for(Path("tiny"), tmp_path, tmp_path / "rows.parquet", **options)
    (item, *_) = TASKS["token-classify"].load(settings, None).train
    assert (item.text, item.target) == ("in New Delhi", (Span(3, 12, "place", 1.0, "New Delhi"),))
    settings = settings_for(Path("tiny"), tmp_path, tmp_path / "rows.parquet", multi_label=True, eval_fraction=0.0)
    assert TASKS["classify"].load(settings, None).train[0].target == {"colour"}
