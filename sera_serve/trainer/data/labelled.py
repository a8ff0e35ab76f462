"""Training data of the text tasks: rows read from files, checked before training, and split for evaluation."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

from adapters_store import MAX_CHAT_TEMPLATE_BYTES
from sera_serve.trainer.data.passages import Passage, checked_passages
from sera_serve.trainer.data.splits import draw, hold_out_for
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tables.fields import label_of, text_of, whole_number_names
from sera_serve.trainer.tables.table import InvalidData, Problems, Row, Table, read_table

T = TypeVar("T")
Use = Literal["train", "eval", "test"]
Text = str | tuple[str, str]
"""A text, or two texts of which the tokenizer makes a pair."""
LabelSet = frozenset[str]

_LEAST_ROWS = 4
USES: tuple[Use, ...] = ("train", "eval", "test")


def table_for(settings: TrainSettings, use: Use) -> Table | None:
    """Read the rows of one use, or return None where `settings` names no file for it.

    Raises:
        InvalidData: The file cannot be read.
    """
    path: Path | None = getattr(settings, use)
    if path is None:
        return None
    return read_table(path, delimiter=settings.delimiter, encoding=settings.encoding, split=use)


@dataclass(frozen=True)
class Example(Generic[T]):
    """One checked row: a text and what to learn of it."""

    text: Text
    target: T
    row: Row


@dataclass(frozen=True)
class ImageExample(Generic[T]):
    """One checked row: an image, by its digest in the store of images, and what to learn of it."""

    image: str
    target: T
    row: Row


@dataclass(frozen=True)
class Examples(Generic[T]):
    """Checked rows by use.

    Attributes:
        digests: sha256 of each file, by use.
        notes: What the user should know about the rows.
    """

    train: list[Example[T]]
    eval: list[Example[T]]
    test: list[Example[T]]
    digests: dict[str, str]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LabelledExamples(Examples[T]):
    """Rows with labels: one each, or sets of them.

    Attributes:
        labels: Every label, in the order of the head's rows.
    """

    labels: list[str] = field(default_factory=list)


def load_classify_data(settings: TrainSettings, labels: list[str] | None = None) -> LabelledExamples[str]:
    """Read and check the files of `settings`.

    Args:
        settings: Options of the run.
        labels: The labels of the adapter that the run goes on from, which it keeps; None takes those of the rows.

    Raises:
        InvalidData: A file or some of its rows cannot be used.
    """
    digests: dict[str, str] = {}
    notes: list[str] = []
    rows: dict[Use, list[Example[str]]] = {use: [] for use in USES}
    for use in USES:
        table = table_for(settings, use)
        if table is None:
            continue
        rows[use] = _labelled_texts(table, settings, labels)
        digests[use] = table.digest
        notes += table.notes
        if use != "train":
            assert labels is not None
            check_known(table.path, rows[use], labels)
        elif labels is None:
            labels = sorted({item.target for item in rows[use]})
            check_labels(table.path, rows[use], labels)
            notes += label_notes(item.target for item in rows[use])
        else:
            check_count(table.path, rows[use])
            check_known(table.path, rows[use], labels, f"a label of {settings.init_from}")
    assert labels is not None
    train = draw(rows["train"], settings.train_limit, settings.seed)
    if settings.eval is None and settings.eval_fraction:
        train, rows["eval"] = hold_out_for(
            settings, train, notes, key=lambda item: repr(item.text), stratum=lambda item: item.target, keep_single=True
        )
    notes += limit_notes(settings, labels, {item.target for item in train})
    return LabelledExamples(train, rows["eval"], rows["test"], digests, notes, labels)


def label_notes(labels: Iterable[str]) -> list[str]:
    """Say which labels differ in case, width or composition only, and which have a single row.

    Args:
        labels: The label of each row.
    """
    counts = Counter(labels)
    alike: dict[str, list[str]] = {}
    for label in sorted(counts):
        alike.setdefault(unicodedata.normalize("NFKC", label).casefold(), []).append(label)
    notes = [
        f"the labels {' and '.join(f'{label!r} ({_rows(counts[label])})' for label in same)} differ in case or form "
        "only, and each is a class of its own; write them alike if they are one"
        for same in alike.values()
        if len(same) > 1
    ]
    single = [label for label in sorted(counts) if counts[label] == 1]
    if single:
        notes.append(
            f"{_shown(single)}: a single row each, so that no row of it can be held out; add rows, or delete it"
        )
    return notes


def limit_notes(settings: TrainSettings, labels: Iterable[str], learned: Collection[str]) -> list[str]:
    """Say which labels have no row among those that `train_limit` has drawn. `learned`: the labels of these rows."""
    left = [label for label in labels if label not in learned]
    if settings.train_limit is None or not left:
        return []
    return [f"{_shown(left)}: no row of it is among the {settings.train_limit} drawn ones; raise --train-limit"]


def _shown(labels: list[str]) -> str:
    names = ", ".join(map(repr, labels[:5])) + (", ..." if len(labels) > 5 else "")
    return f"{'label' if len(labels) == 1 else f'{len(labels)} labels'} {names}"


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def checked_texts(
    table: Table, settings: TrainSettings, target_of: Callable[[Row, str, Problems], T]
) -> list[Example[T]]:
    """Check the rows of a table of texts; `target_of` reads the label column, and adds its faults to the problems.

    Raises:
        InvalidData: A column is missing, or some rows cannot be used.
    """
    _require_texts(table, settings)
    problems, column, checked = Problems(table.path), settings.label_column, []
    table.require(column, "--label-column")
    for row in table.rows:
        text = _text_at(row, settings, problems)
        checked.append(Example(text, target_of(row, column, problems), row.place()))
    problems.raise_if_any()
    return checked


def _labelled_texts(table: Table, settings: TrainSettings, labels: list[str] | None) -> list[Example[str]]:
    checked = checked_texts(table, settings, label_of)
    names = whole_number_names([item.target for item in checked], labels)
    return [replace(item, target=names[item.target]) if item.target in names else item for item in checked]


def _require_texts(table: Table, settings: TrainSettings) -> None:
    """Refuse a table without the column of texts, or without that of second texts where `settings` names one.

    A column that is both text and label is refused, too: the answer would stand in the question.
    """
    for option, column in (("text_column", settings.text_column), ("text_pair_column", settings.text_pair_column)):
        if column == settings.label_column:
            raise InvalidData(
                f"--{option.replace('_', '-')} and --label-column are both {column!r}; name two columns", param=option
            )
    table.require(settings.text_column, "--text-column")
    if settings.text_pair_column is not None:
        table.require(settings.text_pair_column, "--text-pair-column")


def _text_at(row: Row, settings: TrainSettings, problems: Problems) -> Text:
    """Return the text of a row, or its pair of texts where `settings` names a second column.

    A text that is missing, no string or blank is added to `problems`.
    """
    text = text_of(row, settings.text_column, problems)
    if settings.text_pair_column is None:
        return text
    return text, text_of(row, settings.text_pair_column, problems)


def check_count(path: Path, rows: Sized) -> None:
    """Refuse a training file with too few rows."""
    if len(rows) < _LEAST_ROWS:
        raise InvalidData(f"{path} has {len(rows)} rows; at least {_LEAST_ROWS} are needed", param="train")


def check_labels(path: Path, rows: Sized, labels: list[str]) -> None:
    """Refuse training rows with one label, or with labels that hardly repeat."""
    check_count(path, rows)
    if len(labels) == 1:
        raise InvalidData(
            f"{path}: every row has the label {labels[0]!r}; add rows of another label, or check --label-column",
            param="label_column",
        )
    if len(labels) > len(rows) // 2:
        raise InvalidData(
            f"{path} has {len(labels)} different labels in {len(rows)} rows; labels must repeat: check --label-column, "
            "or put numbers into ranges",
            param="label_column",
        )


def check_known(
    path: Path, rows: Iterable[Example[str] | ImageExample[str]], labels: list[str], kept: str | None = None
) -> None:
    """Refuse rows whose label is not one of `labels`; `kept` says whose labels these are, if not the training rows'."""
    problems, known = Problems(path), set(labels)
    shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
    for item in rows:
        if item.target not in known:
            if kept is not None:
                fault = f"is not {kept}, which has {shown}; correct it, delete the row, or train a new adapter"
            else:
                fault = f"is not in the training data, which has {shown}; "
                fault += "correct it, delete the row, or add training rows of that label"
            problems.add(item.row, f"label {item.target!r} {fault}")
    problems.raise_if_any()


