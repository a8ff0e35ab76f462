"""Strict readers of CSV and JSON: they find the row and the line of each fault, and the line of each row.

`datasets` reads the values. It cannot say at which line a fault is, and its CSV reader, which is pandas', accepts some
faults without a word: it fills short rows, takes the first field of longer rows for an index, and drops stray quotes.
"""

from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from sera_serve.trainer.tables.faults import InvalidData, Problems, Row
from sera_serve.trainer.tables.files import DataFile

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OTHER_DELIMITERS = (";", "\t", "|", ",")
_NOT_OBJECT = 'not an object; each line must look like {"column": value, ...}'
_WHITESPACE = " \t\r\n"
_HEAD_CHARACTERS = 4096


@dataclass(frozen=True)
class CsvShape:
    """What a CSV file is like.

    Attributes:
        columns: Names of the columns.
        delimiter: The character between two fields.
        lines: The 1-based last line of each row.
        note: What the user should know, or None.
        has_bare_returns: Whether a line ends with a carriage return alone. Within a file of other line ends, pandas
            shifts the fields of some such rows.
    """

    columns: list[str]
    delimiter: str
    lines: Sequence[int]
    note: str | None
    has_bare_returns: bool = False


def check_csv(file: DataFile, delimiter: str | None) -> CsvShape:
    """Read a CSV file once, and keep nothing but the places of its rows.

    Args:
        file: The file.
        delimiter: The character between two fields. None takes the one of the suffix, or another one where the header
            has only another one.

    Raises:
        InvalidData: The header or some rows are wrong.
    """
    own, note = delimiter, None
    if own is None:
        own = _DELIMITERS[file.suffix]
        other = _other_delimiter(file, own)
        if other is not None:
            own, note = other, f"{file.path} was read with the delimiter {other!r}, which its header has"
    problems = Problems(file.path)
    lines = array("Q")
    has_bare_returns = False

    def watched(text: TextIO) -> Iterator[str]:
        nonlocal has_bare_returns
        for line in text:
            has_bare_returns |= line.endswith("\r")
            yield line

    with file.open_text() as text:
        records = _records(file, watched(text), own)
        columns = _header(file, records)
        for line, fields in records:
            lines.append(line)
            if len(fields) != len(columns):
                fault = f"{len(fields)} fields where the header has {len(columns)}"
                mark = mark_within(columns)
                remedy = 'put a text that holds the separator in "double quotes"'
                remedy += f", or give --delimiter {mark!r} if it stands between two fields" if mark else ""
                problems.add(Row({}, len(lines), line), f"{fault}; {remedy}")
    problems.raise_if_any()
    return CsvShape(columns, own, lines, note, has_bare_returns)


def read_csv(file: DataFile, shape: CsvShape) -> list[Row]:
    """Read the rows of a file that `check_csv` accepted."""
    with file.open_text() as text:
        records = _records(file, text, shape.delimiter)
        next(records)
        return [
            Row(dict(zip(shape.columns, fields, strict=True)), i, line) for i, (line, fields) in enumerate(records, 1)
        ]


def mark_within(columns: Sequence[str]) -> str | None:
    """A delimiter within a name of a column, which may be the file's own one."""
    return next((mark for mark in _OTHER_DELIMITERS if any(mark in name for name in columns)), None)


def _other_delimiter(file: DataFile, delimiter: str) -> str | None:
    """Another delimiter, if the header is one field with `delimiter` and several fields with the other one."""
    with file.open_text() as text:
        header = text.readline()
    fields = {mark: len(next(csv.reader([header], delimiter=mark), [])) for mark in {delimiter, *_OTHER_DELIMITERS}}
    best = max(_OTHER_DELIMITERS, key=lambda mark: fields[mark])
    return best if fields[delimiter] <= 1 < fields[best] else None


def _header(file: DataFile, records: Iterator[tuple[int, list[str]]]) -> list[str]:
    first = next(records, None)
    if first is None:
        raise InvalidData(f"{file.path} is empty; its first line must name the columns")
    columns = [name.strip() for name in first[1]]
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    if repeated:
        raise InvalidData(f"{file.path}, line 1: column {repeated[0]!r} appears twice; rename one")
    return columns


