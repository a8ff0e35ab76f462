"""Rows of task token-classify: a text and its spans, or words and the BIO tag of each."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from adapters_store import AdapterConfig
from sera_serve.base.spans import OUTSIDE, Span, kinds_of
from sera_serve.errors import counted
from sera_serve.trainer.data.labelled import Example, Examples, part_by_labels, read_uses
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tables.faults import InvalidData, Problems, Row
from sera_serve.trainer.tables.fields import text_of
from sera_serve.trainer.tables.strict import RowDecoder
from sera_serve.trainer.tables.table import Table

# A tag has two characters more than the label of a span, and at most 512 in a bundle.
_LONGEST_KIND = 510
_KEYS = {"start", "end", "label"}
# Faults of one row that are told, and characters of a text in a message. A row may have thousands of spans.
_MOST_FAULTS, _MOST_SHOWN = 5, 60

Marked = tuple[Span, ...]
"""The spans of a text, in the order of their places, without overlaps."""


def load_spans(settings: TrainSettings, initial: AdapterConfig | None = None) -> Examples[Example[Marked]]:
    """Read and check the rows of task token-classify.

    Args:
        settings: Options of the run.
        initial: The adapter that the run goes on from: its labels of spans are kept. None takes those of the training
            rows.

    Raises:
        InvalidData: A file or some of its rows cannot be used.
    """
    rows, digests, notes = read_uses(settings, _read)
    kept = kinds_of(initial.labels or []) if initial is not None else None
    kinds = part_by_labels(settings, rows, notes, kept, lambda spans: {span.label for span in spans}, _check_kinds)
    return Examples(rows["train"], rows["eval"], rows["test"], digests, notes, kinds)


def _check_kinds(path: Path, rows: int, kinds: list[str]) -> None:
    if not kinds:
        raise InvalidData(f"{path}: no row has a span; mark some, or check --spans-column or --tags-column")


def _read(table: Table, settings: TrainSettings) -> list[Example[Marked]]:
    problems = Problems(table.path)
    found = []
    if settings.has_words:
        tokens, tags = settings.tokens_column or "tokens", settings.tags_column or "tags"
        table.require(tokens, "tokens_column")
        table.require(tags, "tags_column")
        for row in table.rows:
            text, marked = spans_of_words(row, tokens, tags, problems)
            found.append(Example(text, marked, row.place()))
    else:
        column = settings.spans_column or "spans"
        table.require(settings.text_column, "text_column")
        table.require(column, "spans_column")
        for row in table.rows:
            text = text_of(row, settings.text_column, problems)
            found.append(Example(text, spans_of(row, column, text, problems), row.place()))
    problems.raise_if_any()
    return found


def spans_of(row: Row, column: str, text: str, problems: Problems) -> Marked:
    """The spans of a column: a list of {start, end, label}, or its JSON. What cannot be used is added to `problems`."""
    value = row.values.get(column)
    if isinstance(value, str):
        cell, decoder = value if value.strip() else "[]", RowDecoder()
        try:
            value = decoder.decode(cell)
        except (ValueError, RecursionError):
            value = None
        if (fault := decoder.fault(cell, value)) is not None:
            problems.add(row, f"{column}: {fault}")
            return ()
    if not isinstance(value, list):
        problems.add(row, f'{column} must be a list such as [{{"start": 0, "end": 5, "label": "name"}}]')
        return ()
    spans = []
    # A span holds a copy of its characters. Spans that overlap could hold the text many times.
    faults = covered = 0
    for index, item in enumerate(value):
        if (span := _span(row, f"{column}[{index}]", item, text, problems)) is None:
            faults += 1
            if faults == _MOST_FAULTS:
                return ()
            continue
        spans.append(span)
        covered += span.end - span.start
        if covered > len(text):
            # Then some overlap, and the check below says which.
            break
    spans.sort(key=lambda span: span.start)
    overlaps = 0
    for one, other in pairwise(spans):
        if other.start < one.end and overlaps < _MOST_FAULTS:
            overlaps += 1
            problems.add(
                row,
                f"{column}: the spans {one.start} to {one.end} and {other.start} to {other.end} overlap, and a token "
                "has one tag; keep one of them",
            )
    return tuple(spans)


def _span(row: Row, where: str, item: Any, text: str, problems: Problems) -> Span | None:
    if not isinstance(item, dict) or _KEYS - set(item):
        problems.add(row, f'{where} must have "start", "end" and "label"')
        return None
    start, end, label = item["start"], item["end"], item["label"]
    if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(text):
        problems.add(
            row,
            f"{where} goes from {_shown(start)} to {_shown(end)}, and the text has {len(text)} characters; count "
            "characters from 0 on, with end after the last one",
        )
        return None
    part = text[start:end]
    if part != part.strip():
        problems.add(row, f"{where} ({_shown(part)}) begins or ends with white space; move its start or end")
        return None
    if not isinstance(label, str) or not label.strip() or len(label.strip()) > _LONGEST_KIND:
        problems.add(row, f"{where} has the label {_shown(label)}; give a name of at most {_LONGEST_KIND} characters")
        return None
    return Span(start, end, label.strip(), 1.0, part)


def _shown(value: Any) -> str:
    return repr(value)[:_MOST_SHOWN]


def spans_of_words(row: Row, tokens_column: str, tags_column: str, problems: Problems) -> tuple[str, Marked]:
    """The text of words joined by single spaces, and its spans; what cannot be used is added to `problems`."""
    words, tags = row.values.get(tokens_column), row.values.get(tags_column)
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        problems.add(row, f'{tokens_column} must be a list of words such as ["in", "Rome"], none of them empty')
        return "", ()
    if not isinstance(tags, list) or len(tags) != len(words):
        has = counted(len(tags), "tag") if isinstance(tags, list) else "no list"
        problems.add(row, f"{tags_column} has {has} for {len(words)} words; write one tag for each word")
        return "", ()
    words = [word.strip() for word in words]
    spans: list[Span] = []
    text = " ".join(words)
    place = 0
    is_open = False
    for word, value in zip(words, tags, strict=True):
        tag = _tag(row, tags_column, value, problems)
        start, end = place, place + len(word)
        place = end + 1
        if tag is None or tag == OUTSIDE:
            is_open = False
            continue
        kind = tag[2:]
        # Some files begin a span with I where no span of that kind comes before it (the form IOB1).
        goes_on = is_open and tag[0] == "I" and spans[-1].label == kind
        begin = spans.pop().start if goes_on else start
        spans.append(Span(begin, end, kind, 1.0, text[begin:end]))
        is_open = True
    return text, tuple(spans)


def _tag(row: Row, column: str, value: Any, problems: Problems) -> str | None:
    # A reader has put names in place of the numbers where the file's schema has them.
    if isinstance(value, int) and not isinstance(value, bool):
        problems.add(
            row,
            f"{column} has the number {value}, and the file names no tags; write tags such as O, B-place, I-place, or "
            "save the file as Parquet with the names of its classes",
        )
        return None
    if isinstance(value, str):
        tag = value.strip()
        if tag == OUTSIDE or (tag[:2] in ("B-", "I-") and 0 < len(tag[2:].strip()) <= _LONGEST_KIND):
            return tag if tag == OUTSIDE else f"{tag[:2]}{tag[2:].strip()}"
    problems.add(row, f"{column} has {value!r}; a tag is O, B-name or I-name")
    return None
