"""Where the bytes of training images come from: a folder, a zip file, or a table; and the check of each image."""

from __future__ import annotations

import hashlib
import os
import posixpath
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sera_serve.base.images import decode_image
from sera_serve.errors import SeraServeError
from sera_serve.trainer.tables.faults import InvalidData, Row

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_IMAGE_BYTES = 64 << 20
MAX_IMAGE_PIXELS = 50_000_000
# Decoded images that stay in memory between epochs; what is beyond is decoded again.
CACHE_BYTES = 256 << 20


class UnusableImage(SeraServeError):
    """An image cannot be read: the message says why and what helps, without the image's name."""

    code = "unusable_image"
    status = 422


class ImageSource(Protocol):
    """A place with images, each by a name."""

    def read(self, name: str) -> bytes:
        """Return the bytes of one image; raise `UnusableImage` if that cannot be."""
        ...


class FolderSource:
    """Images of a folder, by their path in it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def _resolved(self) -> Path:
        return self.root.resolve()

    def names(self) -> list[str]:
        """Return the path of every file, sorted.

        Raises:
            InvalidData: A folder in it is a link, which could lead anywhere, or cannot be read.
        """
        return sorted(self._walk())

    def _walk(self) -> Iterator[str]:
        for parent, folders, files in os.walk(self.root, onerror=_refuse_folder):
            here = Path(parent)
            for folder in folders:
                if (here / folder).is_symlink():
                    raise InvalidData(f"{here / folder} is a link to a folder; copy the folder there")
            for file in files:
                yield (here / file).relative_to(self.root).as_posix()

    def read(self, name: str) -> bytes:
        """Return the bytes of a file, which must lie inside the folder."""
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name:
            raise UnusableImage(f"{name!r} is no path inside {self.root}; write it relative to that folder")
        path = self.root / name
        try:
            if not path.resolve(strict=True).is_relative_to(self._resolved):
                raise UnusableImage(f"{name} is a link that leaves {self.root}; copy the file there")
            if not path.is_file():
                raise UnusableImage(f"{name} is no file")
            if path.stat().st_size > MAX_IMAGE_BYTES:
                raise UnusableImage(f"{name} is larger than {MAX_IMAGE_BYTES >> 20} MiB; save it smaller")
            return path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "impossible path"
            raise UnusableImage(f"{name} cannot be read in {self.root} ({reason}); check the path") from error


def _refuse_folder(error: OSError) -> NoReturn:
    raise InvalidData(f"{error.filename} cannot be read: {error.strerror}; check its permissions") from error


class ZipSource:
    """Images of a zip file, by their name in it. Nothing is unpacked to disk."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            InvalidData: It is missing, no zip file, or has a name twice.
        """
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except OSError as error:
            raise InvalidData(f"{path} cannot be read: {error.strerror}; check the path") from error
        except zipfile.BadZipFile as error:
            raise InvalidData(f"{path} is no complete zip file ({error}); copy it again") from error
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in self._zip.infolist():
            if member.is_dir():
                continue
            if member.filename in self._members:
                raise InvalidData(f"{path} has {member.filename!r} twice; zip the folder again")
            self._members[member.filename] = member

    def names(self) -> list[str]:
        """Return the name of every file, sorted."""
        return sorted(self._members)

    @cached_property
    def prefix(self) -> str:
        """The folders that every file lies in, such as "images/", or ""."""
        parents = [posixpath.dirname(name) for name in self._members if not is_clutter(name)]
        shared = posixpath.commonpath(parents) if parents and len({p.startswith("/") for p in parents}) == 1 else ""
        return f"{shared}/" if shared else ""

    def read(self, name: str) -> bytes:
        """Return the bytes of a file. A name may leave out the folders that every file lies in."""
        member = self._members.get(name) or self._members.get(self.prefix + name)
        if member is None:
            raise UnusableImage(f"{name!r} is not in {self.path}; check the name")
        # A member's data end where its declared size ends, so a bomb cannot be larger than it says.
        if member.file_size > MAX_IMAGE_BYTES:
            raise UnusableImage(f"{name} is larger than {MAX_IMAGE_BYTES >> 20} MiB; save it smaller")
        try:
            return self._zip.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError, ValueError) as error:
            # RuntimeError: encrypted; NotImplementedError, a kind of it: an unknown compression.
            raise UnusableImage(f"{name} cannot be read from {self.path} ({error}); zip the folder again") from error


class TableSource:
    """Images that a column of a table holds, by the place of their row. Each reading takes the row anew."""

    def __init__(self, rows: Sequence[Row], column: str) -> None:
        self._rows = rows
        self._column = column

    def read(self, name: str) -> bytes:
        """Return the bytes of an image."""
        found = cell_image(self._rows[int(name)].values.get(self._column))
        assert isinstance(found, bytes)
        return found


class ImageStore:
    """Every image of a run, by the sha256 of its bytes: equal images are one image.

    Images are decoded when they are used. Decoded images stay in memory up to `cache_bytes`.
    """

    def __init__(self, cache_bytes: int = CACHE_BYTES) -> None:
        self._places: dict[str, tuple[ImageSource, str]] = {}
        self._cache: OrderedDict[str, NDArray[np.uint8]] = OrderedDict()
        self._room = cache_bytes

    def __len__(self) -> int:
        return len(self._places)

    def add(self, source: ImageSource, name: str, data: bytes | None = None) -> str:
        """Read and decode an image, and return the digest that names it from now on.

        Args:
            source: Where the image is.
            name: Its name there.
            data: Its bytes, if they were read already.

        Raises:
            UnusableImage: It cannot be read, is no whole JPEG, PNG or WebP image, or has too many pixels.
        """
        if data is None:
            data = source.read(name)
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._places:
            self._keep(digest, self._decode(data))
            self._places[digest] = source, name
        return digest

    def image(self, digest: str) -> Image.Image:
        """Return an image in RGB.

        Raises:
            InvalidData: Its file has changed since `add`.
        """
        if (pixels := self._cache.get(digest)) is not None:
            return Image.fromarray(pixels)
        source, name = self._places[digest]
        data = b""
        with suppress(UnusableImage):
            data = source.read(name)
        if hashlib.sha256(data).hexdigest() != digest:
            raise InvalidData(f"image {name} changed while it was trained on; start the run again")
        image = self._decode(data)
        self._keep(digest, image)
        return image

    @staticmethod
    def _decode(data: bytes) -> Image.Image:
        try:
            image: Image.Image = decode_image(data, MAX_IMAGE_PIXELS)
        except SeraServeError as error:
            raise UnusableImage(error.message) from error
        return image

    def _keep(self, digest: str, image: Image.Image) -> None:
        pixels: NDArray[np.uint8] = np.asarray(image)
        # Nothing is thrown out: rows come in another order each epoch, so any image is as likely to be used next.
        if pixels.nbytes <= self._room:
            self._cache[digest] = pixels
            self._room -= pixels.nbytes


def is_clutter(name: str) -> bool:
    """Whether a file is one that file managers leave behind."""
    parts = PurePosixPath(name).parts
    return any(part.startswith(".") or part == "__MACOSX" for part in parts) or parts[-1] in (
        "Thumbs.db",
        "desktop.ini",
    )


def open_images(path: Path) -> FolderSource | ZipSource:
    """Open a folder or a zip file of images.

    Raises:
        InvalidData: It is neither.
    """
    if path.is_dir():
        return FolderSource(path)
    if path.suffix.lower() == ".zip":
        return ZipSource(path)
    raise InvalidData(f"{path} is no folder and no .zip file; name the place of the images", param="images")


def cell_image(value: Any) -> bytes | str:
    """Return what a table's cell says of an image: its bytes, or a path.

    Args:
        value: A path; or bytes; or `{"bytes", "path"}`, as the Image feature of `datasets` stores it.

    Raises:
        UnusableImage: The value is something else, or too large.
    """
    if isinstance(value, dict) and set(value) <= {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if value is None or value in ("", b""):
        raise UnusableImage("the cell is empty; give an image or delete the row")
    if isinstance(value, bytes):
        if len(value) > MAX_IMAGE_BYTES:
            raise UnusableImage(f"the image is larger than {MAX_IMAGE_BYTES >> 20} MiB; save it smaller")
        return value
    if not isinstance(value, str):
        raise UnusableImage(f"{type(value).__name__} is no image; give a path, or the bytes of an image file")
    return value
