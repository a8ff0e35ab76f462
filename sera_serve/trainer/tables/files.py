"""Training files as bytes and characters: suffix, compression, encoding, and what a wrong one needs."""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, TextIO

from sera_serve.trainer.tables.faults import InvalidData

FileKind = Literal["csv", "json", "parquet", "text"]

SUFFIXES: dict[str, FileKind] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
# What to do with a file of another program.
_REMEDIES = {
    ".xlsx": "save the sheet as CSV (UTF-8)",
    ".xls": "save the sheet as CSV (UTF-8)",
    ".ods": "save the sheet as CSV (UTF-8)",
    ".zip": "unpack the archive and name one file of it",
    ".tar": "unpack the archive and name one file of it",
    ".tgz": "unpack the archive and name one file of it",
    ".7z": "unpack the archive and name one file of it",
    ".arrow": "name the folder that datasets saved (save_to_disk) with this file",
    ".feather": "write it as Parquet",
    ".pkl": "write it as Parquet or CSV; a pickle can run any program when it is read",
}
# What the first bytes of a file tell, the kinds of files that may begin so, and the remedy for others.
_BEGINNINGS: tuple[tuple[bytes, tuple[FileKind, ...], str], ...] = (
    (b"PK\x03\x04", (), "is a zip archive or a spreadsheet; unpack it, or save the sheet as CSV (UTF-8)"),
    (b"\xd0\xcf\x11\xe0", (), "is a spreadsheet of an old format; save the sheet as CSV (UTF-8)"),
    (b"%PDF", (), "is a PDF document; write its text as .txt or CSV"),
    (b"SQLite format 3", (), "is an SQLite database; export a table as CSV"),
    (b"version https://git-lfs", (), "is the pointer of a file in Git LFS; fetch the file itself (git lfs pull)"),
    (b"ARROW1", (), "is an Arrow file; write it as Parquet, or name the folder that datasets saved"),
    (b"PAR1", ("parquet",), "is a Parquet file; rename it to end with .parquet"),
    (b"\x1f\x8b", (), "is compressed by gzip; rename it to end with .gz"),
    (b"BZh", (), "is compressed by bzip2; rename it to end with .bz2"),
    (b"\xfd7zXZ\x00", (), "is compressed by xz; rename it to end with .xz"),
    (b"\x28\xb5\x2f\xfd", (), "is compressed by zstd; rename it to end with .zst"),
    (b"<!doctype html", ("text",), "is a web page, not data; download the file itself (the raw link)"),
    (b"<html", ("text",), "is a web page, not data; download the file itself (the raw link)"),
)
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # Before UTF-16, whose mark begins the mark of UTF-32.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Encodings that take a byte order mark for a character, each with the mark that names it and its form that skips it.
_WITHOUT_MARK = {
    "utf-8": (codecs.BOM_UTF8, "utf-8-sig"),
    "utf-16-le": (codecs.BOM_UTF16_LE, "utf-16"),
    "utf-16-be": (codecs.BOM_UTF16_BE, "utf-16"),
    "utf-32-le": (codecs.BOM_UTF32_LE, "utf-32"),
    "utf-32-be": (codecs.BOM_UTF32_BE, "utf-32"),
}
_HEAD_BYTES = 4096
_BLOCK_BYTES = 1 << 20
_DECOMPRESSION_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class DataFile:
    """A file of training rows.

    Attributes:
        path: Path of the file.
        kind: What it holds, by its suffix.
        suffix: The suffix that tells the kind, in lower case.
        compression: The suffix of the compression, or "".
        encoding: The encoding of its characters: as given, by its byte order mark, or UTF-8.
        is_given: Whether the user named the encoding.
    """

    path: Path
    kind: FileKind
    suffix: str
    compression: str
    encoding: str
    is_given: bool

    @contextmanager
    def open_bytes(self) -> Iterator[IO[bytes]]:
        """Open the file for its decompressed bytes; raise `InvalidData` if they cannot be read."""
        with (
            _readable(self.path),
            self.path.open("rb") as raw,
            _decompressed(self.path, raw, self.compression) as stream,
        ):
            yield stream

    @contextmanager
    def open_text(self) -> Iterator[TextIO]:
        """Open the file for its characters, without a change of line ends.

        Raises:
            InvalidData: While the block runs: a byte is not of the encoding, or the file cannot be decompressed.
        """
        try:
            with self.open_bytes() as stream, io.TextIOWrapper(stream, self.encoding, newline="") as text:
                yield text
        except UnicodeError as error:
            raise self._wrong_encoding() from error

    def digest(self) -> str:
        """Compute the sha256 of the file's own bytes, hexadecimal."""
        with _readable(self.path), self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _wrong_encoding(self) -> InvalidData:
        """Find the first byte that is not of the encoding, and say what may help."""
        decoder = codecs.getincrementaldecoder(self.encoding)()
        line = 1
        with self.open_bytes() as stream:
            while True:
                block = stream.read(_BLOCK_BYTES)
                try:
                    line += decoder.decode(block, final=not block).count("\n")
                except UnicodeDecodeError as error:
                    line += error.object[: error.start].decode(self.encoding, "ignore").count("\n")
                    byte = error.object[error.start]
                    return InvalidData(
                        f"{self.path}, line {line}: byte 0x{byte:02x} is not {self.encoding_name}; {self._remedy()}",
                        param="encoding",
                    )
                except UnicodeError as error:
                    return InvalidData(
                        f"{self.path} is not {self.encoding_name} ({error}); {self._remedy()}", param="encoding"
                    )
                if not block:
                    return InvalidData(f"{self.path} is not {self.encoding_name}; {self._remedy()}", param="encoding")

    @property
    def encoding_name(self) -> str:
        """The encoding as people write it."""
        return "UTF-8" if self.encoding in ("utf-8", "utf-8-sig") else self.encoding

    def _remedy(self) -> str:
        if self.is_given:
            return "name the encoding that the file has with --encoding"
        convert = f"(iconv -f latin1 -t utf-8 {self.path.name} > fixed{self.suffix})"
        return f"save the file as UTF-8 {convert}, or name its encoding, such as --encoding latin1"


