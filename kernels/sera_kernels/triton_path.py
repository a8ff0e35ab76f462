"""The grouped operation on a GPU: one Triton launch updates all layers that share an input.

The launch handles any mix of adapters. A program updates a range of columns of one layer's output, for one token or
for a tile of tokens of one adapter. Each program reduces, mixes and expands: u = x A, v = u C, y += scaling v B. The
reduced vector is small, so each program computes the vector again instead of reading it from another program. No two
programs write the same element of an output, so no operation is atomic.

The grid follows from shapes alone and the host reads no values. A CUDA graph that holds the launch can therefore be
replayed with other slots, tables and factors. There is no gradient: training uses the layers' autograd.

Triton 3.4 or newer is required. Without a GPU, the kernel runs if TRITON_INTERPRET=1 was set before this module is
imported.

Words of this file:

* Segment: one block of the block-diagonal A and B, with segment_rank ranks.
* Chunk: the ranks that a program handles at a time. A segment that is wider than a chunk is cut into chunks, and no
  chunk crosses the segment's end. Narrower segments are put together into a chunk. A chunk reads no inputs but those of
  its segments.
* VEC: the number of elements of a 16-byte access if every address allows such accesses, else 1. `x // VEC * VEC` equals
  x, and tells the compiler that x is a multiple of VEC.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sera_kernels.launches import Launch, choose_launch
from sera_kernels.operands import AdapterBatch, AdapterTables

OUTPUTS_PER_LAUNCH = 4
"""Number of layers of one launch. Further layers that share the input take another launch."""

SPARE_ROWS = 64
"""Rows of programs in addition to the rows that full tiles need. With still more tiles, programs take several tiles."""

# Arguments whose values may change without a new compilation.
_NUMBERS = ["x_stride", "d_in", "tokens", "slot_count"]
_NUMBERS += [f"{name}{i}" for name in ("module", "width", "stride") for i in range(OUTPUTS_PER_LAUNCH)]


def grouped_sera_triton(
    x: Tensor,
    outputs: Sequence[Tensor],
    modules: Sequence[int],
    batch: AdapterBatch,
    pool: Tensor,
    tables: AdapterTables,
) -> None:
    """Run `grouped_sera` on CUDA tensors. The row stride of x and of each output may exceed the row's width."""
    for i in range(0, len(outputs), OUTPUTS_PER_LAUNCH):
        some = slice(i, i + OUTPUTS_PER_LAUNCH)
        widths = [y.shape[1] for y in outputs[some]]
        launch = choose_launch(len(x), x.shape[1], max(widths), x.dtype, x.device)
        launch_grouped(launch, x, outputs[some], modules[some], batch, pool, tables)


def launch_grouped(
    launch: Launch,
    x: Tensor,
    outputs: Sequence[Tensor],
    modules: Sequence[int],
    batch: AdapterBatch,
    pool: Tensor,
    tables: AdapterTables,
) -> None:
    """Launch the kernel once with the given parameters, for at most `OUTPUTS_PER_LAUNCH` outputs."""
    tokens = len(x)
    if tokens == 0:
        return
    widths = [y.shape[1] for y in outputs]
    strides = [y.stride(0) for y in outputs]
    columns = sum(triton.cdiv(width, launch.columns) for width in widths)
    if launch.block_m == 1:
        rows, slots = tokens, batch.token_slots
        order = tile_first = tile_ordinal = slots
    else:
        rows = triton.cdiv(tokens, launch.block_m) + SPARE_ROWS
        slots, order = batch.sorted_slots
        tile_first, tile_ordinal = batch.tiles(launch.block_m)
    unused = OUTPUTS_PER_LAUNCH - len(outputs)
    with torch.cuda.device_of(x):
        grouped_kernel[(rows * columns,)](
            x, x.stride(0), x.shape[1], tokens,
            *outputs, *[outputs[0]] * unused,
            *modules, *[0] * unused,
            *widths, *[0] * unused,
            *strides, *[0] * unused,
            slots, order, tile_first, tile_ordinal,
            pool, tables.offset, tables.rank, tables.split, tables.mixer, tables.scaling, tables.offset.shape[1],
            COLUMNS=launch.columns,
            ELEMENTS=launch.elements,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            BLOCK_R=launch.block_r,
            BLOCK_K=launch.block_k,
            VEC=_vector(x, outputs, pool),
            # The interpreter's tl.dot reads bfloat16 as integers.
            WIDEN=x.dtype == torch.bfloat16 and not isinstance(grouped_kernel, triton.JITFunction),
            # TF32 holds factors of 16 bits exactly, and keeps more bits of a reduced vector than float16 or bfloat16.
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            maxnreg=launch.max_registers,
            # The default so far. Triton 3.9 warns that the default will change.
            enable_fp_fusion=True,
        )  # fmt: skip


