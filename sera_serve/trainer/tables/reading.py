"""Files read by `datasets`: the values stay in an Arrow table on disk, and rows are made as they are asked for."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import datasets
import pyarrow
import pyarrow.parquet
from datasets import Dataset

from sera_serve.trainer.tables.faults import InvalidData, Lines, Row
from sera_serve.trainer.tables.files import DataFile
from sera_serve.trainer.tables.strict import CsvShape

_BATCH = 1000


class NotReadAlike(Exception):
    """`datasets` cannot read a file, or would change its values. A strict reader must look at it."""


class DatasetRows(Sequence[Row]):
    """The rows of a `datasets.Dataset`. A class number becomes the name that the schema has for it.

    Attributes:
        columns: Column names, in the data set's order.
    """

    def __init__(self, dataset: Dataset, path: Path, at: int | Lines | None) -> None:
        """Wrap a data set; `path` is for messages, and `at` is where the rows are."""
        self._dataset = _undecoded(dataset)
        self._path = path
        self._at = at
        self.columns: list[str] = list(dataset.column_names)
        names = {name: _class_names(feature) for name, feature in dataset.features.items()}
        self._class_names = {name: classes for name, classes in names.items() if classes is not None}

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        try:
            return self._row(self._dataset[place], place)
        except UnicodeDecodeError as error:
            raise self._no_text(range(place, place + 1)) from error

    def __iter__(self) -> Iterator[Row]:
        number = 0
        batches = self._dataset.iter(_BATCH)
        while True:
            try:
                batch = next(batches, None)
            except UnicodeDecodeError as error:
                raise self._no_text(range(number, len(self))) from error
            if batch is None:
                return
            for values in zip(*batch.values(), strict=True):
                yield self._row(dict(zip(batch, values, strict=True)), number)
                number += 1

    def _no_text(self, places: range) -> InvalidData:
        """Find the first value among these rows whose bytes are not UTF-8. Arrow does not check a column of strings."""
        for place in places:
            for column in self.columns:
                try:
                    self._dataset.select_columns([column])[place]
                except UnicodeDecodeError as error:
                    return InvalidData(
                        f"{self._path}, {Row({}, place + 1, self._at).where}: {column} has the byte "
                        f"0x{error.object[error.start]:02x}, which is not UTF-8; decode that text and write the file "
                        "again, or leave the row out"
                    )
        return InvalidData(f"{self._path} has a text that is not UTF-8; write the file again")

    def _row(self, values: dict[str, Any], place: int) -> Row:
        row = Row(values, place + 1, self._at)
        for column, names in self._class_names.items():
            values[column] = self._named(values[column], names, column, row)
        return row

    def _named(self, value: Any, names: list[str], column: str, row: Row) -> Any:
        if isinstance(value, list):
            return [self._named(item, names, column, row) for item in value]
        # datasets writes -1 where a row has no label.
        if value is None or value == -1:
            return None
        if not 0 <= value < len(names):
            raise InvalidData(
                f"{self._path}, {row.where}: {column} is the class number {value}, and the file's schema has "
                f"{len(names)} names of classes; write the file again"
            )
        return names[value]

    def digest(self) -> str:
        """Compute the sha256 of the rows, hexadecimal."""
        digest = hashlib.sha256()
        for row in self:
            digest.update(json.dumps(row.values, sort_keys=True, default=str).encode())
        return digest.hexdigest()


def _class_names(feature: Any) -> list[str] | None:
    """The names of a class column, or of a column with lists of classes."""
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names) if feature.names else None
    inner = getattr(feature, "feature", None)
    return _class_names(inner) if inner is not None else None


def _undecoded(dataset: Dataset) -> Dataset:
    """Leave images and the like as bytes: only what a task needs is decoded."""
    for name, feature in dataset.features.items():
        if getattr(feature, "decode", False) and isinstance(feature, datasets.Image | datasets.Audio | datasets.Video):
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return dataset


def load_csv(file: DataFile, shape: CsvShape) -> Dataset:
    """Load a CSV file that `check_csv` accepted: every value is a string.

    Raises:
        NotReadAlike: `datasets` reads other rows than the strict reader, or may.
    """
    if shape.has_bare_returns:
        raise NotReadAlike
    features = datasets.Features({column: datasets.Value("string") for column in shape.columns})
    options = {
        "features": features,
        "names": shape.columns,
        "header": 0,
        "sep": shape.delimiter,
        "encoding": file.encoding,
        # "NA" and "null" are texts like others.
        "keep_default_na": False,
        "na_filter": False,
    }
    dataset = _load(file, Dataset.from_csv, options)
    if len(dataset) != len(shape.lines):
        raise NotReadAlike
    return dataset


def load_json(file: DataFile) -> Dataset:
    """Load JSON lines, of which there must be two. Of a single one `datasets` may make other rows, as pandas does.

    Raises:
        NotReadAlike: `datasets` cannot read it, such as an object with a repeated key or half of a surrogate pair. Or
            it makes dates of strings, or has written a column of mixed types anew before it was read. It writes
            numbers with ten digits, so 1.7e-11 becomes 0.
    """
    dataset = _load(file, Dataset.from_json, {"parse_agent_traces": False})
    if any(_has(dataset.features, kind) for kind in (_is_date, _is_mixed)):
        raise NotReadAlike
    return dataset


def load_file(file: DataFile) -> tuple[Dataset, dict[str, str]]:
    """Load a Parquet file, which may have no rows, or a text as one row.

    Returns:
        The rows, and the Arrow types of columns that are left out, by name: `datasets` knows no such types.

    Raises:
        InvalidData: The file cannot be read.
    """
    if file.kind == "text":
        # Decoded once before, because the error must name the line.
        with file.open_text() as text:
            while text.read(1 << 20):
                pass
        read, options = Dataset.from_text, {"sample_by": "document", "encoding": file.encoding}
    else:
        read, options = Dataset.from_parquet, {}
    try:
        return _load(file, read, options), {}
    except NotReadAlike as error:
        if file.kind == "parquet" and (found := _known_columns(file)) is not None:
            return found
        kind = "Parquet file" if file.kind == "parquet" else "text"
        raise InvalidData(f"{file.path} is not a readable {kind} ({error}); write it again") from error


def _known_columns(file: DataFile) -> tuple[Dataset, dict[str, str]] | None:
    """Load a Parquet file on which `datasets` fails: one without rows, or with columns of types that it does not know.

    Returns:
        As `load_file`; None for any other file.
    """
    try:
        with file.open_bytes() as stream:
            found = pyarrow.parquet.ParquetFile(stream)
            schema, has_rows = found.schema_arrow, found.metadata.num_rows > 0
    except (pyarrow.ArrowException, OSError, ValueError):
        return None
    unknown = {column.name: str(column.type) for column in schema if not _is_known(column)}
    known = pyarrow.schema([column for column in schema if column.name not in unknown], metadata=schema.metadata)
    if not has_rows:
        return Dataset(known.empty_table()), unknown
    if not unknown or not known.names:
        return None
    options = {"columns": known.names, "features": datasets.Features.from_arrow_schema(known)}
    try:
        return _load(file, Dataset.from_parquet, options), unknown
    except NotReadAlike:
        return None


def _is_known(column: pyarrow.Field) -> bool:
    try:
        datasets.Features.from_arrow_schema(pyarrow.schema([column]))
    except ValueError:
        return False
    return True


def _load(file: DataFile, read: Callable[..., Any], options: dict[str, Any]) -> Dataset:
    with tempfile.TemporaryDirectory(prefix="sera-rows-") as folder, quiet():
        # A name without the characters that datasets takes for a pattern.
        link = Path(folder) / f"rows{file.suffix}{file.compression}"
        link.symlink_to(file.path.resolve())
        try:
            # The Arrow table stays mapped after its folder is deleted.
            return read(str(link), cache_dir=str(Path(folder) / "cache"), **options)
        # datasets raises errors of many packages, and wraps some of them.
        except Exception as error:
            cause = error.__cause__ or error
            raise NotReadAlike((str(cause).splitlines() or [type(cause).__name__])[0]) from error


def _has(features: Any, kind: Callable[[Any], bool]) -> bool:
    """Whether a feature of a kind is among features, however deep."""
    if isinstance(features, dict):
        return any(_has(feature, kind) for feature in features.values())
    inner = getattr(features, "feature", None)
    if inner is not None:
        return _has(inner, kind)
    return kind(features)


def _is_date(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).startswith(("timestamp", "date", "time", "duration"))


def _is_mixed(feature: Any) -> bool:
    # Only newer releases of datasets have this type.
    return type(feature).__name__ == "Json"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and the log lines of `datasets` off the terminal: errors come as exceptions."""
    level = datasets.logging.get_verbosity()
    bars = datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