def find_file(path: Path, encoding: str | None = None) -> DataFile:
    """Say what a file is, by its suffix and its first bytes.

    Args:
        path: Path of the file.
        encoding: The encoding of its characters; None takes that of its byte order mark, or UTF-8. The mark of this
            encoding itself is no character of the file.

    Raises:
        InvalidData: The file cannot be read, has an unknown suffix, or begins as another kind of file.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSED else ""
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in SUFFIXES:
        inner = f"{path}: the suffix {suffix!r}" + (f" before {compression}" if compression else "")
        remedy = _REMEDIES.get(suffix, "convert or rename the file")
        raise InvalidData(f"{inner} is not one of {', '.join(SUFFIXES)}; {remedy}")
    kind = SUFFIXES[suffix]
    found = DataFile(path, kind, suffix, compression, encoding or "utf-8", encoding is not None)
    with found.open_bytes() as stream:
        head = stream.read(_HEAD_BYTES)
    _check_beginning(path, kind, head)
    if kind == "parquet":
        return found
    if encoding is None:
        marked = next((name for mark, name in _BYTE_ORDER_MARKS if head.startswith(mark)), None)
        if marked is None and b"\x00" in head:
            guess = "utf-16-le" if head[1::2].count(0) > head[::2].count(0) else "utf-16-be"
            raise InvalidData(
                f"{path} has zero bytes, so it is not UTF-8 text; if a spreadsheet wrote it, give --encoding {guess}",
                param="encoding",
            )
        return replace(found, encoding=marked or "utf-8")
    mark, skipping = _WITHOUT_MARK.get(codecs.lookup(encoding).name, (b"", ""))
    if mark and head.startswith(mark):
        return replace(found, encoding=skipping)
    return found


def _check_beginning(path: Path, kind: FileKind, head: bytes) -> None:
    start = head.lstrip().lower()
    for beginning, kinds, remedy in _BEGINNINGS:
        if kind not in kinds and (head.startswith(beginning) or start.startswith(beginning.lower())):
            raise InvalidData(f"{path} {remedy}")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except _DECOMPRESSION_ERRORS as error:
        raise _not_decompressed(path, error) from error
    except OSError as error:
        # bz2 says so of a file that is not its own.
        reason = error.strerror or str(error)
        raise InvalidData(f"{path} cannot be read: {reason}; check the path") from error


def _not_decompressed(path: Path, error: Exception) -> InvalidData:
    reason = str(error) or type(error).__name__
    return InvalidData(f"{path} cannot be decompressed ({reason}); it may be cut off: copy or compress it again")


@contextmanager
def _zstd(path: Path, raw: BinaryIO) -> Iterator[IO[bytes]]:
    try:
        import zstandard
    except ImportError as error:
        raise InvalidData(
            f"{path} needs the package zstandard; install it (pip install zstandard), or decompress the file (zstd -d)"
        ) from error
    try:
        # The package reads a file that is cut off up to the cut, without a word.
        frame = zstandard.ZstdDecompressor().decompressobj()
        while block := raw.read(_BLOCK_BYTES):
            while block:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
        if not frame.eof:
            raise EOFError("the last frame has no end")
        raw.seek(0)
        with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False) as stream:
            yield stream
    except zstandard.ZstdError as error:
        raise _not_decompressed(path, error) from error


def _decompressed(path: Path, raw: BinaryIO, compression: str) -> Any:
    if compression == ".gz":
        return gzip.open(raw)
    if compression == ".bz2":
        return bz2.open(raw)
    if compression == ".xz":
        return lzma.open(raw)
    if compression == ".zst":
        return _zstd(path, raw)
    return raw
