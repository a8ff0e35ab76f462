"""The grouped operation on a CPU, compiled by numba: each token reads its adapter in place, in its true size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit, prange
from torch import Tensor

from sera_kernels.operands import ABSENT, AdapterBatch, AdapterTables
from sera_kernels.torch_path import update_run

# Multiply-adds below which one thread is done before a second one has started.
PARALLEL_FROM = 400_000
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
    slots, in_run = batch.host_slots, batch.in_long_run
    # Only an estimate of the work: the ranks are not known here.
    parallel = len(slots) * (x.shape[1] + outputs[0].shape[1]) * 4 * len(outputs) > PARALLEL_FROM
    update = _update_parallel if parallel else _update
    source, data = x.numpy(), pool.numpy()
    for y, module in zip(outputs, modules, strict=True):
        update(source, y.numpy(), slots, in_run, data, *tables.host_rows(module))
        for slot in batch.long_runs:
            (entry,) = tables.entries(module, [slot])
            if entry.offset != ABSENT and entry.segment_rank >= MATMUL_FROM:
                update_run(x, y, batch.tokens_by_slot[slot], entry, pool)


def _body(
    x: Any,
    y: Any,
    slots: Any,
    in_run: Any,
    pool: Any,
    offsets: Any,
    ranks: Any,
    splits: Any,
    mixers: Any,
    scalings: Any,
) -> None:
    d_in, d_out = x.shape[1], y.shape[1]
    for t in prange(len(slots)):
        slot = slots[t]
        if slot < 0 or offsets[slot] < 0:
            continue
        rank, split = ranks[slot], splits[slot]
        segment_rank = rank // split
        if in_run[t] and segment_rank >= MATMUL_FROM:
            continue
        in_width, out_width = d_in // split, d_out // split
        at = offsets[slot]
        a = pool[at : at + d_in * segment_rank]
        at += d_in * segment_rank
        # u = x A, block by block.
        u = np.zeros(rank, np.float32)
        if segment_rank == 1:
            for i in range(split):
                total = np.float32(0)
                for k in range(i * in_width, (i + 1) * in_width):
                    total += x[t, k] * a[k]
                u[i] = total
        else:
            for i in range(split):
                block = u[i * segment_rank : (i + 1) * segment_rank]
                for k in range(i * in_width, (i + 1) * in_width):
                    factor = x[t, k]
                    row = a[k * segment_rank : (k + 1) * segment_rank]
                    for j in range(segment_rank):
                        block[j] += factor * row[j]
        # v = u C
        v = u
        if mixers[slot]:
            c = pool[at : at + rank * rank]
            at += rank * rank
            v = np.zeros(rank, np.float32)
            for p in range(rank):
                for q in range(rank):
                    v[q] += u[p] * c[p * rank + q]
        # y += scaling v B
        for i in range(split):
            for j in range(segment_rank):
                factor = scalings[slot] * v[i * segment_rank + j]
                row = at + j * d_out
                for n in range(i * out_width, (i + 1) * out_width):
                    y[t, n] += factor * pool[row + n]


_options = {"nogil": True, "fastmath": {"contract", "reassoc", "nsz", "arcp"}, "error_model": "numpy", "cache": True}
_update = njit(**_options)(_body)
_update_parallel = njit(parallel=True, **_options)(_body)
