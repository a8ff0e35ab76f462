"""Triton kernels for prefill, of segments of rank 1: blocks of neighbouring tokens, without products of matrices.

Each input belongs to one rank, and so does each output. So u = x A and y += scaling * v B are sums and products of
elements, and the time is that of reading and writing x and y.

    reduce_runs            v = (x A) C. A program holds a block of tokens, so that it reads A and C once
    expand_runs            y += scaling * v B, likewise
    expand_silu_mul_runs   the same for the two first layers of an MLP, then silu(gate) * up

A program takes its block's adapters one after the other: one inside a prompt, two where a prompt ends. Tokens that are
not neighbours share nothing, so nothing is sorted. A token's result does not depend on the other tokens of its block.
Words as in `decode_kernels`.
"""

# Triton's own language: its values have no Python type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from sera_kernels.decode_kernels import _NUMBERS, column_range, fits_vector, read_cell, select_item

# Slices of a range of columns that a program takes one after the other where rows do not allow 16-byte accesses.
SLICES = tl.constexpr(8)

# Programs of a block whose tokens have several adapters.
RUN_SHARES = tl.constexpr(4)


@triton.jit
def reduce_run(
    x_rows, rows, a, d_in, rank, mixer, out_rows, part, parts,
    M: tl.constexpr, R: tl.constexpr, S: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
    VEC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a part of v of the rows (M,) of a block. x_rows (M,), out_rows (M,) point to rows, a to A; C follows A.

    A round takes K inputs of each of S segments. v is linear in u, so each round's sums are mixed at once, and a part
    takes some of the rounds.
    """
    width = d_in // rank // VEC * VEC
    stride = rank // VEC * VEC
    c = a + d_in // VEC * VEC
    r = tl.arange(0, R)
    chunks = tl.cdiv(width, K)
    v = tl.zeros((M, R), tl.float32)
    rounds = tl.cdiv(rank, S) * chunks
    step = tl.cdiv(rounds, parts)
    first = part * step
    s0, k0 = first // chunks * S, first % chunks * K
    for _ in tl.range(0, tl.minimum(step, rounds - first), num_stages=STAGES):
        s, k = s0 + tl.arange(0, S), k0 + tl.arange(0, K)
        at = s[:, None] * width + k[None, :]
        inside = (s < rank)[:, None] & (k < width)[None, :]
        values = tl.load(x_rows[:, None, None] + at[None, :, :], mask=rows[:, None, None] & inside[None, :, :], other=0)
        factors = tl.load(a + at, mask=inside, other=0)
        mixed = (s < tl.where(mixer != 0, rank, 0))[:, None] & (r < stride)[None, :]
        tile = tl.load(c + s[:, None] * stride + r[None, :], mask=mixed, other=0).to(tl.float32)
        u = tl.sum(values.to(tl.float32) * factors.to(tl.float32)[None, :, :], 2)
        same = (s[:, None] == r[None, :]).to(tl.float32)
        v = tl.dot(u, tl.where(mixer != 0, tile, same), v, input_precision=PRECISION)
        k0 += K
        s0, k0 = tl.where(k0 < width, s0, s0 + S), tl.where(k0 < width, k0, 0)
    tl.store(out_rows[:, None] + r[None, :], v, mask=rows[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["slots"])
def reduce_runs(
    x, x_stride, d_in, tokens, module0, module1, module2, module3,
    slots, pool, offset, rank, split, mixer, slot_count, v, v_width,
    M: tl.constexpr, R: tl.constexpr, S: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
    VEC: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write v of every token and layer whose adapter has segments of rank 1. A program is (layer, block, part x share).

    Share 0 takes a block of M tokens if all have the same slot. Else each share takes its own tokens of the block.
    x (tokens, d_in), v (parts, layers, tokens, v_width) float32, to be summed over the parts. Other rows of v stay as
    they are.
    """
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    i, share, part = tl.program_id(0), tl.program_id(2) % RUN_SHARES, tl.program_id(2) // RUN_SHARES
    parts = tl.num_programs(2) // RUN_SHARES
    module = select_item(i, module0, module1, module2, module3)
    m = tl.arange(0, M)
    row = tl.program_id(1) * M + m
    own_slots = tl.load(slots + tl.minimum(row, tokens - 1))
    same = tl.min(own_slots, 0) == tl.max(own_slots, 0)
    share_rows: tl.constexpr = M // RUN_SHARES
    left = (row < tokens) & (tl.where(same, 0, m // share_rows) == share)
    slot = tl.max(tl.where(left, own_slots, -1), 0)
    line = row.to(tl.int64)
    while slot >= 0:
        rows = left & (own_slots == slot)
        at, own_rank, own_split, has_mixer = read_cell(module * slot_count + slot, True, offset, rank, split, mixer)
        if (at >= 0) & (own_rank == own_split):
            x_rows = x + line * (x_stride // VEC * VEC)
            out_rows = v + ((part * tl.num_programs(0) + i) * tokens + line) * v_width
            if (VEC > 1) & fits_vector(at, d_in, own_rank, own_split, has_mixer, VEC):
                reduce_run(
                    x_rows, rows, pool + at // VEC * VEC, d_in, own_rank, has_mixer, out_rows, part, parts,
                    M, R, S, K, STAGES, VEC, PRECISION,
                )  # fmt: skip
            else:
                # Few inputs at a time: loads of single elements need many registers.
                reduce_run(
                    x_rows, rows, pool + at, d_in, own_rank, has_mixer, out_rows, part, parts,
                    M, R, S, K // 4, 1, 1, PRECISION,
                )  # fmt: skip
        left = left & (own_slots != slot)
        slot = tl.max(tl.where(left, own_slots, -1), 0)


@triton.jit
def run_update(b, v_rows, part_stride, rows, first, n, d_out, out_width, M: tl.constexpr, PARTS: tl.constexpr):
    """Return v B (M, columns / VEC, VEC) for the columns n, or zero where first >= d_out.

    v is the sum of PARTS parts. v_rows (M,) point to rows of the first, and part_stride elements lie between two.
    n (columns / VEC, VEC) are groups of neighbours in one segment, and first (columns / VEC,) are their first columns.
    """
    inside = first < d_out
    factors = tl.load(b + n, mask=inside[:, None], other=0).to(tl.float32)
    at = v_rows[:, None] + (first // out_width)[None, :]
    there = rows[:, None] & inside[None, :]
    values = tl.load(at, mask=there, other=0)
    for part in tl.static_range(1, PARTS):
        values += tl.load(at + part * part_stride, mask=there, other=0)
    return values[:, :, None] * factors[None, :, :]


@triton.jit
def expand_run(
    y_rows, b, v_rows, part_stride, rows, n0, d_out, out_width, scaling,
    M: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Add scaling * v B to the columns from n0 of the rows (M,) of a block. y_rows (M,) point to rows."""
    d_out = d_out // VEC * VEC
    first = n0 + tl.arange(0, COLUMNS // VEC) * VEC
    n = first[:, None] + tl.arange(0, VEC)[None, :]
    inside = rows[:, None, None] & (first < d_out)[None, :, None]
    y = y_rows[:, None, None] + n[None, :, :]
    before = tl.load(y, mask=inside, other=0).to(tl.float32)
    update = run_update(b, v_rows, part_stride, rows, first, n, d_out, out_width, M, PARTS)
    tl.store(y, (before + scaling * update).to(y.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[*_NUMBERS, "part_stride", *(f"{name}{i}" for name in ("width", "stride") for i in range(4))],
    do_not_specialize_on_alignment=["slots"],
)
def expand_runs(
    y0, y1, y2, y3, width0, width1, width2, width3, stride0, stride1, stride2, stride3,
    d_in, tokens, module0, module1, module2, module3,
    slots, pool, offset, rank, split, mixer, scaling, slot_count, v, v_width, part_stride,
    M: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, VEC: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add the updates of segments of rank 1 to up to four outputs. A program is (block of M tokens, range of columns).

    y (tokens, width) with a stride of rows. An unused output has width 0.
    """
    column = tl.program_id(1)
    i, n0, d_out = column_range(column, width0, width1, width2, width3, COLUMNS)
    module = select_item(i, module0, module1, module2, module3)
    row = tl.program_id(0) * M + tl.arange(0, M)
    left = row < tokens
    own_slots = tl.load(slots + row, mask=left, other=-1)
    slot = tl.max(own_slots, 0)
    line = row.to(tl.int64)
    y_rows = select_item(i, y0, y1, y2, y3) + line * (select_item(i, stride0, stride1, stride2, stride3) // VEC * VEC)
    v_rows = v + (i * tokens + line) * v_width
    if OVERLAP:
        cuda.gdc_wait()
    while slot >= 0:
        rows = left & (own_slots == slot)
        cell = module * slot_count + slot
        at, own_rank, own_split, has_mixer = read_cell(cell, True, offset, rank, split, mixer)
        factor = tl.load(scaling + cell)
        if (at >= 0) & (own_rank == own_split):
            out_width = d_out // own_rank
            b = at + d_in + tl.where(has_mixer != 0, own_rank * own_rank, 0)
            if (VEC > 1) & (b % VEC == 0) & (out_width % VEC == 0):
                expand_run(
                    y_rows, pool + b // VEC * VEC, v_rows, part_stride, rows, n0, d_out, out_width, factor,
                    M, COLUMNS, PARTS, VEC,
                )  # fmt: skip
            else:
                # Few columns at a time: loads of single elements need many registers.
                for n in range(n0, n0 + COLUMNS, COLUMNS // SLICES):
                    expand_run(
                        y_rows, pool + b, v_rows, part_stride, rows, n, d_out, out_width, factor,
                        M, COLUMNS // SLICES, PARTS, 1,
                    )  # fmt: skip
        left = left & (own_slots != slot)
        slot = tl.max(tl.where(left, own_slots, -1), 0)


@triton.jit
def silu_mul_run(
    gate, up, hidden, b0, b1, v0, v1, part_stride, rows, n0, d_out, reach0, reach1, width0, width1,
    scaling0, scaling1,
    M: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Write silu(gate + scaling v B) * (up + scaling v B) to hidden, for the rows (M,) and the columns from n0.

    gate, up, hidden, v0 and v1 (M,) point to rows. reach is d_out, or 0 for a layer without an update. width columns
    belong to a segment.
    """
    d_out, reach0, reach1 = d_out // VEC * VEC, reach0 // VEC * VEC, reach1 // VEC * VEC
    first = n0 + tl.arange(0, COLUMNS // VEC) * VEC
    n = first[:, None] + tl.arange(0, VEC)[None, :]
    inside = rows[:, None, None] & (first < d_out)[None, :, None]
    g = tl.load(gate[:, None, None] + n[None, :, :], mask=inside, other=0).to(tl.float32)
    u = tl.load(up[:, None, None] + n[None, :, :], mask=inside, other=0).to(tl.float32)
    g += scaling0 * run_update(b0, v0, part_stride, rows, first, n, reach0, width0, M, PARTS)
    u += scaling1 * run_update(b1, v1, part_stride, rows, first, n, reach1, width1, M, PARTS)
    # Rounded where the layers and the activation, one after the other, would round.
    dtype = hidden.dtype.element_ty
    g, u = g.to(dtype).to(tl.float32), u.to(dtype).to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(dtype).to(tl.float32)
    tl.store(hidden[:, None, None] + n[None, :, :], (silu * u).to(dtype), mask=inside)


@triton.jit(do_not_specialize=[*_NUMBERS, "part_stride", "d_out", "stride"], do_not_specialize_on_alignment=["slots"])
def expand_silu_mul_runs(
    gate, up, hidden, stride, d_out, d_in, tokens, module0, module1,
    slots, pool, offset, rank, split, mixer, scaling, slot_count, v, v_width, part_stride,
    M: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, VEC: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add the updates to gate and up, and write silu(gate) * up to hidden. All adapters have segments of rank 1.

    A program is (block of M tokens, range of COLUMNS). gate and up (tokens, d_out) with a stride of rows; hidden
    (tokens, d_out), contiguous. Tokens without an adapter get the activation alone.
    """
    row, n0 = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * COLUMNS
    left = row < tokens
    own_slots = tl.load(slots + row, mask=left, other=-2)
    slot = tl.max(own_slots, 0)
    line = row.to(tl.int64)
    gate_rows, up_rows = gate + line * (stride // VEC * VEC), up + line * (stride // VEC * VEC)
    hidden_rows = hidden + line * (d_out // VEC * VEC)
    v0, v1 = v + line * v_width, v + (tokens + line) * v_width
    if OVERLAP:
        cuda.gdc_wait()
    while slot >= -1:
        rows = left & (own_slots == slot)
        cell0, cell1 = module0 * slot_count + slot, module1 * slot_count + slot
        at0, rank0, split0, mixer0 = read_cell(cell0, slot >= 0, offset, rank, split, mixer)
        at1, rank1, split1, mixer1 = read_cell(cell1, slot >= 0, offset, rank, split, mixer)
        there0, there1 = at0 >= 0, at1 >= 0
        scaling0 = tl.load(scaling + cell0, mask=there0, other=0)
        scaling1 = tl.load(scaling + cell1, mask=there1, other=0)
        # Other values of an absent layer may be anything: they must not divide by zero.
        width0, width1 = d_out // tl.where(there0, split0, 1), d_out // tl.where(there1, split1, 1)
        b0 = tl.where(there0, at0 + d_in + tl.where(mixer0 != 0, rank0 * rank0, 0), 0)
        b1 = tl.where(there1, at1 + d_in + tl.where(mixer1 != 0, rank1 * rank1, 0), 0)
        reach0, reach1 = tl.where(there0, d_out, 0), tl.where(there1, d_out, 0)
        if (VEC > 1) & (b0 % VEC == 0) & (b1 % VEC == 0) & (width0 % VEC == 0) & (width1 % VEC == 0):
            silu_mul_run(
                gate_rows, up_rows, hidden_rows, pool + b0 // VEC * VEC, pool + b1 // VEC * VEC, v0, v1,
                part_stride, rows, n0, d_out, reach0, reach1, width0, width1, scaling0, scaling1,
                M, COLUMNS, PARTS, VEC,
            )  # fmt: skip
        else:
            for n in range(n0, n0 + COLUMNS, COLUMNS // SLICES):
                silu_mul_run(
                    gate_rows, up_rows, hidden_rows, pool + b0, pool + b1, v0, v1, part_stride, rows, n,
                    d_out, reach0, reach1, width0, width1, scaling0, scaling1, M, COLUMNS // SLICES, PARTS, 1,
                )  # fmt: skip
        left = left & (own_slots != slot)
        slot = tl.max(tl.where(left, own_slots, -2), 0)
