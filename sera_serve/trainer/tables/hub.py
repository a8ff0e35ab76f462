"""Data sets that `datasets` saved to a folder, and data sets of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets

from sera_serve.trainer.tables.faults import InvalidData
from sera_serve.trainer.tables.reading import DatasetRows, quiet
from sera_serve.trainer.tables.table import Table

_NAMED = re.compile(
    r"hub:(?P<id>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?(?:#(?P<split>[\w.-]+))?"
)
# The split that a use takes where the data set has none of its name.
_OTHER_SPLITS = {"eval": ("validation", "dev", "val", "test")}


def read_saved(path: Path, split: str) -> Table:
    """Read a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Args:
        path: The folder.
        split: "train", "eval" or "test": what the rows are for. A `DatasetDict` has one data set for each.

    Raises:
        InvalidData: The folder is another kind of folder, has no such split, or cannot be read.
    """
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise InvalidData(
            f"{path} is a folder that datasets did not save; name a file in it, or a folder that save_to_disk wrote"
        )
    try:
        folder = _folder_of(path, split)
        # datasets fails on a data set without rows, for which it writes no file.
        if not json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]:
            return Table(folder, [], [], "")
        with quiet():
            loaded = datasets.load_from_disk(str(folder))
    except InvalidData:
        raise
    # datasets raises errors of many packages.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InvalidData(f"{path} cannot be read ({reason}); save the data set again") from error
    return _table(path, loaded)


def _folder_of(path: Path, split: str) -> Path:
    """The folder of the data set for a use: `path` itself, or that of one of its splits."""
    if not (path / "dataset_dict.json").is_file():
        return path
    splits: list[str] = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    names: tuple[str, ...] = (split, *_OTHER_SPLITS.get(split, ()))
    for name in names:
        if name in splits:
            return path / name
    raise InvalidData(
        f"{path} has no split for {split}; it has {', '.join(splits)}: name the folder of one of them, such as "
        f"{path / next(iter(splits), 'train')}",
        param=split,
    )


def read_hub(path: Path, split: str) -> Table:
    """Read a data set of the hub: `hub:owner/name[/config][@revision][#split]`.

    Args:
        path: The name, after `hub:`.
        split: "train", "eval" or "test": the split that is taken where the name has none ("validation" for "eval").

    Raises:
        InvalidData: The name is malformed, or the data set cannot be had.
    """
    match = _NAMED.fullmatch(str(path))
    if match is None:
        raise InvalidData(
            f"{path} names no data set; write hub:owner/name, and perhaps /config, @revision and #split after it"
        )
    chosen = match["split"] or ("validation" if split == "eval" else split)
    try:
        with quiet():
            # A script of the data set is never run: datasets no longer does it.
            loaded = datasets.load_dataset(match["id"], match["config"], revision=match["revision"], split=chosen)
    # Errors of the hub's client, of the network and of the readers of all formats.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InvalidData(
            f"{path} cannot be had from the hub ({reason}); check the name, the config and the split {chosen!r}, or "
            f"download it where there is a network (hf download --repo-type dataset {match['id']}) and name its file"
        ) from error
    return _table(path, loaded)


def _table(path: Path, dataset: Any) -> Table:
    rows = DatasetRows(dataset, path, None)
    return Table(path, rows.columns, rows, rows.digest())
