"""Triton kernels for prefill, of segments of higher ranks: tiles of tokens of one adapter, for the matrix unit.

    reduce_tiles     parts of the sums u = x A. x is read once for each layer; `mix_parts` follows
    expand_tiles     y += scaling * v B

A and B enter the products as dense blocks with zeros outside of their segments. Words as in `decode_kernels`. Segments
of rank 1 have kernels of their own, in `run_kernels`.
"""

# Triton's own language: its values have no Python type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from sera_kernels.decode_kernels import _NUMBERS, b_offset, column_range, read_cell, select_item


@triton.jit
def read_tile(tile, tokens, slots, order, tile_first, M: tl.constexpr):
    """Return the slot of a tile, its tokens (M,) int64, and which of the rows exist (M,)."""
    start = tl.load(tile_first + tile).to(tl.int32)
    slot = tl.load(slots + start)
    m = start + tl.arange(0, M)
    is_row = tl.load(slots + m, mask=m < tokens, other=-1) == slot
    return slot, tl.load(order + m, mask=is_row, other=0), is_row


@triton.jit
def reduce_tile(
    x_rows, is_row, a, d_in, d_begin, d_end, r0, rank, width, segment_rank, out_rows,
    M: tl.constexpr, R: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr, VEC: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the sums u[:, r0 : r0 + R] over the inputs [d_begin, d_end) of a tile.

    x_rows (M,) and out_rows (M,) point to rows. Inputs after d_end, up to a multiple of K, meet zeros of A. VEC
    neighbours in a row of A belong to one segment.
    """
    r = r0 + tl.arange(0, R)
    segment_rank, rank = segment_rank // VEC * VEC, rank // VEC * VEC
    segment = tl.max_constancy(r // segment_rank, VEC)
    j = tl.max_contiguous(tl.multiple_of(r % segment_rank, VEC), VEC)
    u = tl.zeros((M, R), tl.float32)
    for d0 in tl.range(d_begin, d_end, K, num_stages=STAGES):
        d = d0 + tl.arange(0, K)
        values = tl.load(x_rows[:, None] + d[None, :], mask=is_row[:, None] & (d < d_in)[None, :], other=0)
        own = (d // width)[:, None] == segment[None, :]
        inside = (d < d_in)[:, None] & (r < rank)[None, :]
        factors = tl.load(a + d[:, None] * segment_rank + j[None, :], mask=inside, other=0)
        factors = tl.where(own, factors, 0)
        if WIDEN:
            values, factors = values.to(tl.float32), factors.to(tl.float32)
        u = tl.dot(values, factors, u, input_precision=PRECISION)
    tl.store(out_rows[:, None] + r[None, :], u, mask=is_row[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["slots"])
def reduce_tiles(
    x, x_stride, d_in, tokens, module0, module1, module2, module3,
    slots, order, tile_first, tile_ordinal, pool, offset, rank, split, mixer, slot_count, sums, v_width,
    CHUNKS: tl.constexpr, SINGLE: tl.constexpr,
    M: tl.constexpr, R: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr, X_VEC: tl.constexpr, VEC: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write parts of the sums u = x A. A program is (tiles, layer and chunk of R ranks, part of the inputs).

    slots and order are `AdapterBatch.sorted_slots`, tile_first and tile_ordinal are `AdapterBatch.tiles(M)`.
    Program row of `rows` takes the tiles row, row + rows and so on. sums (parts, layers, tokens, v_width) float32.
    SINGLE: also for segments of rank 1.
    """
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    i, r0, part = tl.program_id(1) // CHUNKS, tl.program_id(1) % CHUNKS * R, tl.program_id(2)
    layers = tl.num_programs(1) // CHUNKS
    module = select_item(i, module0, module1, module2, module3)
    tiles = tl.load(tile_ordinal + tokens - 1).to(tl.int32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        slot, token, is_row = read_tile(tile, tokens, slots, order, tile_first, M)
        at, own_rank, own_split, _ = read_cell(module * slot_count + slot, True, offset, rank, split, mixer)
        if (at >= 0) & (r0 < own_rank) & (SINGLE | (own_rank > own_split)):
            segment_rank, width = own_rank // own_split, d_in // own_split
            # The inputs of the chunk's segments, from a multiple of 16: x is read in whole vectors.
            begin = r0 // segment_rank * width // 16 * 16
            end = ((tl.minimum(r0 + R, own_rank) - 1) // segment_rank + 1) * width
            step = tl.cdiv(end - begin, tl.num_programs(2) * K) * K
            begin = (begin + part * step) // 16 * 16
            end = tl.minimum(begin + step, end)
            d_x = d_in // X_VEC * X_VEC
            x_rows = x + token * (x_stride // X_VEC * X_VEC)
            out_rows = sums + ((part * layers + i) * tokens + token) * v_width
            if (at % VEC == 0) & (segment_rank % VEC == 0):
                reduce_tile(
                    x_rows, is_row, pool + at // VEC * VEC, d_x, begin, end, r0, own_rank, width, segment_rank,
                    out_rows, M, R, K, STAGES, VEC, WIDEN, PRECISION,
                )  # fmt: skip
            else:
                reduce_tile(
                    x_rows, is_row, pool + at, d_x, begin, end, r0, own_rank, width, segment_rank, out_rows,
                    M, R, 16, 1, 1, WIDEN, PRECISION,
                )  # fmt: skip


@triton.jit
def expand_tile(
    y_rows, is_row, b, v_rows, n0, d_out, out_width, segment_rank, scaling,
    M: tl.constexpr, COLUMNS: tl.constexpr, Q: tl.constexpr, VEC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add scaling * v B to the columns from n0 of a tile. y_rows (M,) and v_rows (M,) point to rows."""
    d_out = d_out // VEC * VEC
    n = n0 + tl.arange(0, COLUMNS)
    begin = n0 // out_width * segment_rank
    end = ((tl.minimum(n0 + COLUMNS, d_out) - 1) // out_width + 1) * segment_rank
    y = y_rows[:, None] + n[None, :]
    inside_y = is_row[:, None] & (n < d_out)[None, :]
    # Read at once, so that this load runs beside those of v and B.
    before = tl.load(y, mask=inside_y, other=0)
    update = tl.zeros((M, COLUMNS), tl.float32)
    for q0 in range(begin, end, Q):
        q = q0 + tl.arange(0, Q)
        values = tl.load(v_rows[:, None] + q[None, :], mask=is_row[:, None] & (q < end)[None, :], other=0)
        inside = (q < end)[:, None] & (n < d_out)[None, :]
        factors = tl.load(b + (q % segment_rank)[:, None] * d_out + n[None, :], mask=inside, other=0)
        own = (q // segment_rank)[:, None] == (n // out_width)[None, :]
        update = tl.dot(values, tl.where(own, factors.to(tl.float32), 0.0), update, input_precision=PRECISION)
    tl.store(y, (before.to(tl.float32) + scaling * update).to(y.dtype.element_ty), mask=inside_y)


@triton.jit(
    do_not_specialize=[*_NUMBERS, *(f"{name}{i}" for name in ("width", "stride") for i in range(4))],
    do_not_specialize_on_alignment=["slots"],
)
def expand_tiles(
    y0, y1, y2, y3, width0, width1, width2, width3, stride0, stride1, stride2, stride3,
    d_in, tokens, module0, module1, module2, module3, slots, order, tile_first, tile_ordinal,
    pool, offset, rank, split, mixer, scaling, slot_count, v, v_width,
    SINGLE: tl.constexpr, M: tl.constexpr, COLUMNS: tl.constexpr, Q: tl.constexpr, VEC: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add the updates to up to four outputs. A program is (tiles, range of columns of an output).

    SINGLE: also for segments of rank 1.
    """
    if OVERLAP:
        cuda.gdc_wait()
    column = tl.program_id(1)
    i, n0, d_out = column_range(column, width0, width1, width2, width3, COLUMNS)
    y = select_item(i, y0, y1, y2, y3)
    y_stride = select_item(i, stride0, stride1, stride2, stride3) // VEC * VEC
    module = select_item(i, module0, module1, module2, module3)
    tiles = tl.load(tile_ordinal + tokens - 1).to(tl.int32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        slot, token, is_row = read_tile(tile, tokens, slots, order, tile_first, M)
        cell = module * slot_count + slot
        at, own_rank, own_split, has_mixer = read_cell(cell, True, offset, rank, split, mixer)
        factor = tl.load(scaling + cell)
        if (at >= 0) & (SINGLE | (own_rank > own_split)):
            segment_rank, out_width = own_rank // own_split, d_out // own_split
            b = b_offset(at, d_in, segment_rank, own_rank, has_mixer)
            y_rows, v_rows = y + token * y_stride, v + (i * tokens + token) * v_width
            if b % VEC == 0:
                expand_tile(
                    y_rows, is_row, pool + b // VEC * VEC, v_rows, n0, d_out, out_width, segment_rank, factor,
                    M, COLUMNS, Q, VEC, PRECISION,
                )  # fmt: skip
            else:
                # Few columns at a time: loads of single elements need many registers.
                for part in range(n0, n0 + COLUMNS, COLUMNS // 4):
                    expand_tile(
                        y_rows, is_row, pool + b, v_rows, part, d_out, out_width, segment_rank, factor,
                        M, COLUMNS // 4, Q, 1, PRECISION,
                    )  # fmt: skip
