"""Rows of a text, or a sentence pair, and what to learn of it: a label, several labels, or a number."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from adapters_store import AdapterConfig
from sera_serve.trainer.data.labelled import (
    USES,
    Example,
    Examples,
    Labelled,
    LabelSet,
    Use,
    check_count,
    check_labels,
    checked_texts,
    part_by_labels,
    part_rows,
    read_uses,
)
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tables.faults import InvalidData, Problems, Row
from sera_serve.trainer.tables.fields import LONGEST_LABEL, label_of, whole_number_names

_SHOWN_CHARACTERS = 60
# What people put between labels.
_SEPARATORS = ",;|/ "
# float32, in which heads are trained and served, holds products of larger numbers no more.
_LARGEST_NUMBER = 1e15
# Of the numbers' mean from 0. One more deviation is then some hundred steps of float32.
_MOST_DEVIATIONS = 1e5


def load_numbers(settings: TrainSettings, initial: AdapterConfig | None = None) -> Examples[Example[float]]:
    """Read and check the rows of task regress. An adapter that the run goes on from decides nothing of them.

    Raises:
        InvalidData: A file or some of its rows cannot be used, or all training rows have one number.
    """
    rows, digests, notes = read_uses(settings, lambda table, settings: checked_texts(table, settings, number_of))
    check_count(settings.train, rows["train"])
    part_rows(settings, rows, notes)
    numbers = [item.target for item in rows["train"]]
    if len(set(numbers)) < 2:
        raise InvalidData(
            f"{settings.train}: every training row has the number {numbers[0]:g}; add rows with another number, or "
            "check --label-column",
            param="label_column",
        )
    mean, deviation = statistics.fmean(numbers), statistics.pstdev(numbers)
    if abs(mean) > _MOST_DEVIATIONS * deviation:
        raise InvalidData(
            f"{settings.train}: the numbers lie near {mean:.15g} and differ by {deviation:.3g} only, which float32, in "
            f"which heads are trained and served, can hardly tell apart; subtract {mean:.15g} from all of them, and "
            "add it to what the server answers",
            param="label_column",
        )
    return Examples(rows["train"], rows["eval"], rows["test"], digests, notes)


def load_classify_data(settings: TrainSettings, initial: AdapterConfig | None = None) -> Examples[Example[Any]]:
    """Read and check the rows of task classify, with a label each, or with `--multi-label` a set of labels each.

    Args:
        settings: Options of the run.
        initial: The adapter that the run goes on from: its labels are kept. None takes those of the rows.

    Raises:
        InvalidData: A file or some of its rows cannot be used.
    """
    read = reader_of_labels(settings)
    rows, digests, notes = read_uses(settings, lambda table, settings: checked_texts(table, settings, read))
    labels = labels_of_rows(settings, rows, notes, initial)
    return Examples(rows["train"], rows["eval"], rows["test"], digests, notes, labels)


def reader_of_labels(settings: TrainSettings) -> Callable[[Row, str, Problems], str | LabelSet]:
    """What reads the column of labels: one label of a row, or a set of labels."""
    if not settings.multi_label:
        return label_of
    return lambda row, column, problems: labels_of(row, column, settings.label_separator, problems)


def labels_of_rows(
    settings: TrainSettings, rows: dict[Use, list[Labelled]], notes: list[str], initial: AdapterConfig | None
) -> list[str]:
    """Check the labels of rows, and part the rows as `part_by_labels` does; `initial` as in `load_classify_data`."""
    kept = initial.labels if initial is not None else None
    if settings.multi_label:
        labels = part_by_labels(settings, rows, notes, kept, lambda labels: labels, _check_sets)
        notes += separator_notes(labels, settings.label_separator)
        return labels
    known = kept
    for use in USES:
        names = whole_number_names([item.target for item in rows[use]], known)
        rows[use] = [replace(i, target=names[i.target]) if i.target in names else i for i in rows[use]]
        if known is None:
            known = list({item.target for item in rows[use]})
    return part_by_labels(settings, rows, notes, kept, lambda label: (label,), check_labels, is_one=True)


def _check_sets(path: Path, rows: int, labels: list[str]) -> None:
    if not labels:
        raise InvalidData(f"{path}: no row has a label; check --label-column", param="label_column")
    if len(labels) > rows:
        raise InvalidData(
            f"{path} has {len(labels)} different labels in {rows} rows; labels must repeat: check --label-column and "
            "--label-separator",
            param="label_column",
        )


def separator_notes(labels: Collection[str], separator: str) -> list[str]:
    """Say which label looks like several of the other labels, with another separator between them."""
    for mark in _SEPARATORS:
        for label in labels:
            if mark != separator and mark in label and all(part.strip() in labels for part in label.split(mark)):
                return [
                    f"{label!r} is one label, though its parts are labels, too; if {mark!r} separates labels, give "
                    f"--label-separator {mark!r}"
                ]
    return []


def number_of(row: Row, column: str, problems: Problems) -> float:
    """The number of a column: a number of the file, or text such as 3.8. What is none is added to `problems`."""
    value = row.values.get(column)
    number = math.nan
    # Decimal is SQL's NUMERIC in a Parquet file.
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    elif isinstance(value, str):
        try:
            # float() also takes underscores between digits, and digits of other scripts.
            number = float(value) if value.isascii() and "_" not in value else math.nan
        except ValueError:
            number = math.nan
    if math.isnan(number):
        kind = "missing" if value is None else "empty" if value == "" else f"{value!r}, not a number"
        problems.add(row, f"{column} is {kind}; write a number such as 3.8, or delete the row")
        return 0.0
    if abs(number) > _LARGEST_NUMBER:
        problems.add(row, f"{column} is {number:g}; give numbers of at most {_LARGEST_NUMBER:g}, in a greater unit")
        return 0.0
    return number


def labels_of(row: Row, column: str, separator: str, problems: Problems) -> LabelSet:
    """The labels of a column: a list, or text with a separator; an empty one has no labels.

    What is no label is added to `problems`.
    """
    value = row.values.get(column)
    if isinstance(value, str) and _is_written_list(value.strip()):
        shown = value if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]}..."
        problems.add(
            row,
            f"{column} is the text {shown!r}, which would be one label; write labels such as a{separator}b and leave a "
            "cell without labels empty, or save the lists as JSON lines or Parquet",
        )
        return frozenset()
    if isinstance(value, str):
        parts: list[Any] = [part.strip() for part in value.split(separator)] if value.strip() else []
    elif isinstance(value, list):
        parts = value
    else:
        kind = "missing" if value is None else f"{type(value).__name__} {value!r}"
        problems.add(
            row, f'{column} is {kind}; write a list of labels such as ["a", "b"], or text such as a{separator}b'
        )
        return frozenset()
    found: list[str] = []
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, (str, int)):
            problems.add(row, f"{column} has {part!r}; a label is a name or a whole number")
            continue
        label = str(part).strip()
        if not label:
            problems.add(row, f"{column} has an empty label; name it or remove it")
        elif len(label) > LONGEST_LABEL:
            problems.add(row, f"{column} has a label of {len(label)} characters; at most {LONGEST_LABEL} are allowed")
        found.append(label)
    if len(set(found)) != len(found):
        problems.add(row, f"{column} has a label twice; remove one")
    return frozenset(found)


def _is_written_list(text: str) -> bool:
    """Whether a text is a list as Python or JSON writes it: empty, of texts in quotes, or of whole numbers."""
    if not (text.startswith("[") and text.endswith("]")):
        return False
    inner = text[1:-1].strip()
    # [draft] may be a label.
    return not inner or inner[0] + inner[-1] in ("''", '""', "'\"", "\"'") or set(inner) <= set("0123456789,- \n")
