"""Tables of training rows: files, folders that `datasets` saved, and data sets of the hub."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sera_serve.trainer.option_text import flag
from sera_serve.trainer.tables.faults import InvalidData, Lines, Row
from sera_serve.trainer.tables.files import DataFile, find_file
from sera_serve.trainer.tables.strict import (
    CsvShape,
    check_csv,
    has_lines,
    json_lines,
    mark_within,
    read_csv,
)
from sera_serve.trainer.tables.strict import read_json as read_json_strictly

HUB = "hub:"


@dataclass(frozen=True)
class Table:
    """The rows of a file.

    Attributes:
        path: Path of the file or folder; `hub:...` for a data set of the hub.
        columns: Column names, in the file's order.
        rows: In the file's order. Where `datasets` reads the file, each access makes the row anew. A class number has
            become the name that the file's own schema has for it.
        digest: sha256 of the file's bytes, hexadecimal; of a folder's or a data set's rows.
        notes: What the user should know about the reading.
        left_out: The types of columns that the file has and the rows have not, by name.
    """

    path: Path
    columns: list[str]
    rows: Sequence[Row]
    digest: str
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def require(self, column: str, option: str) -> None:
        """Refuse a missing column, which `option` names. The message names all columns and the closest one."""
        if column in self.columns:
            return
        if column in self.left_out:
            raise InvalidData(
                f"{self.path}: column {column!r} has the type {self.left_out[column]}, which cannot be read; write it "
                "as text, numbers or lists",
                param=option,
            )
        near = difflib.get_close_matches(column.lower(), [c.lower() for c in self.columns], n=1, cutoff=0.5)
        closest = next((c for c in self.columns if near and c.lower() == near[0]), None)
        hint = f"; did you mean {flag(option)} {closest}?" if closest else f"; name one with {flag(option)}"
        if (mark := mark_within(self.columns)) is not None:
            hint = f"; if {mark!r} stands between two columns, give --delimiter {mark!r}"
        if len(self.rows) == 1 and (lists := _lists_of_rows(self.rows[0])):
            hint = f"; the file is one JSON object: if its {lists[0]!r} are the rows, write that array alone"
        raise InvalidData(
            f"{self.path} has no column {column!r}; it has {', '.join(self.columns) or 'none'}{hint}",
            param=option,
        )


def _lists_of_rows(row: Row) -> list[str]:
    return [
        name
        for name, value in row.values.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    ]


def read_table(path: Path, *, delimiter: str | None = None, encoding: str | None = None, split: str = "train") -> Table:
    """Read a file, a folder that `datasets` saved, or a data set of the hub.

    Args:
        path: A file with one of the suffixes of `files.SUFFIXES`, perhaps compressed (.gz, .bz2, .xz, .zst); a folder
            that `save_to_disk` wrote; or `hub:owner/name`, perhaps with `/config`, `@revision` and `#split`.
        delimiter: The character between two fields of a CSV or TSV file. None takes that of the suffix, or another
            one where the header has only another one.
        encoding: The encoding of a text file. None takes that of the byte order mark, or UTF-8.
        split: The split of a folder or data set that has several.

    Raises:
        InvalidData: There is no such file, it cannot be read, or it has rows that do not parse.
    """
    is_hub = str(path).startswith(HUB)
    if is_hub or path.is_dir():
        _refuse_given(path, delimiter=delimiter, encoding=encoding)
    if is_hub:
        from sera_serve.trainer.tables.hub import read_hub

        table = read_hub(path, split)
    elif path.is_dir():
        from sera_serve.trainer.tables.hub import read_saved

        table = read_saved(path, split)
    else:
        table = _read_file(find_file(path, encoding), delimiter)
    if not table.rows:
        raise InvalidData(f"{table.path} has no rows; give a file with at least a few")
    return table


def _read_file(file: DataFile, delimiter: str | None) -> Table:
    if file.kind != "csv":
        _refuse_given(file.path, delimiter=delimiter)
    if file.kind == "parquet":
        _refuse_given(file.path, encoding=file.encoding if file.is_given else None)
    if file.kind == "csv":
        return _read_csv(file, check_csv(file, delimiter))
    if file.kind == "json":
        return _read_json(file)
    from sera_serve.trainer.tables.reading import DatasetRows, load_file

    dataset, left_out = load_file(file)
    if file.kind == "text":
        return Table(file.path, ["text"], DatasetRows(dataset, file.path, 1), file.digest())
    rows = DatasetRows(dataset, file.path, None)
    notes = [
        f"column {column!r} of {file.path.name} is left out, because its type {kind} cannot be read"
        for column, kind in left_out.items()
    ]
    return Table(file.path, rows.columns, rows, file.digest(), notes, left_out)


def _refuse_given(path: Path, **options: str | None) -> None:
    """Refuse those of these options that were given, because nothing would read them."""
    takes = {"delimiter": ".csv and .tsv", "encoding": ".csv, .tsv, .jsonl, .json and .txt"}
    for option, value in options.items():
        if value is not None:
            raise InvalidData(f"{path} has no {option}; {flag(option)} is for {takes[option]}", param=option)


def _read_csv(file: DataFile, shape: CsvShape) -> Table:
    from sera_serve.trainer.tables.reading import DatasetRows, NotReadAlike, load_csv

    rows: Sequence[Row]
    if not shape.lines:
        rows = []
    else:
        try:
            rows = DatasetRows(load_csv(file, shape), file.path, Lines(lambda: shape.lines))
        except NotReadAlike:
            rows = read_csv(file, shape)
    notes = [shape.note] if shape.note else []
    return Table(file.path, shape.columns, rows, file.digest(), notes=notes)


def _read_json(file: DataFile) -> Table:
    from sera_serve.trainer.tables.reading import DatasetRows, NotReadAlike, load_json

    rows: Sequence[Row]
    columns: list[str]
    try:
        # pandas, to which datasets turns for other files, takes some of them apart in its own way.
        if file.encoding not in ("utf-8", "utf-8-sig") or not has_lines(file):
            raise NotReadAlike
        rows = found = DatasetRows(load_json(file), file.path, Lines(lambda: json_lines(file)))
        columns = found.columns
    except NotReadAlike:
        columns, rows = read_json_strictly(file)
    return Table(file.path, columns, rows, file.digest())
