"""The cells of the tables that a step's tokens use, copied side by side once a step, on a GPU.

A token's slot, and then the cell of that slot, would be two loads after one another at the start of every launch of a
step, and weights have driven both out of the caches by the next layer.

Triton 3.6 or newer is required. Without a GPU, the kernel runs if TRITON_INTERPRET=1 was set before this module is
imported.
"""

# Triton's own language: its values have no Python type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sera_kernels.operands import AdapterBatch, AdapterTables

# Tokens of a program.
_TOKENS = 64


class Cells(NamedTuple):
    """What `AdapterTables` hold about each token's own slot, by (module, token), in the same dtypes.

    A token without an adapter has an offset of `ABSENT`; its other values, and where the offset is `ABSENT`, have no
    meaning.
    """

    offset: Tensor
    rank: Tensor
    split: Tensor
    mixer: Tensor
    scaling: Tensor


def cells_of(batch: AdapterBatch, tables: AdapterTables) -> Cells:
    """The cells of a batch, copied by its first call, on the current stream. Later calls of the step give the same.

    A CUDA graph can hold the copy, and a replay repeats it: shapes follow from those of the batch and the tables.
    """
    made = batch.copied_cells.get(id(tables))
    if made is None:
        modules, slots = tables.offset.shape
        tokens = len(batch.token_slots)
        sources = (tables.offset, tables.rank, tables.split, tables.mixer, tables.scaling)
        cells = Cells(*(source.new_empty(modules, tokens) for source in sources))
        with torch.cuda.device_of(tables.offset):
            copy_cells[(triton.cdiv(tokens, _TOKENS), modules)](
                batch.token_slots, *sources, *cells, slots, tokens, TOKENS=_TOKENS, num_warps=2, enable_fp_fusion=True
            )
        # The tables too: while they exist, no others have their id.
        made = batch.copied_cells[id(tables)] = (tables, cells)
    return made[1]


@triton.jit(do_not_specialize=["slot_count", "tokens"], do_not_specialize_on_alignment=["slots"])
def copy_cells(
    slots, offset, rank, split, mixer, scaling, own_offset, own_rank, own_split, own_mixer, own_scaling,
    slot_count, tokens, TOKENS: tl.constexpr,
):  # fmt: skip
    """Copy cells of the tables (modules, slot_count) to (modules, tokens). A program is (TOKENS tokens, module)."""
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = row < tokens
    slot = tl.load(slots + row, mask=inside, other=-1)
    source = tl.program_id(1) * slot_count + slot
    to = tl.program_id(1) * tokens + row
    there = slot >= 0
    tl.store(own_offset + to, tl.load(offset + source, mask=there, other=-1), mask=inside)
    # A rank and a split that kernels may divide by.
    tl.store(own_rank + to, tl.load(rank + source, mask=there, other=1), mask=inside)
    tl.store(own_split + to, tl.load(split + source, mask=there, other=1), mask=inside)
    tl.store(own_mixer + to, tl.load(mixer + source, mask=there, other=0), mask=inside)
    tl.store(own_scaling + to, tl.load(scaling + source, mask=there, other=0), mask=inside)