def _records(file: DataFile, text: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    # newline="" keeps line breaks inside quoted fields; the csv module requires it.
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, fields
    except csv.Error as error:
        remedy = "check the quotes around that text"
        if "field limit" in str(error):
            remedy += ", or write a text of that length as JSON lines"
        raise InvalidData(f"{file.path}, line {reader.line_num}: {error}; {remedy}") from error


def is_json_array(file: DataFile) -> bool:
    """Tell whether a JSON file is one array."""
    with file.open_text() as text:
        while block := text.read(_HEAD_CHARACTERS):
            if block.strip():
                return block.lstrip().startswith("[")
    return False


def begins_with_array(file: DataFile) -> bool:
    """Tell whether the first character of a JSON file begins an array."""
    with file.open_text() as text:
        return text.read(1) == "["


def first_line_is_row(file: DataFile) -> bool:
    """Tell whether the file's first line is a JSON object of its own."""
    with file.open_text() as text:
        try:
            return isinstance(json.loads(text.readline()), dict)
        except (ValueError, RecursionError):
            return False


def read_json(file: DataFile) -> tuple[list[str], list[Row]]:
    """Read JSON lines, or one JSON array of objects.

    Returns:
        The columns, in the order in which the rows name them, and the rows.

    Raises:
        InvalidData: Some rows are no objects.
    """
    problems = Problems(file.path)
    rows = list(_array_rows(file, problems) if is_json_array(file) else _line_rows(file, problems))
    if problems.found:
        _refuse_one_object(file)
    problems.raise_if_any()
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row.values))
    return list(columns), rows


def json_lines(file: DataFile) -> list[int]:
    """Return the 1-based last line of each row of a JSON file that can be read."""
    return [row.line or 0 for row in read_json(file)[1]]


def _line_rows(file: DataFile, problems: Problems) -> Iterator[Row]:
    number = 0
    with file.open_text() as text:
        for line, content in enumerate(text, 1):
            if not content.strip():
                continue
            number += 1
            row = Row({}, number, line)
            try:
                value = json.loads(content)
            except (ValueError, RecursionError) as error:
                problems.add(row, f"not JSON ({error}); each line must be one object")
            else:
                if isinstance(value, dict):
                    row = Row(value, number, line)
                else:
                    problems.add(row, _NOT_OBJECT)
            yield row


def _array_rows(file: DataFile, problems: Problems) -> Iterator[Row]:
    with file.open_text() as stream:
        text = stream.read()
    decoder = json.JSONDecoder()
    position, number, line, counted = text.index("[") + 1, 0, 1, 0
    while True:
        position = _skip(text, position)
        if text[position : position + 1] == "]" and number == 0:
            break
        start, number = position, number + 1
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = getattr(error, "pos", start)
            fault = f"not JSON ({getattr(error, 'msg', error)})"
            problems.add(
                Row({}, number, text.count("\n", 0, at) + 1), f"{fault}; check the brackets, quotes and commas"
            )
            return
        line += text.count("\n", counted, position)
        counted = position
        row = Row(value if isinstance(value, dict) else {}, number, line)
        if not isinstance(value, dict):
            problems.add(row, _NOT_OBJECT.replace("each line", "each element of the array"))
        yield row
        position = _skip(text, position)
        mark = text[position : position + 1]
        if mark == "]":
            break
        if mark != ",":
            found = f"{mark!r}" if mark else "the end of the file"
            problems.add(row, f"{found} follows, where a comma or ] must be; the file may be cut off")
            return
        position += 1
    if rest := text[_skip(text, position + 1) :]:
        line = text.count("\n", 0, len(text) - len(rest)) + 1
        raise InvalidData(f"{file.path}, line {line}: text follows the end of the array; delete it")


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _WHITESPACE:
        position += 1
    return position


def _refuse_one_object(file: DataFile) -> None:
    """Refuse a file that is one JSON object, whose lines are no rows."""
    with file.open_text() as text:
        try:
            value: Any = json.load(text)
        except (ValueError, RecursionError):
            return
    if isinstance(value, dict):
        lists = [key for key, rows in value.items() if isinstance(rows, list)]
        hint = f"; write the array of {lists[0]!r} alone" if lists else ""
        raise InvalidData(
            f"{file.path} is one JSON object; rows are an array of objects, or one object a line{hint}", param="train"
        )
