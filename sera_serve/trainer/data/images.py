"""Training data of image tasks: labelled images and captioned images, every image read and checked before training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from adapters_store import AdapterConfig, ImageSpec
from sera_serve.trainer.data.labelled import USES, Examples, ImageExample, Use
from sera_serve.trainer.data.splits import draw, hold_out
from sera_serve.trainer.data.targets import labels_of_rows, reader_of_labels
from sera_serve.trainer.option_text import flag
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tables.faults import InvalidData, Problems, Row, faults_of
from sera_serve.trainer.tables.fields import label_of
from sera_serve.trainer.tables.image_files import (
    FolderSource,
    ImageSource,
    ImageStore,
    TableSource,
    UnusableImage,
    cell_image,
    open_images,
)
from sera_serve.trainer.tables.image_folder import read_image_folder
from sera_serve.trainer.tables.table import Table, read_table

T = TypeVar("T")
# The names that `datasets` gives the table of an image folder, and its column of paths.
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_METADATA_COLUMN = "file_name"


@dataclass(frozen=True, kw_only=True)
class ImageExamples(Examples[ImageExample[T]]):
    """Checked rows of a task on images, by use; no labels of captions.

    Attributes:
        images: Every image.
        spec: The preprocessing of the adapter that the run goes on from, or None for the base's own.
    """

    images: ImageStore
    spec: ImageSpec | None


@dataclass(frozen=True)
class _FileRow(Row):
    """A row of an image folder; its number is its place in the order of names."""

    @property
    def where(self) -> str:
        return str(self.values["image"])


def load_image_classify_data(settings: TrainSettings, initial: AdapterConfig | None = None) -> ImageExamples[Any]:
    """Read and check the images of `settings`, with a label each, or with `--multi-label` a set of labels each.

    `--train` is a table with a column of images, a folder with such a table (metadata.csv, .jsonl or .parquet, as
    `datasets` has it), or an image folder or its zip file. The splits of an image folder are used by their names where
    `--eval` and `--test` are not given. Its folders are one label each, so it has no sets of labels.

    Args:
        settings: Options of the run.
        initial: The adapter that the run goes on from: its labels and preprocessing are kept. None takes the labels of
            the rows.

    Raises:
        InvalidData: A file, an image or some of the rows cannot be used.
    """
    if not settings.multi_label:
        _check_table_options(settings)
    reader = _Reader(settings)
    rows = reader.uses(reader.labelled)
    return reader.examples(rows, initial, labels_of_rows(settings, rows, reader.notes, initial))


def load_retrieve_data(settings: TrainSettings, initial: AdapterConfig | None = None) -> ImageExamples[str]:
    """Read and check the images and captions of `settings`; arguments as in `load_image_classify_data`.

    Raises:
        InvalidData: A file, an image or some of the rows cannot be used.
    """
    reader = _Reader(settings)
    rows = reader.uses(reader.captioned)
    for use in USES:
        if rows[use] and len({item.image for item in rows[use]}) < 2:
            raise InvalidData(
                f"{getattr(settings, use)} has one image, which has no other to be told from; add images", param=use
            )
    rows["train"] = draw(rows["train"], settings.train_limit, settings.seed)
    if settings.eval is None and settings.eval_fraction:
        rows["train"], rows["eval"] = hold_out(
            rows["train"], settings.eval_fraction, settings.seed, key=lambda r: r.key, stratum=lambda r: ""
        )
        for part in (rows["train"], rows["eval"]):
            if len({item.image for item in part}) < 2:
                raise InvalidData(
                    f"{settings.train} has too few images to hold some out; add images, give --eval, or "
                    "--eval-fraction 0"
                )
    return reader.examples(rows, initial)


class _Reader:
    """Reads the files of one run into one store of images."""

    def __init__(self, settings: TrainSettings) -> None:
        self._settings = settings
        self.images = ImageStore()
        self.digests: dict[str, str] = {}
        self.notes: list[str] = []

    def uses(self, read: Callable[[Use], list[ImageExample[T]]]) -> dict[Use, list[ImageExample[T]]]:
        """Read the rows of every use."""
        rows: dict[Use, list[ImageExample[T]]] = {}
        for use in USES:
            # Without a file of its own, the rows are a split of the folder of the training rows.
            with faults_of(use if getattr(self._settings, use) is not None else "train"):
                rows[use] = read(use)
        return rows

    def examples(
        self, rows: dict[Use, list[ImageExample[T]]], initial: AdapterConfig | None, labels: Sequence[str] = ()
    ) -> ImageExamples[T]:
        """The rows with all that was read beside them."""
        return ImageExamples(
            rows["train"],
            rows["eval"],
            rows["test"],
            self.digests,
            self.notes,
            list(labels),
            images=self.images,
            spec=initial.image if initial is not None else None,
        )

    def labelled(self, use: Use) -> list[ImageExample[Any]]:
        """Read the rows for a use: train, eval or test; none if there is no file for it."""
        settings = self._settings
        path: Path | None = getattr(settings, use)
        if not settings.multi_label and _is_image_folder(path or settings.train):
            return self._labelled_files(use, path)
        if path is None:
            return []
        if _is_image_folder(path):
            raise InvalidData(
                f"{path} is read as label/file, where an image has one label; give a folder with a {_METADATA[0]} or "
                f"{_METADATA[1]} beside the images, with the columns {_METADATA_COLUMN} and {settings.label_column}",
                param=use,
            )
        read = reader_of_labels(settings)
        return self._examples(path, use, "label_column", lambda *cell: [read(*cell)])

    def _labelled_files(self, use: Use, given: Path | None) -> list[ImageExample[str]]:
        path = given or self._settings.train
        source = open_images(path)
        folder = read_image_folder(source, path)
        self.notes += [note for note in folder.notes if note not in self.notes]
        if given is None:
            # Without splits, --train has nothing but training rows.
            if use not in folder.splits:
                return []
            files = folder.splits[use]
        else:
            files = folder.choose(use, path)
        problems = Problems(path)
        rows = [_FileRow({"image": name, "label": label}, i, None) for i, (name, label) in enumerate(files, 1)]
        found = [
            ImageExample(self._checked(source, row, problems), label_of(row, "label", problems), row) for row in rows
        ]
        problems.raise_if_any()
        self.digests[use] = _digest([f"{item.row.where} {item.image}" for item in found])
        return found

    def captioned(self, use: Use) -> list[ImageExample[str]]:
        """Read the rows for a use, as `labelled` does. A cell may hold one caption or a list of them."""
        path: Path | None = getattr(self._settings, use)
        if path is None:
            return []
        if _is_image_folder(path):
            raise InvalidData(
                f"{path} has images without captions; give a table with the columns image and caption, and name the "
                "folder of the images with --images",
                param=use,
            )
        return self._examples(path, use, "caption_column", _captions)

    def _examples(
        self, path: Path, use: Use, option: str, targets: Callable[[Row, str, Problems], list[T]]
    ) -> list[ImageExample[T]]:
        """Read a table: one example for each of the `targets` of a row's cell in the column that `option` names."""
        table, images = self._table(path, use)
        column = getattr(self._settings, option)
        table.require(column, option)
        problems = Problems(path)
        rows = [
            ImageExample(image, target, row.place())
            for row, image in self._table_images(table, images, problems, use)
            for target in targets(row, column, problems)
        ]
        problems.raise_if_any()
        return rows

    def _table(self, path: Path, use: Use) -> tuple[Table, str]:
        """Read a table, and find its column of images."""
        if path.is_dir() and (inside := _metadata_of(path)) is not None:
            path = inside
        settings = self._settings
        table, column = _read_table(path, settings.image_column, settings.delimiter, settings.encoding, use)
        self.notes += table.notes
        return table, column

    def _table_images(self, table: Table, column: str, problems: Problems, use: Use) -> Iterator[tuple[Row, str]]:
        """Yield each row with the digest of its image. A row whose image cannot be used, is added to `problems`."""
        files = FolderSource(table.path.parent) if self._settings.images is None else open_images(self._settings.images)
        cells = TableSource(table.rows, column)
        # Rows with several captions name one image several times; it is read once.
        known: dict[str, str] = {}
        images = []
        for place, row in enumerate(table.rows):
            digest = ""
            try:
                found = cell_image(row.values.get(column))
                if isinstance(found, bytes):
                    digest = self.images.add(cells, str(place), found)
                else:
                    digest = known[found] = known.get(found) or self.images.add(files, found)
            except UnusableImage as error:
                problems.add(row, f"{column}: {error.message}")
            images.append(digest)
            yield row, digest
        self.digests[use] = table.digest
        self.digests[f"{use}_images"] = _digest(images)

    def _checked(self, source: ImageSource, row: _FileRow, problems: Problems) -> str:
        """The digest of an image of a folder. One that cannot be used is added to `problems`."""
        try:
            return self.images.add(source, row.where)
        except UnusableImage as error:
            problems.add(row, error.message)
            return ""