@dataclass(frozen=True)
class GenerateData:
    """Checked rows of task generate, by use.

    Attributes:
        train: What is learned.
        eval: What chooses the epoch.
        test: What is scored at the end.
        digests: The sha256 of each file, by use.
        chat_template: The template of the rows, all of which are chats then, or None.
        prefers_chat: Whether the rows become chats where the base has a template of its own.
        notes: What the user should know about the rows.
    """

    train: list[Passage]
    eval: list[Passage]
    test: list[Passage]
    digests: dict[str, str]
    chat_template: str | None = None
    prefers_chat: bool = False
    notes: list[str] = field(default_factory=list)


def load_generate_data(settings: TrainSettings, template: str | None = None) -> GenerateData:
    """Read and check the files of `settings`.

    Args:
        settings: Options of the run.
        template: The chat template of the adapter that the run goes on from, which it keeps, or None.

    A single long text (a `.txt` file) has no rows to split. The last `eval_fraction` of its characters is held out,
    and at most half as much again, so that the cut is after a line or else a word.

    Raises:
        InvalidData: A file or some of its rows cannot be used.
    """
    rows: dict[Use, list[Passage]] = {use: [] for use in USES}
    digests: dict[str, str] = {}
    notes: list[str] = []
    for use in USES:
        table = table_for(settings, use)
        if table is not None:
            rows[use] = checked_passages(table, settings)
            digests[use] = table.digest
            notes += table.notes
    if template is None and settings.chat_template is not None:
        template = _read_template(settings.chat_template)
    if template is not None:
        _check_chats(rows["train"], settings)
        digests["chat_template"] = hashlib.sha256(template.encode()).hexdigest()
        rows = {use: [passage.as_chat() for passage in passages] for use, passages in rows.items()}
    train = draw(rows["train"], settings.train_limit, settings.seed)
    if settings.eval is None and settings.eval_fraction:
        if len(train) == 1 and not train[0].messages and train[0].prompt is None:
            train, rows["eval"] = _cut_text(train[0], settings.eval_fraction)
        else:
            train, rows["eval"] = hold_out_for(settings, train, notes, key=lambda r: r.group, stratum=lambda r: "")
    prefers_chat = settings.format == "alpaca"
    return GenerateData(train, rows["eval"], rows["test"], digests, template, prefers_chat, notes)


