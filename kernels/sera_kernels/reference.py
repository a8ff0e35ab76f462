"""The reference of the grouped operation, close to its formula: one adapter at a time, dense blocks, float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sera_kernels.operands import ABSENT, AdapterBatch, AdapterTables


def grouped_sera_reference(
    x: Tensor,
    outputs: Sequence[Tensor],
    modules: Sequence[int],
    batch: AdapterBatch,
    pool: Tensor,
    tables: AdapterTables,
) -> None:
    """Compute the same as `grouped_sera`, slowly and plainly. Tests compare every fast path with this function."""
    d_in = x.shape[1]
    for y, module in zip(outputs, modules, strict=True):
        d_out = y.shape[1]
        for slot, tokens in batch.tokens_by_slot.items():
            (entry,) = tables.entries(module, [slot])
            if entry.offset == ABSENT:
                continue
            # Not the pool in float64: one of thousands of adapters would fill the memory.
            a, c, b = entry.factors(pool, d_in, d_out)
            blocks_a = torch.block_diag(*a.double().view(entry.split, -1, entry.segment_rank))
            blocks_b = torch.block_diag(*b.double().view(entry.segment_rank, entry.split, -1).transpose(0, 1))
            reduced = x[tokens].double() @ blocks_a
            mixed = reduced if c is None else reduced @ c.double()
            result = y[tokens].double() + entry.scaling * (mixed @ blocks_b)
            if (vectors := entry.gain_and_offset(pool, d_out)) is not None:
                gain, offset = vectors.double()
                result = gain * result + offset
            y[tokens] = result.to(y.dtype)
