"""Operands of the grouped operation: the tables of resident adapters, and the slot of each token of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sera_kernels.shape_classes import ShapeClasses

NO_ADAPTER = -1
"""The slot of a token that uses no adapter."""

ABSENT = -1
"""The offset of a module that a slot's adapter does not adapt."""

LONG_RUN = 32
"""With at least this many tokens of one adapter, a matrix product is faster than a loop over the tokens."""


@dataclass(frozen=True)
class AdapterTables:
    """Offset and shape of the factors of every resident adapter, by (module, slot).

    The factors of a module are contiguous in the pool: A (d_in, segment_rank), then C (rank, rank) if there is a mixer,
    then B (segment_rank, d_out). Each factor is row-major and not padded. The vectors of a module are contiguous too,
    at a place of their own: the gain (d_out,), then the offset (d_out,). A module has both or neither.

    Attributes:
        offset: int64 (modules, slots), the first element in the pool, or `ABSENT`.
        rank: int32 (modules, slots).
        split: int32 (modules, slots).
        mixer: int32 (modules, slots), 1 if C exists, else 0.
        scaling: float32 (modules, slots).
        vectors: int64 (modules, slots), the first element of the module's vectors in the pool, or `ABSENT`. The other
            tables' values, and these, have no meaning where `offset` is `ABSENT`.

    `classes` is the host's summary. Set it with `set_classes` after each change of the tables on the device. If it was
    never set, its first use reads the device.
    """

    offset: Tensor
    rank: Tensor
    split: Tensor
    mixer: Tensor
    scaling: Tensor
    vectors: Tensor

    @cached_property
    def classes(self) -> ShapeClasses:
        """The kinds of shapes that may occur. Without `set_classes`, the first call waits for the device.

        Raises:
            ValueError: A rank is above `MOST_RANK`.
        """
        present = self.offset != ABSENT
        shapes = zip(self.rank[present].tolist(), self.split[present].tolist(), strict=True)
        return ShapeClasses.of(shapes, bool((self.vectors[present] != ABSENT).any()))

    def set_classes(self, classes: ShapeClasses) -> None:
        """Set the kinds of shapes that may occur from now on. Kinds of slots that are in use must be among them."""
        # Where `cached_property` keeps its value. One assignment: a running step sees the old value or the new one.
        self.__dict__["classes"] = classes

    @classmethod
    def empty(cls, modules: int, slots: int, device: torch.device | str = "cpu") -> AdapterTables:
        """Make tables in which no slot adapts a module."""
        shape = (modules, slots)
        return cls(
            offset=torch.full(shape, ABSENT, dtype=torch.int64, device=device),
            rank=torch.zeros(shape, dtype=torch.int32, device=device),
            split=torch.ones(shape, dtype=torch.int32, device=device),
            mixer=torch.zeros(shape, dtype=torch.int32, device=device),
            scaling=torch.zeros(shape, dtype=torch.float32, device=device),
            vectors=torch.full(shape, ABSENT, dtype=torch.int64, device=device),
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tables in the order of the attributes."""
        return (self.offset, self.rank, self.split, self.mixer, self.scaling, self.vectors)

    @cached_property
    def host_arrays(self) -> tuple[NDArray[Any], ...]:
        """`tensors` as arrays that share their memory. CPU only."""
        return tuple(table.numpy() for table in self.tensors)

    @cached_property
    def host_addresses(self) -> tuple[int, ...]:
        """The addresses of the tables of factors in the order of the attributes, then the number of slots. CPU only."""
        tables = (self.offset, self.rank, self.split, self.mixer, self.scaling)
        return (*(table.data_ptr() for table in tables), self.offset.shape[1])

    def clear(self, slot: int) -> None:
        """Remove the adapter of `slot`: the slot then adapts no module."""
        self.offset[:, slot] = ABSENT

    def entries(self, module: int, slots: list[int]) -> Iterator[Entry]:
        """Yield the cells of `module` for `slots`. Waits for the device if the tables are on one."""
        index = torch.tensor(slots, dtype=torch.int64, device=self.offset.device)
        columns = [table[module, index].tolist() for table in self.tensors]
        for offset, rank, split, mixer, scaling, vectors in zip(*columns, strict=True):
            yield Entry(offset, rank, split, bool(mixer), scaling, vectors)


@dataclass(frozen=True)
class Entry:
    """One cell of `AdapterTables`, as Python numbers."""

    offset: int
    rank: int
    split: int
    mixer: bool
    scaling: float
    vectors: int = ABSENT

    @property
    def segment_rank(self) -> int:
        """Rank of one segment, rank / split."""
        return self.rank // self.split

    def elements(self, d_in: int, d_out: int) -> int:
        """Return the number of elements of the module's factors in the pool."""
        return (d_in + d_out) * self.segment_rank + (self.rank**2 if self.mixer else 0)

    def factors(self, pool: Tensor, d_in: int, d_out: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return views of A (d_in, segment_rank), C (rank, rank) or None, and B (segment_rank, d_out) in the pool."""
        sizes = [d_in * self.segment_rank, self.rank**2 if self.mixer else 0, self.segment_rank * d_out]
        a, c, b = pool[self.offset : self.offset + sum(sizes)].split(sizes)
        mixer = c.view(self.rank, self.rank) if self.mixer else None
        return a.view(d_in, self.segment_rank), mixer, b.view(self.segment_rank, d_out)

    def gain_and_offset(self, pool: Tensor, d_out: int) -> Tensor | None:
        """Return a view (2, d_out) of the gain and the offset in the pool, or None."""
        if ABSENT in (self.offset, self.vectors):
            return None
        return pool[self.vectors : self.vectors + 2 * d_out].view(2, d_out)


@dataclass(frozen=True)
class AdapterBatch:
    """The adapter slot of each token of one forward pass. Made once for each step, and shared by all layers.

    Attributes:
        token_slots: int32 (tokens,), contiguous. Each is a slot or `NO_ADAPTER`.
        classes: The kinds of shapes that the adapters of these slots may have. None: those of all resident adapters.

    Raises:
        ValueError: `token_slots` has another dtype, shape or layout. Compiled code reads its memory directly.
    """

    token_slots: Tensor
    classes: ShapeClasses | None = None

    def classes_in(self, tables: AdapterTables) -> ShapeClasses:
        """The kinds of shapes that may occur, with these tables."""
        return tables.classes if self.classes is None else self.classes

    def __post_init__(self) -> None:
        slots = self.token_slots
        if slots.dtype != torch.int32 or slots.dim() != 1 or not slots.is_contiguous():
            raise ValueError(f"token_slots must be int32, contiguous (tokens,), not {slots.dtype} {tuple(slots.shape)}")

    @cached_property
    def host_slots(self) -> NDArray[Any]:
        """`token_slots` as an array. CPU only."""
        return self.token_slots.numpy()

    @cached_property
    def long_runs(self) -> list[int]:
        """Slots with at least `LONG_RUN` tokens, as in a prefill. CPU only."""
        if len(self.host_slots) < LONG_RUN:
            return []
        slots, counts = np.unique(self.host_slots, return_counts=True)
        return [int(slot) for slot in slots[counts >= LONG_RUN] if slot != NO_ADAPTER]

    @cached_property
    def in_long_run(self) -> NDArray[Any]:
        """For each token, whether its slot is in `long_runs`. CPU only."""
        return np.isin(self.host_slots, self.long_runs) if self.long_runs else np.zeros(len(self.host_slots), bool)

    @cached_property
    def host_addresses(self) -> tuple[int, int]:
        """The addresses of `token_slots` and `in_long_run`. CPU only."""
        return self.token_slots.data_ptr(), self.in_long_run.ctypes.data

    @cached_property
    def sorted_slots(self) -> tuple[Tensor, Tensor]:
        """`token_slots` in ascending order, and the tokens in the same order (int64). On the device of the tokens."""
        slots, order = torch.sort(self.token_slots, stable=True)
        return slots, order

    @cached_property
    def copied_cells(self) -> dict[int, tuple[AdapterTables, Any]]:
        """What `sera_kernels.cells` keeps for the step, by the tables' id."""
        return {}

    @cached_property
    def _tiles(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {}

    def tiles(self, block: int) -> tuple[Tensor, Tensor]:
        """Cut the sorted tokens into tiles. A tile has at most `block` tokens, and all have the same slot.

        Tokens without an adapter are in no tile. Shapes follow from the number of tokens alone, and the host reads no
        values. A CUDA graph can therefore hold this computation, and a replay repeats it. The result is computed once a
        step for each `block`.

        Returns:
            int64 (tokens,), for each tile the position of its first token in the sorted order. Values after the last
                tile have no meaning.
            int64 (tokens,), for each position the number of tiles that start up to and including this position. The
                last value is the number of tiles.
        """
        if block not in self._tiles:
            slots, _ = self.sorted_slots
            place = torch.arange(len(slots), device=slots.device)
            begins_run = torch.ones_like(slots, dtype=torch.bool)
            begins_run[1:] = slots[1:] != slots[:-1]
            run_start = torch.where(begins_run, place, 0).cummax(0).values
            begins_tile = ((place - run_start) % block == 0) & (slots != NO_ADAPTER)
            ordinal = begins_tile.cumsum(0)
            self._tiles[block] = torch.searchsorted(ordinal, place + 1), ordinal
        return self._tiles[block]

    @cached_property
    def tokens_by_slot(self) -> dict[int, Tensor]:
        """int64 positions of each slot's tokens, on the tokens' device, without `NO_ADAPTER`. Made on the host."""
        slots, inverse = torch.unique(self.token_slots, return_inverse=True)
        order = torch.argsort(inverse, stable=True)
        counts = torch.bincount(inverse, minlength=len(slots)).tolist()
        return {
            slot: positions
            for slot, positions in zip(slots.tolist(), order.split(counts), strict=True)
            if slot != NO_ADAPTER
        }
