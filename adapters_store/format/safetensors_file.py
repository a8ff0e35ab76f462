"""Reader for untrusted safetensors files: each claim of the header is checked before anything is allocated.

Format: https://github.com/huggingface/safetensors#format. The checks are stricter than the library's: three
dtypes, no empty tensors, a small header.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapters_store.errors import (
    BundleTooLarge,
    HeaderTooLarge,
    InvalidHeader,
    NotSafetensors,
    Truncated,
    WrongDtype,
    WrongShape,
)
from adapters_store.format.strict_json import parse_json

FILE_PARAM = "adapter_model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# numpy has no bfloat16.
_NUMPY_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.int16}
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_LENGTH_BYTES = 8
_FIELDS = {"dtype", "shape", "data_offsets"}
# No writer makes a header of 64 GiB. Eight bytes that claim more begin another kind of file.
_ABSURD_HEADER = 1 << 36
_MAX_DIMENSION = 1 << 40


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


class TensorEntry(NamedTuple):
    """One tensor as the header announces it; `begin` and `end` count from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        metadata: Strings by key.
        entries: Tensors by name; together they cover the file to its last byte.
    """

    metadata: dict[str, str]
    entries: dict[str, TensorEntry]

    def runs(self, names: Iterable[str]) -> list[TensorEntry]:
        """The tensors of these names, in this order; neighbours of one dtype are joined to one entry (elements,)."""
        runs: list[TensorEntry] = []
        for name in names:
            entry = self.entries[name]
            begin = entry.begin
            if runs and (runs[-1].dtype, runs[-1].end) == (entry.dtype, begin):
                begin = runs.pop().begin
            runs.append(TensorEntry(entry.dtype, ((entry.end - begin) // _ITEM_BYTES[entry.dtype],), begin, entry.end))
        return runs


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
        raise NotSafetensors(
            f"this is {kind}, not a safetensors file; save the weights with safetensors "
            "(pickled checkpoints are never read)",
            param=FILE_PARAM,
        )
    if file_bytes > limits.max_bytes:
        raise BundleTooLarge(
            f"the bundle has {file_bytes} bytes; the limit is {limits.max_bytes}; lower the rank",
            param=FILE_PARAM,
        )
    if len(prefix) < _LENGTH_BYTES:
        raise Truncated(f"the file has {file_bytes} bytes; upload it again, whole", param=FILE_PARAM)
    length = int.from_bytes(prefix[:_LENGTH_BYTES], "little")
    if length > _ABSURD_HEADER or length < 2 or prefix[_LENGTH_BYTES : _LENGTH_BYTES + 1] not in (b"{", b""):
        raise NotSafetensors("this is not a safetensors file; send the file that the trainer wrote", param=FILE_PARAM)
    if length > limits.max_header_bytes:
        raise HeaderTooLarge(
            f"the header claims {length} bytes; the limit is {limits.max_header_bytes}", param=FILE_PARAM
        )
    if _LENGTH_BYTES + length > file_bytes:
        raise Truncated(
            f"the header claims {length} bytes, the file has {file_bytes}; upload it again, whole",
            param=FILE_PARAM,
        )
    return length


def parse_header(data: memoryview, file_bytes: int, limits: BundleLimits) -> Header:
    """Check the header at the beginning of `data` against a file of `file_bytes` bytes.

    Args:
        data: At least the length field and the header; the tensors may be absent.
        file_bytes: Size of the whole file.
        limits: Caps.

    Raises:
        InvalidBundle: One of the subclasses that FORMAT.md lists.
    """
    length = header_length(bytes(data[:16]), file_bytes, limits)
    start = _LENGTH_BYTES + length
    fields = _parse_json(bytes(data[_LENGTH_BYTES:start]))
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidHeader("__metadata__ must map strings to strings", param="__metadata__")
    entries = {name: _entry(name, field, start) for name, field in fields.items()}
    _check_tiling(entries, start, file_bytes)
    return Header(metadata, entries)


def read_header(path: str, limits: BundleLimits) -> Header:
    """The checked header of a file on disk, without reading its tensors; raises as `parse_header` does."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(16)
        length = header_length(prefix, size, limits)
        data = prefix + file.read(max(0, _LENGTH_BYTES + length - len(prefix)))
    return parse_header(memoryview(data), size, limits)


def read_tensors(data: memoryview, header: Header) -> dict[str, Tensor]:
    """The tensors of a file in writable memory, on the CPU; aligned tensors share that memory."""
    return {name: read_tensor(data, entry) for name, entry in header.entries.items()}


def read_tensor(data: memoryview, entry: TensorEntry) -> Tensor:
    """One tensor, or a run of tensors; shares aligned memory, and copies the rest."""
    # Through numpy: torch gives up the interpreter's lock for every view, and in a busy server waits to get it back.
    array = np.frombuffer(data, _NUMPY_TYPES[entry.dtype], math.prod(entry.shape), entry.begin).reshape(entry.shape)
    tensor = torch.from_numpy(array if array.flags.aligned else array.copy())
    return tensor.view(torch.bfloat16) if entry.dtype == "BF16" else tensor


def _other_kind(prefix: bytes) -> str | None:
    if looks_like_safetensors(prefix):
        return None
    if prefix[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "a zip archive (as torch.save writes)"
    # Protocol 2 and later: 0x80, the protocol, then an opcode, which a length below 2^16 has no room for.
    if prefix[:1] == b"\x80" and len(prefix) > 2 and prefix[1] in range(2, 6) and prefix[2] != 0:
        return "a pickle"
    if prefix[:2] == b"\x1f\x8b" or prefix[:3] == b"BZh" or prefix[:6] == b"\xfd7zXZ\x00":
        return "a compressed archive"
    return None


def _parse_json(raw: bytes) -> dict[str, Any]:
    try:
        value = parse_json(raw)
    except json.JSONDecodeError as error:
        raise InvalidHeader(f"the header is not valid JSON: {error}", param=FILE_PARAM) from error
    if not isinstance(value, dict):
        raise InvalidHeader("the header must be a JSON object", param=FILE_PARAM)
    return value


def _entry(name: str, field: Any, start: int) -> TensorEntry:
    if not isinstance(field, dict) or field.keys() != _FIELDS:
        raise InvalidHeader(f"tensor {name!r} needs exactly dtype, shape and data_offsets", param=name)
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise WrongDtype(f"tensor {name!r} has dtype {dtype!r}; use F32, F16 or BF16", param=name)
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise InvalidHeader(f"tensor {name!r}: shape and data_offsets must be lists of sizes", param=name)
    if 0 in shape:
        raise WrongShape(f"tensor {name!r} has shape {tuple(shape)}: it holds no element", param=name)
    begin, end = offsets
    if end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise InvalidHeader(f"tensor {name!r}: data_offsets do not fit its shape and dtype", param=name)
    return TensorEntry(dtype, tuple(shape), start + begin, start + end)


def _are_sizes(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > 8:
        return False
    # bool is an int to Python, not to JSON.
    return not any(type(item) is not int or item < 0 or item > _MAX_DIMENSION for item in value)


def _check_tiling(entries: dict[str, TensorEntry], start: int, file_bytes: int) -> None:
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin != position:
            raise InvalidHeader(f"tensor {name!r} leaves a gap in the data or overlaps another", param=name)
        position = entry.end
    if position > file_bytes:
        raise Truncated(
            f"the file has {file_bytes} bytes, its header announces {position}; upload it again, whole",
            param=FILE_PARAM,
        )
    if position < file_bytes:
        raise InvalidHeader(
            f"{file_bytes - position} bytes follow the last tensor; nothing would read them", param=FILE_PARAM
        )
