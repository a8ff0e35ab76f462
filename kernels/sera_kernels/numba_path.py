"""The grouped operation on a CPU, compiled by numba: each token reads its adapters in place, in their true size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import carray, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from sera_kernels.operands import ABSENT, AdapterBatch, AdapterTables
from sera_kernels.torch_path import update_run

# Multiply-adds below which one thread is done before a second one has started.
PARALLEL_FROM = 30_000
# In a long run of one adapter's tokens, blocks of this rank and more are a matrix product that torch does better.
MATMUL_FROM = 4


def grouped_sera_numba(
    x: Tensor,
    outputs: Sequence[Tensor],
    modules: Sequence[int],
    batch: AdapterBatch,
    pool: Tensor,
    tables: AdapterTables,
) -> None:
    """`grouped_sera` for float32 on a CPU."""
    widths = [y.shape[1] for y in outputs]
    # Only an estimate of the work: the ranks are not known here.
    work = len(x) * (x.shape[1] * len(outputs) + sum(widths)) * 2
    update = _update_parallel if work > PARALLEL_FROM else _update
    # Addresses, because numba would compile the loop anew for each number of outputs, and unpack them slowly.
    update(
        x.numpy(),
        np.array([y.data_ptr() for y in outputs]),
        np.array(widths),
        np.array(modules),
        batch.host_slots,
        batch.in_long_run,
        pool.numpy(),
        *tables.host_columns,
    )
    for slot in batch.long_runs:
        for y, module in zip(outputs, modules, strict=True):
            (entry,) = tables.entries(module, [slot])
            if entry.offset != ABSENT and entry.segment_rank >= MATMUL_FROM:
                update_run(x, y, batch.tokens_by_slot[slot], entry, pool)


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    """An address as a pointer that `carray` takes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


_options = {"nogil": True, "fastmath": {"contract", "reassoc", "nsz", "arcp"}, "error_model": "numpy", "cache": True}


@njit(**_options)
def _token(x: Any, y: Any, in_run: bool, pool: Any, at: int, rank: int, split: int, mixer: int, scaling: float) -> None:
    """Add one token's update by one adapter to its output row: x (d_in,), y (d_out,)."""
    segment_rank = rank // split
    if in_run and segment_rank >= MATMUL_FROM:
        return
    d_in, d_out = len(x), len(y)
    in_width, out_width = d_in // split, d_out // split
    a = pool[at : at + d_in * segment_rank]
    at += d_in * segment_rank
    # Loops run from zero over slices: numba then knows that no index is negative, and uses vector instructions.
    # u = x A, block by block.
    u = np.zeros(rank, np.float32)
    for i in range(split):
        segment = x[i * in_width : (i + 1) * in_width]
        block = a[i * in_width * segment_rank : (i + 1) * in_width * segment_rank]
        if segment_rank == 1:
            total = np.float32(0)
            for k in range(in_width):
                total += segment[k] * block[k]
            u[i] = total
        else:
            reduced = u[i * segment_rank : (i + 1) * segment_rank]
            for k in range(in_width):
                row = block[k * segment_rank : (k + 1) * segment_rank]
                for j in range(segment_rank):
                    reduced[j] += segment[k] * row[j]
    # v = u C
    v = u
    if mixer:
        v = np.zeros(rank, np.float32)
        # Four rows at a time: v is then read and written a quarter as often.
        for p in range(0, rank - 3, 4):
            row0, row1 = pool[at : at + rank], pool[at + rank : at + 2 * rank]
            row2, row3 = pool[at + 2 * rank : at + 3 * rank], pool[at + 3 * rank : at + 4 * rank]
            at += 4 * rank
            for q in range(rank):
                v[q] += u[p] * row0[q] + u[p + 1] * row1[q] + u[p + 2] * row2[q] + u[p + 3] * row3[q]
        for p in range(rank - rank % 4, rank):
            row0 = pool[at : at + rank]
            at += rank
            for q in range(rank):
                v[q] += u[p] * row0[q]
    # y += scaling v B
    for j in range(segment_rank):
        row = pool[at : at + d_out]
        at += d_out
        for i in range(split):
            factor = scaling * v[i * segment_rank + j]
            target = y[i * out_width : (i + 1) * out_width]
            source = row[i * out_width : (i + 1) * out_width]
            for n in range(out_width):
                target[n] += factor * source[n]


@njit(**_options)
def _update(
    x: Any,
    ys: Any,
    widths: Any,
    modules: Any,
    slots: Any,
    in_run: Any,
    pool: Any,
    offset: Any,
    rank: Any,
    split: Any,
    mixer: Any,
    scaling: Any,
) -> None:
    for t in range(len(slots)):
        s = slots[t]
        if s >= 0:
            for i in range(len(modules)):
                m = modules[i]
                if offset[m, s] >= 0:
                    y = carray(_pointer(ys[i]), (len(slots), widths[i]), np.float32)
                    _token(
                        x[t],
                        y[t],
                        in_run[t],
                        pool,
                        offset[m, s],
                        rank[m, s],
                        split[m, s],
                        mixer[m, s],
                        scaling[m, s],
                    )


@njit(parallel=True, **_options)
def _update_parallel(
    x: Any,
    ys: Any,
    widths: Any,
    modules: Any,
    slots: Any,
    in_run: Any,
    pool: Any,
    offset: Any,
    rank: Any,
    split: Any,
    mixer: Any,
    scaling: Any,
) -> None:
    for t in prange(len(slots)):
        _update(
            x[t : t + 1],
            ys + t * widths * 4,
            widths,
            modules,
            slots[t : t + 1],
            in_run[t : t + 1],
            pool,
            offset,
            rank,
            split,
            mixer,
            scaling,
        )
