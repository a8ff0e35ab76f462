"""Reads rows from CSV, TSV, JSONL, Parquet and plain text, and reports each fault by row and line."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sera_serve.errors import SeraServeError

FORMATS = ".csv, .tsv, .jsonl, .parquet, .txt"
TEXT_COLUMN = "text"
_SHOWN = 5


class InvalidData(SeraServeError):
    """The training data cannot be used. The message names rows, lines and remedies."""

    code = "invalid_training_data"
    status = 422


@dataclass(frozen=True)
class Row:
    """One row: values by column, 1-based number, and 1-based number of the last line (None in Parquet)."""

    values: dict[str, Any]
    number: int
    line: int | None

    @property
    def where(self) -> str:
        """ "row 3 (line 4)", for messages."""
        return f"row {self.number}" + (f" (line {self.line})" if self.line is not None else "")


@dataclass(frozen=True)
class Table:
    """The rows of a file.

    Attributes:
        path: Path of the file.
        columns: Column names, in the file's order.
        rows: In the file's order.
        digest: sha256 of the file's bytes, hexadecimal.
    """

    path: Path
    columns: list[str]
    rows: list[Row]
    digest: str

    def require(self, column: str, option: str) -> None:
        """Refuse a missing column. The message names all columns and the closest one."""
        if column in self.columns:
            return
        near = difflib.get_close_matches(column.lower(), [c.lower() for c in self.columns], n=1, cutoff=0.5)
        closest = next((c for c in self.columns if near and c.lower() == near[0]), None)
        hint = f"; did you mean {option} {closest}?" if closest else f"; name one with {option}"
        raise InvalidData(
            f"{self.path} has no column {column!r}; it has {', '.join(self.columns) or 'none'}{hint}",
            param=option,
        )


class Problems:
    """Collects the faults of a file, so that one run shows several of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[str] = []

    def add(self, row: Row, text: str) -> None:
        """Add a fault of one row."""
        self.found.append(f"{row.where}: {text}")

    def raise_if_any(self) -> None:
        """Raise `InvalidData` with the first few faults if there is one."""
        if not self.found:
            return
        if len(self.found) == 1:
            raise InvalidData(f"{self.path}, {self.found[0]}", param="train")
        shown = "".join(f"\n  {text}" for text in self.found[:_SHOWN])
        more = len(self.found) - _SHOWN
        rest = f"\n  and {more} more" if more > 0 else ""
        raise InvalidData(f"{self.path} has {len(self.found)} problems:{shown}{rest}", param="train")


def read_table(path: Path) -> Table:
    """Read a file by its suffix.

    Raises:
        InvalidData: The file is missing, has an unknown suffix, is not UTF-8, or has rows that do not parse.
    """
    suffix = path.suffix.lower()
    if suffix not in {".csv", ".tsv", ".jsonl", ".parquet", ".txt"}:
        raise InvalidData(f"{path}: the suffix {suffix!r} is not one of {FORMATS}; convert or rename the file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidData(f"{path} cannot be read: {error.strerror}; check the path") from error
    digest = hashlib.sha256(data).hexdigest()
    if suffix == ".parquet":
        columns, rows = _read_parquet(path, data)
    else:
        text = _decode(path, data)
        if suffix == ".jsonl":
            columns, rows = _read_jsonl(path, text)
        elif suffix == ".txt":
            columns, rows = [TEXT_COLUMN], [Row({TEXT_COLUMN: text}, 1, 1)]
        else:
            columns, rows = _read_separated(path, text, "," if suffix == ".csv" else "\t")
    if not rows:
        raise InvalidData(f"{path} has no rows; give a file with at least a few")
    return Table(path, columns, rows, digest)


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidData(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8 "
            f"(iconv -f latin1 -t utf-8 {path.name} > fixed{path.suffix})"
        ) from error


def _read_separated(path: Path, text: str, delimiter: str) -> tuple[list[str], list[Row]]:
    # newline="" keeps line breaks inside quoted fields; the csv module requires it.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records = _records(path, reader)
    first = next(records, None)
    if first is None:
        raise InvalidData(f"{path} is empty; its first line must name the columns")
    columns = [name.strip() for name in first[1]]
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    if repeated:
        raise InvalidData(f"{path}, line 1: column {repeated[0]!r} appears twice; rename one")
    problems = Problems(path)
    rows: list[Row] = []
    for line, fields in records:
        row = Row(dict(zip(columns, fields, strict=False)), len(rows) + 1, line)
        rows.append(row)
        if len(fields) != len(columns):
            fault = f"{len(fields)} fields where the header has {len(columns)}"
            problems.add(row, f'{fault}; put a text that holds the separator in "double quotes"')
    problems.raise_if_any()
    return columns, rows


def _records(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, fields
    except csv.Error as error:
        raise InvalidData(f"{path}, line {reader.line_num}: {error}; check the quotes around that text") from error


def _read_jsonl(path: Path, text: str) -> tuple[list[str], list[Row]]:
    problems = Problems(path)
    rows: list[Row] = []
    columns: dict[str, None] = {}
    # splitlines() would also split at U+2028 and similar characters, which JSON strings may contain unescaped.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        row = Row({}, len(rows) + 1, line)
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            value = None
            problems.add(row, f"not JSON ({error}); each line must be one object")
        else:
            if isinstance(value, dict):
                row = Row(value, row.number, line)
                columns.update(dict.fromkeys(value))
            else:
                problems.add(row, 'not an object; each line must look like {"column": value, ...}')
        rows.append(row)
    problems.raise_if_any()
    return list(columns), rows


def _read_parquet(path: Path, data: bytes) -> tuple[list[str], list[Row]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidData(f"{path} is not a readable Parquet file ({reason}); write it again") from error
    records: Iterable[dict[str, Any]] = table.to_pylist()
    return list(table.column_names), [Row(values, i, None) for i, values in enumerate(records, 1)]
