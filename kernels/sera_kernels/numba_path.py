"""The grouped operation on a CPU, compiled by numba. Factors are read in place, without padding."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from sera_kernels.operands import ABSENT, AdapterBatch, AdapterTables
from sera_kernels.torch_path import update_run

# With fewer multiply-adds, one thread ends before a second thread has started.
PARALLEL_FROM = 30_000
# In a long run of one adapter's tokens, torch computes blocks of at least this rank faster, as a matrix product.
MATMUL_FROM = 4


def grouped_sera_numba(
    x: Tensor,
    outputs: Sequence[Tensor],
    modules: Sequence[int],
    batch: AdapterBatch,
    pool: Tensor,
    tables: AdapterTables,
) -> None:
    """Run `grouped_sera` on contiguous float32 tensors on a CPU."""
    d_in, tokens = x.size(-1), len(batch.host_slots)
    shapes, work = _output_shapes(tuple(modules), tuple([y.size(-1) for y in outputs]), d_in)
    update = _update
    # numba has its own number of threads. By default it would use cores that torch was told not to use.
    if tokens * work > PARALLEL_FROM and (threads := torch.get_num_threads()) > 1:
        update = _update_parallel
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    # The arguments are addresses: numba unpacks arrays slowly, and would compile again for each number of outputs.
    outputs_at = np.array([y.data_ptr() for y in outputs])
    update(
        x.data_ptr(),
        tokens,
        d_in,
        outputs_at,
        shapes,
        *batch.host_addresses,
        *tables.host_addresses,
        pool.data_ptr(),
    )
    if batch.long_runs:
        _update_long_runs(x.view(-1, d_in), outputs, modules, batch, pool, tables)
    if batch.classes_in(tables).vectors:
        apply = _apply_vectors if update is _update else _apply_vectors_parallel
        offset_at, *_, slot_count = tables.host_addresses
        slots_at, vectors_at = batch.host_addresses[0], tables.vectors.data_ptr()
        apply(tokens, outputs_at, shapes, slots_at, offset_at, vectors_at, slot_count, pool.data_ptr())


def _update_long_runs(
    x: Tensor,
    outputs: Sequence[Tensor],
    modules: Sequence[int],
    batch: AdapterBatch,
    pool: Tensor,
    tables: AdapterTables,
) -> None:
    """Add the updates that `_token` left to torch. x (tokens, d_in)."""
    offset, rank, split, *_ = tables.host_arrays
    for y, module in zip(outputs, modules, strict=True):
        for slot in batch.long_runs:
            if offset[module, slot] != ABSENT and rank[module, slot] >= MATMUL_FROM * split[module, slot]:
                (entry,) = tables.entries(module, [slot])
                update_run(x, y.view(-1, y.size(-1)), batch.tokens_by_slot[slot], entry, pool)


@lru_cache(maxsize=4096)
def _output_shapes(modules: tuple[int, ...], widths: tuple[int, ...], d_in: int) -> tuple[NDArray[Any], int]:
    """Return (outputs, 2) modules and widths of the outputs, and an estimate of the multiply-adds of a token."""
    # The estimate leaves out the ranks, which are unknown here.
    return np.array([modules, widths]).T.copy(), 2 * (d_in * len(widths) + sum(widths))


def _share_openmp() -> None:
    """Make numba use torch's OpenMP pool.

    torch and numba each bring their own copy of GNU OpenMP. With two pools, waiting threads of one pool would spin on
    cores that the other pool needs. This function loads torch's copy with global symbols. The loader prefers global
    symbols to the symbols of a library's own dependencies.
    """
    for library in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


# Must run before numba loads its threading layer. numba loads it when it compiles the first parallel function.
_share_openmp()


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    """Convert an address to a pointer for `carray`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


OPTIONS = {"nogil": True, "fastmath": {"contract", "reassoc", "nsz", "arcp"}, "error_model": "numpy", "cache": True}


@njit(**OPTIONS)
def _token(x: Any, y: Any, in_run: bool, pool: Any, at: int, rank: int, split: int, mixer: int, scaling: float) -> None:
    """Add one adapter's update of one token to the token's output row: x (d_in,), y (d_out,)."""
    segment_rank = rank // split
    if in_run and segment_rank >= MATMUL_FROM:
        return
    d_in, d_out = len(x), len(y)
    in_width, out_width = d_in // split, d_out // split
    a = pool[at : at + d_in * segment_rank]
    at += d_in * segment_rank
    # Loops run from zero over slices. numba then knows that no index is negative, and uses vector instructions.
    # u = x A, one block at a time.
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
        # Four rows at a time, so that v is read and written a quarter as often.
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