def _vector(x: Tensor, outputs: Sequence[Tensor], pool: Tensor) -> int:
    """Return VEC as far as x, the outputs and the pool allow it. The kernel checks each adapter itself."""
    elements = 16 // x.element_size()
    rows = all(
        t.data_ptr() % 16 == 0 and t.stride(0) % elements == 0 and t.shape[1] % elements == 0 for t in (x, *outputs)
    )
    return elements if rows and pool.data_ptr() % 16 == 0 else 1


@triton.jit(do_not_specialize=_NUMBERS)
def grouped_kernel(
    x, x_stride, d_in, tokens,
    y0, y1, y2, y3, module0, module1, module2, module3,
    width0, width1, width2, width3, stride0, stride1, stride2, stride3,
    slots, order, tile_first, tile_ordinal,
    pool, offset, rank, split, mixer, scaling, slot_count,
    COLUMNS: tl.constexpr, ELEMENTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, VEC: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Update one range of columns, for one token if BLOCK_M is 1, else for tiles of tokens.

    A program is (row, range of columns). If BLOCK_M is 1, the program updates the token `row`, and `slots` is in the
    order of tokens. Else the program updates the tiles row, row + rows, row + 2 rows and so on. slots and order are
    then `AdapterBatch.sorted_slots`, and tile_first and tile_ordinal are `AdapterBatch.tiles`.
    """
    # An unused output has width 0.
    end0 = tl.cdiv(width0, COLUMNS)
    end1 = end0 + tl.cdiv(width1, COLUMNS)
    end2 = end1 + tl.cdiv(width2, COLUMNS)
    columns = end2 + tl.cdiv(width3, COLUMNS)
    column, row = tl.program_id(0) % columns, tl.program_id(0) // columns
    y = select_item(column, end0, end1, end2, y0, y1, y2, y3)
    module = select_item(column, end0, end1, end2, module0, module1, module2, module3)
    d_out = select_item(column, end0, end1, end2, width0, width1, width2, width3)
    y_stride = select_item(column, end0, end1, end2, stride0, stride1, stride2, stride3) // VEC * VEC
    n0 = (column - select_item(column, end0, end1, end2, 0, end0, end1, end2)) * COLUMNS
    x_stride = x_stride // VEC * VEC
    if BLOCK_M == 1:
        slot = tl.load(slots + row)
        cell = module * slot_count + slot
        # These loads do not wait for each other.
        at = tl.load(offset + cell, mask=slot >= 0, other=-1)
        adapter_rank, adapter_split = tl.load(rank + cell, mask=slot >= 0), tl.load(split + cell, mask=slot >= 0)
        has_mixer, factor = tl.load(mixer + cell, mask=slot >= 0), tl.load(scaling + cell, mask=slot >= 0)
        if at >= 0:
            update_token_by_size(
                x + row.to(tl.int64) * x_stride, y + row.to(tl.int64) * y_stride, pool, n0, d_in, d_out,
                at, adapter_rank, adapter_split, has_mixer, factor, COLUMNS, ELEMENTS, VEC,
            )  # fmt: skip
    else:
        tiles = tl.load(tile_ordinal + tokens - 1).to(tl.int32)
        for tile in range(row, tiles, tl.num_programs(0) // columns):
            start = tl.load(tile_first + tile).to(tl.int32)
            slot = tl.load(slots + start)
            cell = module * slot_count + slot
            at, adapter_rank, adapter_split = tl.load(offset + cell), tl.load(rank + cell), tl.load(split + cell)
            has_mixer, factor = tl.load(mixer + cell), tl.load(scaling + cell)
            if at >= 0:
                m = start + tl.arange(0, BLOCK_M)
                is_row = tl.load(slots + m, mask=m < tokens, other=-1) == slot
                token = tl.load(order + m, mask=is_row, other=0).to(tl.int64)
                if tl.sum(is_row.to(tl.int32)) == 1:
                    only = tl.sum(token)
                    update_token_by_size(
                        x + only * x_stride, y + only * y_stride, pool, n0, d_in, d_out,
                        at, adapter_rank, adapter_split, has_mixer, factor, COLUMNS, ELEMENTS, VEC,
                    )  # fmt: skip
                else:
                    update_tile_by_size(
                        x + token * x_stride, y + token * y_stride, is_row, pool, n0, d_in, d_out,
                        at, adapter_rank, adapter_split, has_mixer, factor,
                        COLUMNS, BLOCK_M, BLOCK_N, BLOCK_R, BLOCK_K, VEC, WIDEN, PRECISION,
                    )  # fmt: skip


@triton.jit
def select_item(column, end0, end1, end2, item0, item1, item2, item3):
    """Return the item of the output that contains the range `column`."""
    first, second = tl.where(column >= end0, item1, item0), tl.where(column >= end2, item3, item2)
    return tl.where(column >= end1, second, first)


@triton.jit
def fits_vector(d_in, at, rank, split, mixer, VEC: tl.constexpr):
    """Return whether A, C and B, and each segment of x, start at multiples of VEC elements."""
    segments = (rank == split) | (rank // split % VEC == 0)
    return (at % VEC == 0) & (d_in // split % VEC == 0) & segments & ((mixer == 0) | (rank % VEC == 0))


@triton.jit
def ranks_in_range(n0, d_out, rank, split, COLUMNS: tl.constexpr):
    """Return the number of ranks of all segments in the range of columns from n0."""
    out_width = d_out // split
    return ((tl.minimum(n0 + COLUMNS, d_out) - 1) // out_width - n0 // out_width + 1) * (rank // split)


@triton.jit
def update_token_by_size(
    x, y, pool, n0, d_in, d_out, at, rank, split, mixer, scaling,
    COLUMNS: tl.constexpr, ELEMENTS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Run `update_token` with block sizes that fit the adapter: an adapter of few ranks needs no large blocks."""
    if fits_vector(d_in, at, rank, split, mixer, VEC):
        if tl.where(mixer != 0, rank, ranks_in_range(n0, d_out, rank, split, COLUMNS)) <= 16:
            update_token(x, y, pool, n0, d_in, d_out, at, rank, split, mixer, scaling, COLUMNS, ELEMENTS, 16, 16, VEC)
        else:
            update_token(x, y, pool, n0, d_in, d_out, at, rank, split, mixer, scaling, COLUMNS, ELEMENTS, 32, 64, VEC)
    else:
        update_token(x, y, pool, n0, d_in, d_out, at, rank, split, mixer, scaling, COLUMNS, ELEMENTS // 2, 16, 64, 1)


@triton.jit
def reduce_token(
    x, a, start, end, in_width, segment_rank, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, VEC: tl.constexpr
):
    """Return u[start:end] = (x A)[start:end] in float32. Shapes: x (d_in,), A (d_in, segment_rank)."""
    r = start + tl.arange(0, BLOCK_R)
    in_width = in_width // VEC * VEC
    if segment_rank == 1:
        # Inputs are along the fast axis, as in the memory of x and A.
        sums = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for k0 in range(0, in_width, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            at = r[:, None] * in_width + k[None, :]
            inside = (r < end)[:, None] & (k < in_width)[None, :]
            values = tl.load(x + at, mask=inside, other=0).to(tl.float32)
            sums += values * tl.load(a + at, mask=inside, other=0).to(tl.float32)
        u = tl.sum(sums, 1)
    else:
        # All of these are multiples of VEC, as rank and segment_rank are.
        r, end = start // VEC * VEC + tl.arange(0, BLOCK_R), end // VEC * VEC
        stride = segment_rank // VEC * VEC
        products = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
        if segment_rank >= BLOCK_R:
            segment = start // segment_rank
            j = r - segment * stride
            for k0 in range(0, in_width, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                at = segment * in_width + k
                inside = (k < in_width)[:, None] & (r < end)[None, :]
                values = tl.load(x + at, mask=k < in_width, other=0).to(tl.float32)
                factors = tl.load(a + at[:, None] * stride + j[None, :], mask=inside, other=0)
                products += values[:, None] * factors.to(tl.float32)
        else:
            segments = tl.max_constancy(r // stride, VEC)
            j = tl.max_contiguous(tl.multiple_of(r % stride, VEC), VEC)
            for k0 in range(0, in_width, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                at = k[:, None] + segments[None, :] * in_width
                inside = (k < in_width)[:, None] & (r < end)[None, :]
                values = tl.load(x + at, mask=inside, other=0).to(tl.float32)
                factors = tl.load(a + at * stride + j[None, :], mask=inside, other=0)
                products += values * factors.to(tl.float32)
        u = tl.sum(products, 0)
    return u


@triton.jit
def expand_token(v, b, b_row, start, end, n, n_segment, d_out, segment_rank, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr):
    """Return v[start:end] B for the columns n. `b_row` is the first row of B in these columns."""
    if segment_rank < BLOCK_Q:
        update = tl.zeros(n.shape, tl.float32)
        row = b_row
        for j in range(0, segment_rank):
            at = n_segment * segment_rank + j - start
            inside = (at >= 0) & (at < end - start)
            factor = tl.gather(v, tl.where(inside, at, 0), 0)
            update += tl.where(inside, factor, 0.0) * row.to(tl.float32)
            row = tl.load(b + (j + 1) * d_out + n, mask=n < tl.where(j + 1 < segment_rank, d_out, 0), other=0)
    else:
        segment = start // segment_rank
        products = tl.zeros((ROWS, n.shape[0]), tl.float32)
        for i0 in range(0, end - start, ROWS):
            i = i0 + tl.arange(0, ROWS)
            inside = (i < end - start)[:, None] & (n < d_out)[None, :]
            at = (start - segment * segment_rank + i)[:, None] * d_out + n[None, :]
            rows = tl.load(b + at, mask=inside, other=0).to(tl.float32)
            products += tl.gather(v, i, 0)[:, None] * rows
        update = tl.where(n_segment == segment, tl.sum(products, 0), 0.0)
    return update


@triton.jit
def update_token(
    x, y, pool, n0, d_in, d_out, at, rank, split, mixer, scaling,
    COLUMNS: tl.constexpr, ELEMENTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Add one token's update to the columns from n0. x (d_in,), y (d_out,); the factors start at element `at`."""
    segment_rank, in_width, out_width = rank // split, d_in // split, d_out // split
    d_in, d_out = d_in // VEC * VEC, d_out // VEC * VEC
    a = pool + at // VEC * VEC
    c = a + d_in * segment_rank
    b = c + tl.where(mixer != 0, rank // VEC * VEC * rank, 0)
    n = n0 + tl.arange(0, COLUMNS)
    n_segment = n // out_width
    lo = n0 // out_width * segment_rank
    hi = (tl.minimum(n0 + COLUMNS, d_out) - 1) // out_width * segment_rank + segment_rank
    # These loads are issued first, so they run during the reduction.
    before = tl.load(y + n, mask=n < d_out, other=0).to(tl.float32)
    b_row = tl.load(b + n, mask=n < d_out, other=0)
    update = tl.zeros((COLUMNS,), tl.float32)
    for index in range(0, chunk_count(lo, hi, segment_rank, BLOCK_Q)):
        start, end = chunk_bounds(index, lo, hi, segment_rank, BLOCK_Q)
        q = start + tl.arange(0, BLOCK_Q)
        mixed = tl.zeros((BLOCK_R, BLOCK_Q), tl.float32)
        # Without a mixer, v equals u.
        p_lo, p_hi = tl.where(mixer != 0, 0, start), tl.where(mixer != 0, rank, end)
        for p_index in range(0, chunk_count(p_lo, p_hi, segment_rank, BLOCK_R)):
            p_start, p_end = chunk_bounds(p_index, p_lo, p_hi, segment_rank, BLOCK_R)
            mix = mixer_tile(c, p_start + tl.arange(0, BLOCK_R), p_end, q, end, rank, mixer, VEC)
            u = reduce_token(x, a, p_start, p_end, in_width, segment_rank, BLOCK_R, ELEMENTS // BLOCK_R, VEC)
            mixed += u[:, None] * mix
        v = tl.sum(mixed, 0)
        # At most the length of v in the smallest blocks, 16.
        ROWS: tl.constexpr = ELEMENTS // COLUMNS if ELEMENTS // COLUMNS < 16 else 16
        update += expand_token(v, b, b_row, start, end, n, n_segment, d_out, segment_rank, BLOCK_Q, ROWS)
    tl.store(y + n, (before + scaling * update).to(y.dtype.element_ty), mask=n < d_out)


@triton.jit
def update_tile_by_size(
    x_rows, y_rows, is_row, pool, n0, d_in, d_out, at, rank, split, mixer, scaling,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    VEC: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run `update_tile` with block sizes that fit the adapter. y is written, and rounded, once for every MANY ranks."""
    NARROW: tl.constexpr = BLOCK_N // 2
    # Without a matrix unit, wide blocks need too many registers. More roundings cost float32 little accuracy.
    MANY: tl.constexpr = 64 if PRECISION == "ieee" else 256
    if fits_vector(d_in, at, rank, split, mixer, VEC):
        if ranks_in_range(n0, d_out, rank, split, COLUMNS) <= 64:
            update_tile(
                x_rows, y_rows, is_row, pool, n0, d_in, d_out, at, rank, split, mixer, scaling,
                COLUMNS, BLOCK_M, BLOCK_N, BLOCK_R, 64, BLOCK_K, VEC, WIDEN, PRECISION,
            )  # fmt: skip
        else:
            update_tile(
                x_rows, y_rows, is_row, pool, n0, d_in, d_out, at, rank, split, mixer, scaling,
                COLUMNS, BLOCK_M, NARROW, BLOCK_R, MANY, BLOCK_K, VEC, WIDEN, PRECISION,
            )  # fmt: skip
    else:
        update_tile(
            x_rows, y_rows, is_row, pool, n0, d_in, d_out, at, rank, split, mixer, scaling,
            COLUMNS, BLOCK_M, NARROW, BLOCK_R, MANY, BLOCK_K, 1, WIDEN, PRECISION,
        )  # fmt: skip


@triton.jit
def reduce_tile_rank_one(
    x_rows, is_row, a, start, end, in_width,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Return u[:, start:end] in float32 for a tile, if segment_rank is 1. As a matrix, A would be nearly all zeros."""
    BLOCK_K: tl.constexpr = 8192 // (BLOCK_M * BLOCK_R)
    in_width = in_width // VEC * VEC
    r = start + tl.arange(0, BLOCK_R)
    sums = tl.zeros((BLOCK_M, BLOCK_R, BLOCK_K), tl.float32)
    for k0 in range(0, in_width, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        at = r[:, None] * in_width + k[None, :]
        inside = (r < end)[:, None] & (k < in_width)[None, :]
        factors = tl.load(a + at, mask=inside, other=0).to(tl.float32)
        inside = is_row[:, None, None] & inside[None, :, :]
        values = tl.load(x_rows[:, None, None] + at[None, :, :], mask=inside, other=0).to(tl.float32)
        sums += values * factors[None, :, :]
    return tl.sum(sums, 2)


@triton.jit
def reduce_tile(
    x_rows, is_row, a, start, end, d_in, in_width, segment_rank,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, VEC: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return u[:, start:end] in float32 for a tile, if segment_rank exceeds 1. tl.dot gets A with its zeros."""
    r, end = start // VEC * VEC + tl.arange(0, BLOCK_R), end // VEC * VEC
    stride = segment_rank // VEC * VEC
    segment = tl.max_constancy(r // stride, VEC)
    j = tl.max_contiguous(tl.multiple_of(r % stride, VEC), VEC)
    u = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    # Start at a multiple of 16, so that x is read in whole vectors. Inputs before the chunk's own meet zeros of A.
    first = start // segment_rank * in_width // 16 * 16
    for d0 in range(first, (end - 1) // segment_rank * in_width + in_width, BLOCK_K):
        d = d0 + tl.arange(0, BLOCK_K)
        values = tl.load(x_rows[:, None] + d[None, :], mask=is_row[:, None] & (d < d_in)[None, :], other=0)
        own = ((d // in_width)[:, None] == segment[None, :]) & (r < end)[None, :] & (d < d_in)[:, None]
        factors = tl.load(a + d[:, None] * stride + j[None, :], mask=own, other=0)
        if WIDEN:
            values, factors = values.to(tl.float32), factors.to(tl.float32)
        u = tl.dot(values, factors, u, input_precision=PRECISION)
    return u


@triton.jit
def expand_tile(
    v, b, start, end, n, n_segment, d_out, segment_rank,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return v[:, start:end] B for the columns n."""
    if segment_rank == 1:
        at = n_segment - start
        mine = (at >= 0) & (at < end - start)
        index = tl.broadcast_to(tl.where(mine, at, 0)[None, :], (BLOCK_M, BLOCK_N))
        row = tl.load(b + n, mask=n < d_out, other=0).to(tl.float32)
        update = tl.gather(v, index, 1) * tl.where(mine, row, 0.0)[None, :]
    else:
        # The blocks of B, with zeros around them.
        q = start + tl.arange(0, BLOCK_Q)
        own = ((q // segment_rank)[:, None] == n_segment[None, :]) & (q < end)[:, None]
        inside = (q < end)[:, None] & (n < d_out)[None, :]
        rows = tl.load(b + (q % segment_rank)[:, None] * d_out + n[None, :], mask=inside, other=0)
        update = tl.dot(v, tl.where(own, rows.to(tl.float32), 0.0), input_precision=PRECISION)
    return update


@triton.jit
def update_tile(
    x_rows, y_rows, is_row, pool, n0, d_in, d_out, at, rank, split, mixer, scaling,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, VEC: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the updates of a tile of tokens, as `update_token` does for one.

    x_rows and y_rows (BLOCK_M,) point to the rows' starts. `is_row` (BLOCK_M,) says which rows exist.
    """
    segment_rank, in_width, out_width = rank // split, d_in // split, d_out // split
    d_in, d_out = d_in // VEC * VEC, d_out // VEC * VEC
    a = pool + at // VEC * VEC
    c = a + d_in * segment_rank
    b = c + tl.where(mixer != 0, rank // VEC * VEC * rank, 0)
    n_end = tl.minimum(n0 + COLUMNS, d_out)
    lo = n0 // out_width * segment_rank
    hi = (n_end - 1) // out_width * segment_rank + segment_rank
    for index in range(0, chunk_count(lo, hi, segment_rank, BLOCK_Q)):
        start, end = chunk_bounds(index, lo, hi, segment_rank, BLOCK_Q)
        q = start + tl.arange(0, BLOCK_Q)
        v = tl.zeros((BLOCK_M, BLOCK_Q), tl.float32)
        # Without a mixer, v equals u.
        p_lo, p_hi = tl.where(mixer != 0, 0, start), tl.where(mixer != 0, rank, end)
        if segment_rank == 1:
            for p_start in range(p_lo, p_hi, 16):
                p = p_start + tl.arange(0, 16)
                sums = reduce_tile_rank_one(x_rows, is_row, a, p_start, p_hi, in_width, BLOCK_M, 16, VEC)
                v = tl.dot(sums, mixer_tile(c, p, p_hi, q, end, rank, mixer, VEC), v, input_precision=PRECISION)
        else:
            for p_index in range(0, chunk_count(p_lo, p_hi, segment_rank, BLOCK_R)):
                p_start, p_end = chunk_bounds(p_index, p_lo, p_hi, segment_rank, BLOCK_R)
                u = reduce_tile(
                    x_rows, is_row, a, p_start, p_end, d_in, in_width, segment_rank,
                    BLOCK_M, BLOCK_R, BLOCK_K, VEC, WIDEN, PRECISION,
                )  # fmt: skip
                mix = mixer_tile(c, p_start + tl.arange(0, BLOCK_R), p_end, q, end, rank, mixer, VEC)
                v = tl.dot(u, mix, v, input_precision=PRECISION)
        # The columns of the chunk's segments.
        first = tl.maximum(n0, n0 + (start // segment_rank * out_width - n0) // BLOCK_N * BLOCK_N)
        last = tl.minimum(n_end, (end - 1) // segment_rank * out_width + out_width)
        for s0 in range(first, last, BLOCK_N):
            n = s0 // VEC * VEC + tl.arange(0, BLOCK_N)
            update = expand_tile(
                v, b, start, end, n, n // out_width, d_out, segment_rank, BLOCK_M, BLOCK_N, BLOCK_Q, PRECISION
            )
            inside = is_row[:, None] & (n < n_end)[None, :]
            y = y_rows[:, None] + n[None, :]
            before = tl.load(y, mask=inside, other=0).to(tl.float32)
            tl.store(y, (before + scaling * update).to(y.dtype.element_ty), mask=inside)
        # The next chunk may add to the same columns.
        tl.debug_barrier()


@triton.jit
def chunk_count(lo, hi, segment_rank, BLOCK_R: tl.constexpr):
    """Return the number of chunks of at most BLOCK_R ranks in [lo, hi): whole segments, or a part of one segment."""
    if segment_rank >= BLOCK_R:
        unit = tl.minimum(segment_rank, hi - lo)
        count = (hi - lo) // unit * tl.cdiv(unit, BLOCK_R)
    else:
        count = tl.cdiv(hi - lo, BLOCK_R // segment_rank * segment_rank)
    return count


@triton.jit
def chunk_bounds(index, lo, hi, segment_rank, BLOCK_R: tl.constexpr):
    """Return the first rank of chunk `index`, and the rank after its last."""
    if segment_rank >= BLOCK_R:
        unit = tl.minimum(segment_rank, hi - lo)
        chunks = tl.cdiv(unit, BLOCK_R)
        start = lo + index // chunks * unit + index % chunks * BLOCK_R
        end = tl.minimum(start + BLOCK_R, lo + index // chunks * unit + unit)
    else:
        start = lo + index * (BLOCK_R // segment_rank * segment_rank)
        end = tl.minimum(start + BLOCK_R // segment_rank * segment_rank, hi)
    return start, end


@triton.jit
def mixer_tile(c, p, p_end, q, q_end, rank, mixer, VEC: tl.constexpr):
    """Return C[p, q] in float32: the identity if there is no mixer, and zero outside the chunks."""
    inside = (p < p_end)[:, None] & (q < q_end)[None, :]
    if mixer != 0:
        at = p[:, None] * (rank // VEC * VEC) + q[None, :]
        tile = tl.load(c + at, mask=inside, other=0).to(tl.float32)
    else:
        tile = ((p[:, None] == q[None, :]) & inside).to(tl.float32)
    return tile
