"""Bodies of uploads: an adapter on disk or in memory as one file of a multipart form, read while it is sent."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

CONFIG_FILE = "adapter_config.json"
MODEL_FILE = "adapter_model.safetensors"
# Files of a directory that an import reads beside the two. A training run leaves others, which may be large.
READ_BESIDE = ("added_tokens.json", "config.json", "chat_template.jinja", "tokenizer_config.json")
_BLOCK = 512

Progress = Callable[[int, int], None]
"""Gets the bytes that were handed to the connection, and the bytes of the whole adapter."""


@dataclass(frozen=True)
class _FilePart:
    """The first `size` bytes of a file."""

    path: Path
    size: int


class _PartsReader(io.RawIOBase):
    """Reads parts one after the other, as one file. It can be rewound to its beginning alone."""

    def __init__(self, parts: list[bytes | _FilePart], progress: Progress | None) -> None:
        self._parts = parts
        self._progress = progress
        self._size = sum(len(part) if isinstance(part, bytes) else part.size for part in parts)
        self._next = self._position = 0
        # What is left of the part that is being read.
        self._left = 0
        self._file: IO[bytes] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        # httpx seeks to the end to learn the length, then back, and to the beginning before it reads.
        if (offset, whence) == (0, os.SEEK_END):
            return self._size
        if whence != os.SEEK_SET or offset not in (0, self._position):
            raise io.UnsupportedOperation("an upload is read from its beginning to its end")
        if offset == 0:
            self._close_part()
            self._next = self._position = 0
        return offset

    def readinto(self, buffer: Any) -> int:
        while self._left == 0:
            self._close_part()
            if self._next == len(self._parts):
                return 0
            self._open(self._parts[self._next])
            self._next += 1
        assert self._file is not None
        chunk = self._file.read(min(len(buffer), self._left))
        if not chunk:
            raise OSError(f"{self._file.name} became shorter while it was sent; send the upload again")
        buffer[: len(chunk)] = chunk
        self._left -= len(chunk)
        self._position += len(chunk)
        if self._progress is not None:
            self._progress(self._position, self._size)
        return len(chunk)

    def close(self) -> None:
        self._close_part()
        super().close()

    def _open(self, part: bytes | _FilePart) -> None:
        if isinstance(part, bytes):
            self._file, self._left = io.BytesIO(part), len(part)
        else:
            self._file, self._left = part.path.open("rb"), part.size

    def _close_part(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._left = None, 0


class UploadForm:
    """The form of `POST /v1/adapters`. It can be sent several times: each time the files are read anew."""

    def __init__(
        self,
        name: str,
        source: str | Path | bytes,
        config: str | Path | bytes | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Look at the source; its contents are read when the form is sent.

        Args:
            name: `tenant/name`.
            source: A file, the bytes of a file, or a directory, of which a tar is made while it is sent.
            config: `adapter_config.json` of a PEFT checkpoint whose `source` is one safetensors file.
            progress: Called while the form is sent.

        Raises:
            OSError: A file cannot be read.
            ValueError: The directory is no adapter, or the path is that of a pipe or a device.
        """
        self._name = name
        self._parts = _parts(source)
        self._config = config if config is None or isinstance(config, bytes) else Path(config).read_bytes()
        self._progress = progress

    @contextmanager
    def open(self) -> Iterator[dict[str, Any]]:
        """Open the files, and give the form as the arguments `data` and `files` of httpx."""
        reader = _PartsReader(self._parts, self._progress)
        with reader:
            files: dict[str, Any] = {"bundle": ("bundle", cast(IO[bytes], reader))}
            if self._config is not None:
                files["config"] = ("config", self._config)
            yield {"data": {"name": self._name}, "files": files}


def _parts(source: str | Path | bytes) -> list[bytes | _FilePart]:
    if isinstance(source, bytes):
        return [source]
    path = Path(source)
    if not path.is_dir():
        size = path.stat().st_size
        if not path.is_file():
            # A pipe or a device has no size that could be sent before its bytes.
            raise ValueError(f"{path} is no regular file; write the adapter to a file first, or send its bytes")
        return [_FilePart(path, size)]
    return _tar_of(path)


def _tar_of(folder: Path) -> list[bytes | _FilePart]:
    """A tar of the files that make an adapter, without a copy of them on disk."""
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{folder} has no {CONFIG_FILE}; name the directory of a bundle or of a PEFT checkpoint, or one file"
        )
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    if MODEL_FILE not in weights:
        raise ValueError(f"{folder} has no {MODEL_FILE}; save the adapter with safe_serialization=True")
    parts: list[bytes | _FilePart] = []
    for name in (CONFIG_FILE, *weights, *READ_BESIDE):
        path = folder / name
        if not path.is_file():
            continue
        # A link, as the hub's cache has them, is followed.
        size = path.stat().st_size
        header = tarfile.TarInfo(name)
        header.size = size
        parts += [header.tobuf(tarfile.USTAR_FORMAT), _FilePart(path, size), bytes(-size % _BLOCK)]
    return [*parts, bytes(2 * _BLOCK)]
