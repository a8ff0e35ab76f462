"""Rows of texts and images with what to learn of them: read from files, checked before training, parted by use."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from sera_serve.errors import counted
from sera_serve.trainer.data.splits import draw, hold_out_for
from sera_serve.trainer.option_text import flag
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tables.faults import InvalidData, Problems, Row, faults_of
from sera_serve.trainer.tables.fields import text_of
from sera_serve.trainer.tables.table import Table, read_table

T = TypeVar("T")
Use = Literal["train", "eval", "test"]
Text = str | tuple[str, str]
"""A text, or two texts of which the tokenizer makes a pair."""
LabelSet = frozenset[str]

_LEAST_ROWS = 4
USES: tuple[Use, ...] = ("train", "eval", "test")


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
        path: Path | None = getattr(settings, use)
        if path is None:
            continue
        with faults_of(use):
            table = read_table(path, delimiter=settings.delimiter, encoding=settings.encoding, split=use)
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

    @property
    def key(self) -> str:
        """Equal for equal texts, which are held out together."""
        return repr(self.text)


@dataclass(frozen=True)
class ImageExample(Generic[T]):
    """One checked row: an image, by its digest in the store of images, and what to learn of it."""

    image: str
    target: T
    row: Row

    @property
    def key(self) -> str:
        """Equal for equal images, which are held out together."""
        return self.image


Labelled = TypeVar("Labelled", bound=Example[Any] | ImageExample[Any])
LabelsOf = Callable[[Any], Collection[str]]
"""The labels of a target."""


@dataclass(frozen=True)
class Examples(Generic[T]):
    """Checked rows by use.

    Attributes:
        train: What is learned.
        eval: What chooses the epoch.
        test: What is scored at the end.
        digests: sha256 of each file, by use; of images too. They are a part of what names the run.
        notes: What the user should know about the rows.
        labels: Every label, in the order of the head's rows; of spans, sorted. Empty where rows have no labels.
    """

    train: list[T]
    eval: list[T]
    test: list[T]
    digests: dict[str, str]
    notes: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


def part_by_labels(
    settings: TrainSettings,
    rows: dict[Use, list[Labelled]],
    notes: list[str],
    kept: list[str] | None,
    labels_of: LabelsOf,
    check: Callable[[Path, int, list[str]], None],
    *,
    is_one: bool = False,
) -> list[str]:
    """Check the labels of rows, and part the rows as `part_rows` does.

    Args:
        settings: Options of the run.
        rows: Rows by use. They become those that the run takes.
        notes: What the user should know is added.
        kept: The labels of the adapter that the run goes on from, which it keeps; None takes those of the training
            rows.
        labels_of: The labels of a target.
        check: Refuses the labels of a file, of which it gets the path, the number of rows and the labels.
        is_one: Whether each row has one label.

    Returns:
        The labels of the run.

    Raises:
        InvalidData: The training rows are too few, their labels are refused, or a row has a label that is not known.
    """
    count = len(rows["train"])
    check_count(settings.train, rows["train"])
    whose, remedy = "in the training data", "correct or remove it, or add training rows of that label"
    if kept is not None:
        whose, remedy = f"a label of {settings.init_from}", "correct or remove it, or train a new adapter"
    labels = kept
    if labels is None:
        labels = sorted({label for item in rows["train"] for label in labels_of(item.target)})
        check(settings.train, count, labels)
    for use in USES:
        path: Path | None = getattr(settings, use)
        # Without a file of its own, the rows are a split of the folder of the training rows.
        with faults_of(use if path is not None else "train"):
            found = ((item.row, labels_of(item.target)) for item in rows[use])
            _check_known(path or settings.train, found, labels, whose, remedy)
    notes += label_notes(label for item in rows["train"] for label in labels_of(item.target))
    part_rows(settings, rows, notes, labels_of, is_one=is_one)
    notes += _limit_notes(settings, labels, {label for item in rows["train"] for label in labels_of(item.target)})
    return labels


def part_rows(
    settings: TrainSettings,
    rows: dict[Use, list[Labelled]],
    notes: list[str],
    labels_of: LabelsOf | None = None,
    *,
    is_one: bool = False,
) -> None:
    """Draw the training rows, and hold a part of them out where there are none to evaluate on.

    Arguments as those of `part_by_labels`. About the same part of each set of labels is held out, and each label keeps
    a training row. `labels_of` None has no labels.

    Raises:
        InvalidData: The run needs evaluations, and there are no rows for them.
    """
    rows["train"] = draw(rows["train"], settings.train_limit, settings.seed)
    if rows["eval"]:
        if settings.eval is None and settings.eval_fraction and "eval_fraction" in settings.model_fields_set:
            notes.append(f"{settings.train} has validation rows, so --eval-fraction holds no training rows out")
    elif settings.eval_fraction:
        rows["train"], rows["eval"] = hold_out_for(
            settings,
            rows["train"],
            notes,
            key=lambda item: item.key,
            stratum=lambda item: "" if labels_of is None else ",".join(sorted(labels_of(item.target))),
            keep_single=is_one,
            labels=None if labels_of is None else lambda item: labels_of(item.target),
        )
    elif (option := settings.needs_evaluations) is not None:
        raise InvalidData(
            f"{settings.train} has no validation rows, and {flag(option)} needs evaluations; give --eval or an "
            "--eval-fraction above 0",
            param=option,
        )


def label_notes(labels: Iterable[str]) -> list[str]:
    """Say which labels differ in case, width or composition only, and which have a single row.

    Args:
        labels: The label of each row.
    """
    counts = Counter(labels)
    shown = {label: counted(count, "row") for label, count in counts.items()}
    alike: dict[str, list[str]] = {}
    for label in sorted(counts):
        alike.setdefault(unicodedata.normalize("NFKC", label).casefold(), []).append(label)
    notes = [
        f"the labels {' and '.join(f'{label!r} ({shown[label]})' for label in same)} differ in case or "
        "form only, and each is a class of its own; write them alike if they are one"
        for same in alike.values()
        if len(same) > 1
    ]
    single = [label for label in sorted(counts) if counts[label] == 1]
    if single:
        notes.append(
            f"{_shown(single)}: a single row each, so that no row of it can be held out; add rows, or delete it"
        )
    return notes


def _limit_notes(settings: TrainSettings, labels: Iterable[str], learned: Collection[str]) -> list[str]:
    """Say which labels have no row among those that `train_limit` has drawn. `learned`: the labels of these rows."""
    left = [label for label in labels if label not in learned]
    if settings.train_limit is None or not left:
        return []
    return [f"{_shown(left)}: no row of it is among the {settings.train_limit} drawn ones; raise --train-limit"]


def _shown(labels: list[str]) -> str:
    names = ", ".join(map(repr, labels[:5])) + (", ..." if len(labels) > 5 else "")
    return f"{'label' if len(labels) == 1 else f'{len(labels)} labels'} {names}"


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
        raise InvalidData(f"{path} has {counted(len(rows), 'row')}; at least {_LEAST_ROWS} are needed")


def check_labels(path: Path, rows: int, labels: list[str]) -> None:
    """Refuse training rows with one label, or with labels that hardly repeat."""
    if len(labels) == 1:
        raise InvalidData(
            f"{path}: every row has the label {labels[0]!r}; add rows of another label, or check --label-column",
            param="label_column",
        )
    if len(labels) > rows // 2:
        raise InvalidData(
            f"{path} has {len(labels)} different labels in {rows} rows; labels must repeat: check --label-column, "
            "or put numbers into ranges",
            param="label_column",
        )


def _check_known(
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