@njit(**OPTIONS)
def _update(
    x_at: int,
    tokens: int,
    d_in: int,
    ys_at: Any,
    shapes: Any,
    slots_at: int,
    in_run_at: int,
    offset_at: int,
    rank_at: int,
    split_at: int,
    mixer_at: int,
    scaling_at: int,
    slot_count: int,
    pool_at: int,
) -> None:
    """Update all outputs for all tokens. Arguments that end in _at are addresses."""
    slots = carray(_pointer(slots_at), tokens, np.int32)
    in_run = carray(_pointer(in_run_at), tokens, np.bool_)
    x = carray(_pointer(x_at), (tokens, d_in), np.float32)
    # Only slices of the pool are read, so any length that is large enough will do.
    pool = carray(_pointer(pool_at), 1 << 62, np.float32)
    rows = shapes[:, 0].max() + 1
    offset = carray(_pointer(offset_at), (rows, slot_count), np.int64)
    rank = carray(_pointer(rank_at), (rows, slot_count), np.int32)
    split = carray(_pointer(split_at), (rows, slot_count), np.int32)
    mixer = carray(_pointer(mixer_at), (rows, slot_count), np.int32)
    scaling = carray(_pointer(scaling_at), (rows, slot_count), np.float32)
    for t in range(tokens):
        s = slots[t]
        if s >= 0:
            for i in range(len(shapes)):
                m, d_out = shapes[i, 0], shapes[i, 1]
                if offset[m, s] >= 0:
                    y = carray(_pointer(ys_at[i]), (tokens, d_out), np.float32)
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


@njit(parallel=True, **OPTIONS)
def _update_parallel(
    x_at: int,
    tokens: int,
    d_in: int,
    ys_at: Any,
    shapes: Any,
    slots_at: int,
    in_run_at: int,
    offset_at: int,
    rank_at: int,
    split_at: int,
    mixer_at: int,
    scaling_at: int,
    slot_count: int,
    pool_at: int,
) -> None:
    for t in prange(tokens):
        _update(
            x_at + 4 * t * d_in,
            1,
            d_in,
            ys_at + 4 * t * shapes[:, 1],
            shapes,
            slots_at + 4 * t,
            in_run_at + t,
            offset_at,
            rank_at,
            split_at,
            mixer_at,
            scaling_at,
            slot_count,
            pool_at,
        )


@njit(**OPTIONS)
def _apply_vectors(
    tokens: int,
    ys_at: Any,
    shapes: Any,
    slots_at: int,
    offset_at: int,
    vectors_at: int,
    slot_count: int,
    pool_at: int,
) -> None:
    """Apply gains and offsets to all outputs of all tokens. Arguments that end in _at are addresses."""
    slots = carray(_pointer(slots_at), tokens, np.int32)
    pool = carray(_pointer(pool_at), 1 << 62, np.float32)
    rows = shapes[:, 0].max() + 1
    offset = carray(_pointer(offset_at), (rows, slot_count), np.int64)
    vectors = carray(_pointer(vectors_at), (rows, slot_count), np.int64)
    for t in range(tokens):
        s = slots[t]
        if s >= 0:
            for i in range(len(shapes)):
                m, d_out = shapes[i, 0], shapes[i, 1]
                at = vectors[m, s]
                if offset[m, s] >= 0 and at >= 0:
                    y = carray(_pointer(ys_at[i]), (tokens, d_out), np.float32)
                    target, gain, addend = y[t], pool[at : at + d_out], pool[at + d_out : at + 2 * d_out]
                    for n in range(d_out):
                        target[n] = gain[n] * target[n] + addend[n]


@njit(parallel=True, **OPTIONS)
def _apply_vectors_parallel(
    tokens: int,
    ys_at: Any,
    shapes: Any,
    slots_at: int,
    offset_at: int,
    vectors_at: int,
    slot_count: int,
    pool_at: int,
) -> None:
    for t in prange(tokens):
        ys = ys_at + 4 * t * shapes[:, 1]
        _apply_vectors(1, ys, shapes, slots_at + 4 * t, offset_at, vectors_at, slot_count, pool_at)