def named_images_digest(
    path: Path, image_column: str, delimiter: str | None, encoding: str | None, use: Use
) -> str | None:
    """The sha256 of the images that a table names by their paths from its folder; None where it names none.

    What cannot be read is left out: the run refuses it. The other arguments are options of the run.
    """
    try:
        table, column = _read_table(path, image_column, delimiter, encoding, use)
    except InvalidData:
        return None
    files, found = FolderSource(table.path.parent), dict[str, str]()
    for row in table.rows:
        with suppress(UnusableImage):
            name = cell_image(row.values.get(column))
            if isinstance(name, str) and name not in found:
                found[name] = hashlib.sha256(files.read(name)).hexdigest()
    return _digest(list(found.values())) if found else None


def _read_table(
    path: Path, image_column: str, delimiter: str | None, encoding: str | None, use: Use
) -> tuple[Table, str]:
    """Read a table, and find its column of images."""
    table = read_table(path, delimiter=delimiter, encoding=encoding, split=use)
    if image_column == "image" and image_column not in table.columns and _METADATA_COLUMN in table.columns:
        image_column = _METADATA_COLUMN
    table.require(image_column, "image_column")
    return table, image_column


def _check_table_options(settings: TrainSettings) -> None:
    """Refuse options of tables where every file is a folder of images: nothing would read them."""
    if all(_is_image_folder(path) for use in USES if (path := getattr(settings, use)) is not None):
        for option in ("image_column", "images", "label_column", "delimiter", "encoding"):
            if getattr(settings, option) != TrainSettings.model_fields[option].default:
                raise InvalidData(
                    f"{flag(option)} is for tables, and {settings.train} is read as label/file; leave it out",
                    param=option,
                )


def _is_image_folder(path: Path) -> bool:
    """Whether a path is a folder or zip file of images, without a table that describes them."""
    if path.is_dir():
        # What `save_to_disk` of `datasets` wrote is a table.
        return _metadata_of(path) is None and not any(
            (path / name).is_file() for name in ("state.json", "dataset_dict.json")
        )
    return path.suffix.lower() == ".zip"


def _metadata_of(folder: Path) -> Path | None:
    return next((folder / name for name in _METADATA if (folder / name).is_file()), None)


def _captions(row: Row, column: str, problems: Problems) -> list[str]:
    value = row.values.get(column)
    captions: list[Any] = value if isinstance(value, list) else [value]
    if not captions or any(not isinstance(caption, str) or not caption.strip() for caption in captions):
        problems.add(row, f"{column} has no text, or a text that is empty; fill it in or delete the row")
        return []
    return captions


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
