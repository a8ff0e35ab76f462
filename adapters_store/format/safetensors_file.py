"""Reader for untrusted safetensors files: each claim of the header is checked before anything is allocated.

Format: https://github.com/huggingface/safetensors#format. The checks are stricter than the library's: three
dtypes, no empty tensors, a small header.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from adapters_store.errors import (
    BundleTooLarge,
    HeaderTooLarge,
    InvalidBundle,
    InvalidHeader,
    NotSafetensors,
    Truncated,
)
from adapters_store.format.strict_json import parse_json_object
from adapters_store.format.tensor_table import KEPT_CHARACTERS, TensorEntry, TensorTable, kept_table, table_of

MODEL_FILE = "adapter_model.safetensors"
# numpy has no bfloat16.
_NUMPY_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.int16}
_LENGTH_BYTES = 8
# No writer makes a header of 64 GiB. Eight bytes that claim more begin another kind of file.
_ABSURD_HEADER = 1 << 36
# How files begin that gzip, bzip2, xz, zstd, 7-Zip and RAR write.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07")
_NO_PICKLE = "save the weights with safetensors (pickled checkpoints are never read)"
# A header with metadata as the safetensors library writes it, up to the first tensor. Nothing is tried twice.
_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_METADATA_FIRST = re.compile(rf'{{"__metadata__":{{(?:{_STRING}:{_STRING},?)*+}},')


@dataclass(frozen=True)
class BundleLimits:
    """What a reader accepts, in bytes.

    Attributes:
        max_bytes: A whole bundle, in whichever container.
        max_header_bytes: The JSON header of a safetensors file.
        max_config_bytes: The adapter configuration.
    """

    max_bytes: int = 1 << 30
    max_header_bytes: int = 4 << 20
    max_config_bytes: int = 1 << 20


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        metadata: Strings by key.
        table: The tensors; together they cover the file from `start` to its last byte.
        start: Bytes before the first tensor.
    """

    metadata: dict[str, str]
    table: TensorTable
    start: int

    def tensor_bytes(self, data: memoryview) -> memoryview:
        """The part of the file that the table's places count in."""
        return data[self.start :]


def looks_like_safetensors(prefix: bytes) -> bool:
    """Whether the first nine bytes can begin a safetensors file."""
    return len(prefix) >= 9 and int.from_bytes(prefix[:8], "little") < _ABSURD_HEADER and prefix[8:9] == b"{"


def header_length(prefix: bytes, file_bytes: int, limits: BundleLimits) -> int:
    """The length of the JSON header, from the first bytes (16 or more, if the file has them).

    Raises:
        NotSafetensors: The bytes begin another kind of file.
        HeaderTooLarge, BundleTooLarge, Truncated: See FORMAT.md.
    """
    if kind := _other_kind(prefix):
        raise NotSafetensors(f"this is {kind[0]}, not a safetensors file; {kind[1]}", param=MODEL_FILE)
    if file_bytes > limits.max_bytes:
        raise BundleTooLarge(
            f"the bundle has {file_bytes} bytes; the limit is {limits.max_bytes}; lower the rank",
            param=MODEL_FILE,
        )
    if len(prefix) < _LENGTH_BYTES:
        raise Truncated(f"the file has {file_bytes} bytes; upload it again, whole", param=MODEL_FILE)
    # As an empty tar, and a copy that broke off on a disk where its room was taken before.
    if not any(prefix):
        raise NotSafetensors(
            "this is a file that begins with zeros, not a safetensors file; make it again, and look whether it has its "
            "content",
            param=MODEL_FILE,
        )
    length = int.from_bytes(prefix[:_LENGTH_BYTES], "little")
    if length > _ABSURD_HEADER or length < 2 or prefix[_LENGTH_BYTES : _LENGTH_BYTES + 1] not in (b"{", b""):
        raise NotSafetensors("this is not a safetensors file; send the file that the trainer wrote", param=MODEL_FILE)
    if length > limits.max_header_bytes:
        raise HeaderTooLarge(
            f"the header claims {length} bytes; the limit is {limits.max_header_bytes}", param=MODEL_FILE
        )
    if _LENGTH_BYTES + length > file_bytes:
        raise Truncated(
            f"the header claims {length} bytes, the file has {file_bytes}; upload it again, whole",
            param=MODEL_FILE,
        )
    return length


def parse_header(data: memoryview, file_bytes: int, limits: BundleLimits, *, kept_tables: bool = False) -> Header:
    """Check the header at the beginning of `data` against a file of `file_bytes` bytes.

    Args:
        data: At least the length field and the header; the tensors may be absent.
        file_bytes: Size of the whole file.
        limits: Caps.
        kept_tables: Keep the table for files of the same kind, and use a kept one. It is for files of a store. What is
            uploaded must neither fill the memory nor tell a tenant, by its time, what others have uploaded.

    Raises:
        InvalidBundle: One of the subclasses that FORMAT.md lists.
    """
    length = header_length(bytes(data[:16]), file_bytes, limits)
    start = _LENGTH_BYTES + length
    metadata, table = _parse_fields(bytes(data[_LENGTH_BYTES:start]), kept_tables)
    end = start + table.nbytes
    if end > file_bytes:
        raise Truncated(
            f"the file has {file_bytes} bytes, its header announces {end}; upload it again, whole", param=MODEL_FILE
        )
    if end < file_bytes:
        raise InvalidHeader(
            f"{file_bytes - end} bytes follow the last tensor; nothing would read them", param=MODEL_FILE
        )
    return Header(metadata, table, start)


