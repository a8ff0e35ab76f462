"""Image folders: `label/file`, or `split/label/file`, in a folder or a zip file.

The names of splits are those of `datasets` (imagefolder). Unlike there, an image that lies elsewhere is an error: it
would be left out without a word. A zip file is read where it lies, without unpacking it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sera_serve.trainer.tables.faults import InvalidData
from sera_serve.trainer.tables.image_files import IMAGE_SUFFIXES, FolderSource, ZipSource, is_clutter

# https://huggingface.co/docs/datasets/repository_structure#split-names
SPLITS = {
    "train": ("train", "training"),
    "eval": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
_OTHER_IMAGES = (".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg", ".ico")
_SHOWN = 3


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder or zip file.

    Attributes:
        splits: (name, label) of each image, sorted by name, by split: train, eval or test. Images without a split are
            under "".
        notes: What was left out.
    """

    splits: dict[str, list[tuple[str, str]]]
    notes: list[str]

    def choose(self, use: str, path: Path) -> list[tuple[str, str]]:
        """Return the images for one use: those of the split of that name, or all if there are no splits.

        Raises:
            InvalidData: There are splits, and none is for this use.
        """
        if "" in self.splits:
            return self.splits[""]
        if use not in self.splits:
            raise InvalidData(
                f"{path} has the splits {', '.join(sorted(self.splits))} and none for {use}; name a folder "
                f"{SPLITS[use][0]!r}, or give the folder above the labels",
                param=use,
            )
        return self.splits[use]


def read_image_folder(source: FolderSource | ZipSource, path: Path) -> ImageFolder:
    """Find the split and the label of every image by its folders.

    Args:
        source: The folder or zip file.
        path: Its path, for messages.

    Raises:
        InvalidData: There are no images, images of other formats, or images outside of `label/` or `split/label/`.
    """
    names = [name for name in source.names() if not is_clutter(name)]
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    strange = [name for name in names if name.lower().endswith(_OTHER_IMAGES)]
    if strange:
        raise InvalidData(
            f"{path} has {len(strange)} images that are not JPEG, PNG or WebP, such as {strange[0]}; convert them, or "
            "move them away"
        )
    if not images:
        raise InvalidData(f"{path} has no images (.jpg, .png, .webp); give label/file or split/label/file")
    others = [name for name in names if not name.lower().endswith(IMAGE_SUFFIXES)]
    notes = []
    if others:
        shown = ", ".join(others[:_SHOWN]) + (", ..." if len(others) > _SHOWN else "")
        notes.append(f"{len(others)} files of {path} are no images and were left out: {shown}")
    return ImageFolder(_by_split(_below_the_wrapper(images), path), notes)


def _below_the_wrapper(names: list[str]) -> dict[str, tuple[str, ...]]:
    """The folders and name of each file, by its full name, without folders around all the splits or labels."""
    parts = {name: PurePosixPath(name).parts for name in names}
    while all(len(path) > 2 for path in parts.values()):
        first = {path[0] for path in parts.values()}
        if len(first) > 1 or next(iter(first)).lower() in _SPLIT_OF:
            break
        parts = {name: path[1:] for name, path in parts.items()}
    return parts


def _by_split(parts: dict[str, tuple[str, ...]], path: Path) -> dict[str, list[tuple[str, str]]]:
    depth = 3 if all(len(folders) == 3 and folders[0].lower() in _SPLIT_OF for folders in parts.values()) else 2
    found: dict[str, list[tuple[str, str]]] = {}
    for name, folders in parts.items():
        if len(folders) != depth:
            raise InvalidData(
                f"{path}: {name} is not in a folder named by its label; every image must be label/file, or "
                f"split/label/file with the splits {', '.join(_SPLIT_OF)}; a table with the columns image and label "
                "can say it too"
            )
        split = _SPLIT_OF[folders[0].lower()] if depth == 3 else ""
        found.setdefault(split, []).append((name, folders[-2]))
    if depth == 2 and all(label.lower() in _SPLIT_OF for _, label in found[""]):
        raise InvalidData(
            f"{path} has the folders of splits ({', '.join(sorted({label for _, label in found['']}))}) and none of "
            "labels; every image must be split/label/file"
        )
    return found