def _check_chats(passages: list[Passage], settings: TrainSettings) -> None:
    if any(not passage.messages and passage.prompt is None for passage in passages):
        raise InvalidData(
            f"{settings.train} has texts without a prompt, and {settings.init_from} answers chats; give rows with "
            "messages, or a prompt and a completion",
            param="train",
        )


def _read_template(path: Path) -> str:
    """Read a chat template: UTF-8, not empty, and as long as a bundle may have it."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CHAT_TEMPLATE_BYTES + 1)
        text = data.decode("utf-8")
    except OSError as error:
        raise InvalidData(f"{path} cannot be read: {error.strerror}; check the path", param="chat_template") from error
    except UnicodeDecodeError as error:
        raise InvalidData(f"{path} is not UTF-8; save the chat template as UTF-8", param="chat_template") from error
    if not text.strip() or len(data) > MAX_CHAT_TEMPLATE_BYTES:
        raise InvalidData(
            f"{path} must have a chat template of 1 to {MAX_CHAT_TEMPLATE_BYTES} bytes", param="chat_template"
        )
    return text


def _cut_text(passage: Passage, fraction: float) -> tuple[list[Passage], list[Passage]]:
    text = passage.completion
    wanted = int(len(text) * (1 - fraction))
    # A newline far before the wanted place would take most of the text from training: a title may be the only line.
    nearest = wanted - int(len(text) * fraction / 2)
    cut = text.rfind("\n", nearest, wanted) + 1
    cut = cut or next((i + 1 for i in range(wanted - 1, nearest - 1, -1) if text[i].isspace()), wanted)
    parts = [Passage(passage.row, part) for part in (text[:cut], text[cut:])]
    if not all(part.completion.strip() for part in parts):
        raise InvalidData("the one text is too short to hold a part out; give --eval or --eval-fraction 0")
    return parts[:1], parts[1:]