def read_header(path: str, limits: BundleLimits) -> Header:
    """The checked header of a file on disk, without reading its tensors; raises as `parse_header` does."""
    with open(path, "rb") as file:

        def begin(nbytes: int) -> bytes:
            file.seek(0)
            return file.read(nbytes)

        return header_of(begin, os.fstat(file.fileno()).st_size, limits)


def header_of(begin: Callable[[int], bytes], file_bytes: int, limits: BundleLimits) -> Header:
    """The checked header of a file that is not read further; raises as `parse_header` does.

    Args:
        begin: Gives the first so many bytes of the file, or all of a shorter one.
        file_bytes: Size of the whole file.
        limits: Caps.
    """
    length = header_length(begin(16), file_bytes, limits)
    return parse_header(memoryview(begin(_LENGTH_BYTES + length)), file_bytes, limits)


@contextmanager
def _system_errors(path: Path | str) -> Iterator[None]:
    """Turn safetensors' error of a write to `path` into the system's `OSError`.

    Its text is all that safetensors has of the system's error, with paths of unfinished files.
    """
    try:
        yield
    except SafetensorError as error:
        number = str(error).rpartition("(os error ")[2].partition(")")[0]
        code = int(number) if number.isdecimal() and len(number) < 6 else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error


def save_tensors(tensors: dict[str, Tensor], path: Path | str, metadata: dict[str, str]) -> None:
    """Write a safetensors file, with the permissions of any new file: those that the process's umask leaves.

    safetensors itself, from 0.8 on, leaves them to the owner alone. Another account, such as that of a vLLM that shall
    serve an export, could then read the configuration beside the tensors, and not the tensors.

    Raises:
        OSError: The file cannot be written.
    """
    # The umask cannot be read without a change of it, which other threads would notice: a file tells it.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    with _system_errors(path):
        safetensors.torch.save_file(tensors, path, metadata=metadata)
    os.chmod(path, mode)


def read_tensor(data: memoryview, entry: TensorEntry) -> Tensor:
    """One tensor, or a run of tensors, on the CPU; an aligned one shares the writable memory of `data`.

    Args:
        data: `Header.tensor_bytes` of the file.
        entry: One of the header's table.
    """
    # Through numpy: torch gives up the interpreter's lock for every view, and in a busy server waits to get it back.
    array = np.frombuffer(data, _NUMPY_TYPES[entry.dtype], math.prod(entry.shape), entry.begin).reshape(entry.shape)
    tensor = torch.from_numpy(array if array.flags.aligned else array.copy())
    return tensor.view(torch.bfloat16) if entry.dtype == "BF16" else tensor


def _other_kind(prefix: bytes) -> tuple[str, str] | None:
    """What else the file is, and the remedy."""
    if looks_like_safetensors(prefix):
        return None
    if prefix[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "a zip archive (as torch.save writes)", _NO_PICKLE
    # Protocol 2 and later: 0x80, the protocol, then an opcode, which a length below 2^16 has no room for.
    if prefix[:1] == b"\x80" and len(prefix) > 2 and prefix[1] in range(2, 6) and prefix[2] != 0:
        return "a pickle", _NO_PICKLE
    if prefix.startswith(_COMPRESSED):
        return "compressed", "unpack it, and send the .safetensors, or a .tar that is not compressed"
    return None


def _parse_fields(raw: bytes, kept_tables: bool) -> tuple[dict[str, str], TensorTable]:
    """The metadata and the tensors of a header."""
    text, table = (_split(raw) if kept_tables else None) or (raw, None)
    fields = parse_json_object(text, "the header", InvalidHeader, MODEL_FILE)
    metadata = _checked_metadata(fields.pop("__metadata__", {}))
    return metadata, table_of(fields) if table is None else table


def _split(raw: bytes) -> tuple[str, TensorTable] | None:
    """A header without its tensors, and their table; None where the tensors have a fault, or the form is another.

    In a store most headers differ in their metadata alone.
    """
    with suppress(UnicodeDecodeError, json.JSONDecodeError, InvalidBundle):
        text = raw.decode()
        found = _METADATA_FIRST.match(text)
        if found is not None and len(text) - found.end() < KEPT_CHARACTERS:
            # The library pads a header with spaces to a multiple of 8 bytes.
            table = kept_table("{" + text[found.end() :].rstrip(" "))
            # The comma before the tensors needs one behind it.
            if table.entries and "__metadata__" not in table.entries:
                return text[: found.end() - 1] + "}", table
    return None


def _checked_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidHeader("__metadata__ must map strings to strings", param="__metadata__")
    return metadata
