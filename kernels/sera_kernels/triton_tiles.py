"""Parts of the Triton kernel: one adapter's update of one token, or of a tile of tokens, over a range of columns.

VEC is how many elements one 16-byte access holds where every address allows it, else 1: `x // VEC * VEC` is x there,
and tells the compiler so.
"""

# ruff: noqa: D103
from __future__ import annotations

import triton
import triton.language as tl

from sera_kernels.triton_chunks import chunk_bounds, chunk_count, mixer_tile


@triton.jit
def reduce_token(
    x, a, start, end, in_width, segment_rank, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, VEC: tl.constexpr
):
    # u[start:end] in float32: x (d_in,), A (d_in, segment_rank).
    r = start + tl.arange(0, BLOCK_R)
    in_width = in_width // VEC * VEC
    if segment_rank == 1:
        # Inputs along the fast axis, as x and A lie.
        sums = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for k0 in range(0, in_width, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            at = r[:, None] * in_width + k[None, :]
            inside = (r < end)[:, None] & (k < in_width)[None, :]
            values = tl.load(x + at, mask=inside, other=0).to(tl.float32)
            sums += values * tl.load(a + at, mask=inside, other=0).to(tl.float32)
        u = tl.sum(sums, 1)
    else:
        # Multiples of VEC all, as rank and segment_rank are.
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
    # v[start:end] B over the columns n; b_row is B's first row there.
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
    # Add one token's update to its columns from n0: x (d_in,), y (d_out,); the factors begin at element `at`.
    segment_rank, in_width, out_width = rank // split, d_in // split, d_out // split
    d_in, d_out = d_in // VEC * VEC, d_out // VEC * VEC
    a = pool + at // VEC * VEC
    c = a + d_in * segment_rank
    b = c + tl.where(mixer != 0, rank // VEC * VEC * rank, 0)
    n = n0 + tl.arange(0, COLUMNS)
    n_segment = n // out_width
    lo = n0 // out_width * segment_rank
    hi = (tl.minimum(n0 + COLUMNS, d_out) - 1) // out_width * segment_rank + segment_rank
    # Loads wait for one another only where they must: these are under way during the reduction.
    before = tl.load(y + n, mask=n < d_out, other=0).to(tl.float32)
    b_row = tl.load(b + n, mask=n < d_out, other=0)
    update = tl.zeros((COLUMNS,), tl.float32)
    for index in range(0, chunk_count(lo, hi, segment_rank, BLOCK_Q)):
        start, end = chunk_bounds(index, lo, hi, segment_rank, BLOCK_Q)
        q = start + tl.arange(0, BLOCK_Q)
        mixed = tl.zeros((BLOCK_R, BLOCK_Q), tl.float32)
        # Without a mixer, v is u.
        p_lo, p_hi = tl.where(mixer != 0, 0, start), tl.where(mixer != 0, rank, end)
        for p_index in range(0, chunk_count(p_lo, p_hi, segment_rank, BLOCK_R)):
            p_start, p_end = chunk_bounds(p_index, p_lo, p_hi, segment_rank, BLOCK_R)
            mix = mixer_tile(c, p_start + tl.arange(0, BLOCK_R), p_end, q, end, rank, mixer, VEC)
            u = reduce_token(x, a, p_start, p_end, in_width, segment_rank, BLOCK_R, ELEMENTS // BLOCK_R, VEC)
            mixed += u[:, None] * mix
        v = tl.sum(mixed, 0)
        # No more than v has in the least blocks.
        ROWS: tl.constexpr = ELEMENTS // COLUMNS if ELEMENTS // COLUMNS < 16 else 16
        update += expand_token(v, b, b_row, start, end, n, n_segment, d_out, segment_rank, BLOCK_Q, ROWS)
    tl.store(y + n, (before + scaling * update).to(y.dtype.element_ty), mask=n < d_out)


@triton.jit
def sum_tile(
    x_rows, is_row, a, start, end, in_width,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    # u[:, start:end] in float32 of a tile of tokens, by segments of rank 1: as a matrix, A would be nearly all zeros.
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
    # The same by wider segments, with the blocks of A among zeros, as tl.dot takes them.
    r, end = start // VEC * VEC + tl.arange(0, BLOCK_R), end // VEC * VEC
    stride = segment_rank // VEC * VEC
    segment = tl.max_constancy(r // stride, VEC)
    j = tl.max_contiguous(tl.multiple_of(r % stride, VEC), VEC)
    u = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    # From a multiple of 16, so that x is read in whole vectors; what lies before the chunk's inputs meets zeros.
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
    # v[:, start:end] B over the columns n.
    if segment_rank == 1:
        at = n_segment - start
        mine = (at >= 0) & (at < end - start)
        index = tl.broadcast_to(tl.where(mine, at, 0)[None, :], (BLOCK_M, BLOCK_N))
        row = tl.load(b + n, mask=n < d_out, other=0).to(tl.float32)
        update = tl.gather(v, index, 1) * tl.where(mine, row, 0.0)[None, :]
    else:
        # The blocks of B among zeros.
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
    # As `update_token`, for the rows that x_rows and y_rows (pointers, BLOCK_M) begin; is_row says which exist.
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
        # Without a mixer, v is u.
        p_lo, p_hi = tl.where(mixer != 0, 0, start), tl.where(mixer != 0, rank, end)
        if segment_rank == 1:
            for p_start in range(p_lo, p_hi, 16):
                p = p_start + tl.arange(0, 16)
                sums = sum_tile(x_rows, is_row, a, p_start, p_hi, in_width, BLOCK_M, 16, VEC)
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
        # Columns of the chunk's segments.
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
