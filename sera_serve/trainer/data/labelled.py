"""Training data of the text tasks: rows read from files, checked before training, and split for evaluation."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

from sera_serve.trainer.data.splits import draw, hold_out_for
from sera_serve.trainer.option_text import flag
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tables.faults import InvalidData, Problems, Row, faults_of
from sera_serve.trainer.tables.fields import label_of, text_of, whole_number_names
from sera_serve.trainer.tables.table import Table, read_table

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


def read_uses(
    settings: TrainSettings, read: Callable[[Table, TrainSettings], list[T]]
) -> tuple[dict[Use, list[T]], dict[str, str], list[str]]:
    """Read the files of `settings`; `read` checks the rows of one.

    Returns:
        The rows by use, none of a use without a file; the sha256 of each file, by use; and the notes on the files.

    Raises:
        InvalidData: A file or some of its rows cannot be used.
    """
    rows: dict[Use, list[T]] = {use: [] for use in USES}
    digests: dict[str, str] = {}
    notes: list[str] = []
    for use in USES:
        with faults_of(use):
            if (table := table_for(settings, use)) is not None:
                rows[use] = read(table, settings)
                digests[use] = table.digest
                notes += table.notes
    return rows, digests, notes


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


Labelled = TypeVar("Labelled", Example[str], ImageExample[str])


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
    """Rows with labels: one each, sets of them, or spans.

    Attributes:
        labels: Every label, in the order of the head's rows; of spans, sorted.
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
        with faults_of(use):
            table = table_for(settings, use)
            if table is None:
                continue
            rows[use] = with_whole_numbers(checked_texts(table, settings, label_of), labels)
            digests[use] = table.digest
            notes += table.notes
            if use != "train":
                assert labels is not None
                check_labels_known(table.path, rows[use], labels)
            elif labels is None:
                labels = sorted({item.target for item in rows[use]})
                check_labels(table.path, rows[use], labels)
                notes += label_notes(item.target for item in rows[use])
            else:
                check_count(table.path, rows[use])
                check_labels_known(table.path, rows[use], labels, settings.init_from)
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
    table.require(column, "label_column")
    for row in table.rows:
        text = _text_at(row, settings, problems)
        checked.append(Example(text, target_of(row, column, problems), row.place()))
    problems.raise_if_any()
    return checked


def with_whole_numbers(rows: list[Labelled], labels: list[str] | None) -> list[Labelled]:
    """Name the labels of rows as `whole_number_names` says; `labels` are those of the adapter, if it has some."""
    names = whole_number_names([item.target for item in rows], labels)
    return [replace(item, target=names[item.target]) if item.target in names else item for item in rows]


def _require_texts(table: Table, settings: TrainSettings) -> None:
    """Refuse a table without the column of texts, or without that of second texts where `settings` names one.

    A column that is both text and label is refused, too: the answer would stand in the question.
    """
    for option, column in (("text_column", settings.text_column), ("text_pair_column", settings.text_pair_column)):
        if column == settings.label_column:
            raise InvalidData(f"{flag(option)} and --label-column are both {column!r}; name two columns", param=option)
        if column is not None:
            table.require(column, option)


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
        raise InvalidData(f"{path} has {len(rows)} rows; at least {_LEAST_ROWS} are needed")


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
    path: Path, found: Iterable[tuple[Row, Collection[str]]], known: Collection[str], whose: str, remedy: str
) -> None:
    """Refuse rows with a label that is not one of `known`.

    Args:
        path: Their file.
        found: Each row, with its labels.
        known: The labels that there are.
        whose: Says whose labels these are.
        remedy: What helps.
    """
    problems = Problems(path)
    shown = ", ".join([*known][:10]) + (", ..." if len(known) > 10 else "")
    for row, labels in found:
        for label in sorted(set(labels).difference(known)):
            problems.add(row, f"label {label!r} is not {whose}, which has {shown}; {remedy}")
    problems.raise_if_any()


def check_labels_known(
    path: Path, rows: Iterable[Example[str] | ImageExample[str]], labels: list[str], adapter: str | None = None
) -> None:
    """Refuse rows whose label is not one of `labels`: those of the adapter to go on from, if one is given."""
    whose, remedy = "in the training data", "correct it, delete the row, or add training rows of that label"
    if adapter is not None:
        whose, remedy = f"a label of {adapter}", "correct it, delete the row, or train a new adapter"
    check_known(path, ((item.row, (item.target,)) for item in rows), labels, whose, remedy)
