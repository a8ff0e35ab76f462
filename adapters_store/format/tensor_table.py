"""What the header of a safetensors file says of its tensors: their names, dtypes, shapes and places."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch

from adapters_store.errors import InvalidHeader, WrongDtype, WrongShape
from adapters_store.format.strict_json import canonical_json, parse_json

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_DIMENSION = 1 << 40
# Tables that are kept: some MB together, at most 50.
_KEPT = 16
KEPT_CHARACTERS = 1 << 18
"""A longer text of a table is not to be kept. 672 tensors take 70,000 characters."""


class TensorEntry(NamedTuple):
    """One tensor as the header announces it; `begin` and `end` count from the first byte after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorRun(NamedTuple):
    """Tensors of one dtype that lie one after another in order of name; `sizes` are the elements of each."""

    dtype: str
    begin: int
    sizes: list[int]

    @property
    def whole(self) -> TensorEntry:
        """All of them as one tensor (elements,)."""
        elements = sum(self.sizes)
        return TensorEntry(self.dtype, (elements,), self.begin, self.begin + elements * DTYPES[self.dtype].itemsize)


@dataclass(frozen=True)
class TensorTable:
    """The tensors of a file. Files of one size and kind of adapter share a table: it is not to be written to.

    Attributes:
        entries: Tensors by name; together they cover the bytes from 0 to `nbytes`.
        nbytes: Bytes of all tensors.
    """

    entries: Mapping[str, TensorEntry]
    nbytes: int

    @cached_property
    def names(self) -> list[str]:
        """The names, in order."""
        return sorted(self.entries)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {name: entry.shape for name, entry in self.entries.items()}

    @cached_property
    def runs(self) -> list[TensorRun]:
        """The tensors in order of name."""
        runs: list[TensorRun] = []
        last = None
        for name in self.names:
            dtype, shape, begin, end = self.entries[name]
            if (dtype, begin) != last:
                runs.append(TensorRun(dtype, begin, []))
            runs[-1].sizes.append(math.prod(shape))
            last = dtype, end
        return runs

    @cached_property
    def described(self) -> str:
        """Canonical JSON: a list of [name, dtype, shape], in order of name."""
        return describe_tensors([(name, self.entries[name].dtype, self.entries[name].shape) for name in self.names])


def describe_tensors(tensors: list[tuple[str, str, tuple[int, ...]]]) -> str:
    """Canonical JSON of (name, dtype, shape) of each tensor, in order of name."""
    return canonical_json([[name, dtype, list(shape)] for name, dtype, shape in tensors])


@lru_cache(_KEPT)
def kept_table(text: str) -> TensorTable:
    """`table_of` for a JSON object. Adapters of one kind have the same text: its table is used again.

    Raises:
        json.JSONDecodeError: It is not strict JSON.
        InvalidHeader, WrongDtype, WrongShape: As `table_of`.
    """
    return table_of(parse_json(text))


def table_of(fields: Mapping[str, Any]) -> TensorTable:
    """Check the fields of a header, `__metadata__` left out; `param` of an error is the tensor's name.

    Raises:
        InvalidHeader: A tensor lacks a field or has an unknown one, its place does not fit its shape, or the tensors
            leave a gap or overlap.
        WrongDtype, WrongShape: See FORMAT.md.
    """
    entries = {name: _entry(name, field) for name, field in fields.items()}
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin != position:
            raise InvalidHeader(f"tensor {name!r} leaves a gap in the data or overlaps another", param=name)
        position = entry.end
    return TensorTable(entries, position)


def _entry(name: str, field: Any) -> TensorEntry:
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
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise InvalidHeader(f"tensor {name!r}: data_offsets do not fit its shape and dtype", param=name)
    return TensorEntry(dtype, tuple(shape), begin, end)


def _are_sizes(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > 8:
        return False
    # bool is an int to Python, not to JSON.
    return not any(type(item) is not int or item < 0 or item > _MAX_DIMENSION for item in value)
