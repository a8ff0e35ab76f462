"""Triton kernels for decoding: few tokens, each with an adapter of its own.

The update of a layer has two phases. The first computes v = (x A) C once for each (token, layer) and writes v in
float32 to a workspace. The second adds scaling * v B to wide ranges of columns of the output.

    reduce_mix       v, for segments of rank 1
    reduce_parts     parts of the sums u = x A, for segments of higher ranks: A is large, so many programs share it
    mix_parts        v = (the sum of the parts) C
    expand           y += scaling * v B

Words of this file:

* Cell: what the tables hold about one (layer, slot). Kernels of this file take the cells of the tokens' own slots, by
  (layer, token): to look a token's slot up first would be one more load that every other one waits for.
* VEC: the number of elements of a 16-byte access if all rows allow such accesses, else 1. Each adapter's factors are
  checked on the device. `x // VEC * VEC` equals x then, and tells the compiler that x is a multiple of VEC.
* OVERLAP: a kernel may start while the kernel before it still runs (programmatic dependent launch). A kernel of the
  first phase waits for that kernel first, and lets the next kernel start after that. So whatever was written before the
  first phase is complete when `expand` starts. `expand` reads cells and B at once, and waits before it reads v
  and y. Every program waits, also one with nothing to do: kernels after this one rely on the end of all before it.
"""

# Triton's own language: its values have no Python type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

# Elements of C that a program holds at a time. At least `MOST_RANK`: a column of C.
MIXER_ELEMENTS = tl.constexpr(4096)

# Numbers and alignments that need no kernel of their own.
_NUMBERS = ["x_stride", "d_in", "tokens", "slot_count", "v_width", "module0", "module1", "module2", "module3"]


@triton.jit
def select_item(i, item0, item1, item2, item3):
    """Return item i."""
    return tl.where(i >= 2, tl.where(i == 3, item3, item2), tl.where(i == 1, item1, item0))


@triton.jit
def column_range(column, width0, width1, width2, width3, COLUMNS: tl.constexpr):
    """Return which output the range `column` of all outputs' ranges belongs to, its first column, and d_out."""
    end0 = tl.cdiv(width0, COLUMNS)
    end1 = end0 + tl.cdiv(width1, COLUMNS)
    end2 = end1 + tl.cdiv(width2, COLUMNS)
    i = (column >= end0).to(tl.int32) + (column >= end1).to(tl.int32) + (column >= end2).to(tl.int32)
    return i, (column - select_item(i, 0, end0, end1, end2)) * COLUMNS, select_item(i, width0, width1, width2, width3)


@triton.jit
def read_cell(cell, present, offset, rank, split, mixer):
    """Return offset, rank, split and mixer of a cell. These loads do not wait for each other."""
    at = tl.load(offset + cell, mask=present, other=-1)
    return (
        at,
        tl.load(rank + cell, mask=present, other=1),
        tl.load(split + cell, mask=present, other=1),
        tl.load(mixer + cell, mask=present, other=0),
    )


@triton.jit
def fits_vector(at, d_in, rank, split, mixer, VEC: tl.constexpr):
    """Return whether A, each segment of x, each row of C, and B start at multiples of VEC elements."""
    return (at % VEC == 0) & (d_in // split % VEC == 0) & ((mixer == 0) | (rank % VEC == 0))


@triton.jit
def mix(u, c, rank, out, R: tl.constexpr, VEC: tl.constexpr):
    """Write u C to out. u (R,), C (rank, rank). R is at most MIXER_ELEMENTS."""
    COLUMNS: tl.constexpr = R if R * R <= MIXER_ELEMENTS else MIXER_ELEMENTS // R
    stride = rank // VEC * VEC
    r = tl.arange(0, R)
    for q0 in range(0, rank, COLUMNS):
        q = q0 + tl.arange(0, COLUMNS)
        inside = (r < rank)[:, None] & (q < stride)[None, :]
        tile = tl.load(c + r[:, None] * stride + q[None, :], mask=inside, other=0).to(tl.float32)
        tl.store(out + q, tl.sum(u[:, None] * tile, 0), mask=q < rank)


@triton.jit
def reduce_mix_token(x, a, d_in, rank, mixer, out, R: tl.constexpr, K: tl.constexpr, VEC: tl.constexpr):
    """Write v of one token, if segment_rank is 1. x (d_in,). a points to A, C follows A."""
    SMALL: tl.constexpr = R * R <= MIXER_ELEMENTS
    width = d_in // rank // VEC * VEC
    r = tl.arange(0, R)
    c = a + d_in // VEC * VEC
    if SMALL:
        # Loaded before the sums, so that the load runs beside theirs.
        stride = rank // VEC * VEC
        mixed = r < tl.where(mixer != 0, rank, 0)
        tile = tl.load(c + r[:, None] * stride + r[None, :], mask=mixed[:, None] & (r < stride)[None, :], other=0)
    products = tl.zeros((R, K), tl.float32)
    for k0 in range(0, width, K):
        k = k0 + tl.arange(0, K)
        at = r[:, None] * width + k[None, :]
        inside = (r < rank)[:, None] & (k < width)[None, :]
        values = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        products += values * tl.load(a + at, mask=inside, other=0).to(tl.float32)
    u = tl.sum(products, 1)
    if mixer != 0:
        if SMALL:
            tl.store(out + r, tl.sum(u[:, None] * tile.to(tl.float32), 0), mask=r < rank)
        else:
            mix(u, c, rank, out, R, VEC)
    else:
        tl.store(out + r, u, mask=r < rank)


@triton.jit(do_not_specialize=_NUMBERS)
def reduce_mix(
    x, x_stride, d_in, tokens, module0, module1, module2, module3,
    pool, offset, rank, split, mixer, v, v_width,
    R: tl.constexpr, K: tl.constexpr, VEC: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write v of every token and layer whose adapter has segments of rank 1. A program is (token, layer).

    x (tokens, d_in), v (layers, tokens, v_width) float32. Other rows of v stay as they are.
    """
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    row, i = tl.program_id(0), tl.program_id(1)
    cell = select_item(i, module0, module1, module2, module3) * tokens + row
    at, own_rank, own_split, has_mixer = read_cell(cell, True, offset, rank, split, mixer)
    if (at >= 0) & (own_rank == own_split):
        x_row = x + row.to(tl.int64) * (x_stride // VEC * VEC)
        out = v + (i * tokens + row).to(tl.int64) * v_width
        if fits_vector(at, d_in, own_rank, own_split, has_mixer, VEC):
            reduce_mix_token(x_row, pool + at // VEC * VEC, d_in, own_rank, has_mixer, out, R, K, VEC)
        else:
            reduce_mix_token(x_row, pool + at, d_in, own_rank, has_mixer, out, R, K, 1)


@triton.jit
def reduce_part(
    x, a, k_begin, k_end, width, rank, segment_rank, out,
    WHOLE: tl.constexpr, R: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the sums u over the inputs [k_begin, k_end) of every segment. `width` inputs belong to a segment.

    LANES neighbours in a row of A are read at once. They belong to one segment, and share its inputs.
    """
    G: tl.constexpr = R // LANES
    segment_rank = segment_rank // LANES * LANES
    # Single elements cannot be copied asynchronously.
    STAGES: tl.constexpr = 4 if LANES > 1 else 1
    # Threads side by side read A side by side: along a row if there is one segment, else from row to row.
    if WHOLE:
        g, k_range = tl.arange(0, G)[None, :], tl.arange(0, K)[:, None]
        products = tl.zeros((K, G, LANES), tl.float32)
    else:
        g, k_range = tl.arange(0, G)[:, None], tl.arange(0, K)[None, :]
        products = tl.zeros((G, K, LANES), tl.float32)
    first_rank = g * LANES
    segment = first_rank // segment_rank
    j = first_rank - segment * segment_rank
    lane = tl.arange(0, LANES)[None, None, :]
    there = first_rank < rank
    at = segment * width + k_begin + k_range
    values = tl.load(x + at, mask=there & (k_begin + k_range < k_end), other=0)
    # Factors of several rounds are on their way at a time, and inputs of two.
    for k0 in tl.range(k_begin, k_end, K, num_stages=STAGES):
        k = k0 + k_range
        at = segment * width + k
        inside = (k < k_end) & there
        factors = tl.load(a + (at * segment_rank + j)[:, :, None] + lane, mask=inside[:, :, None], other=0)
        following = tl.load(x + at + K, mask=(k + K < k_end) & there, other=0)
        products += values.to(tl.float32)[:, :, None] * factors.to(tl.float32)
        values = following
    u = tl.reshape(tl.sum(products, 0 if WHOLE else 1), (R,))
    r = tl.arange(0, R)
    tl.store(out + r, u, mask=r < rank)


@triton.jit(do_not_specialize=_NUMBERS)
def reduce_parts(
    x, x_stride, d_in, tokens, module0, module1, module2, module3,
    pool, offset, rank, split, mixer, sums, v_width,
    WHOLE: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    VEC: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write a part of the sums u = x A, for segments of a rank above 1: one segment if WHOLE, else several.

    A program is (token, layer, part of the inputs of each segment). sums (parts, layers, tokens, v_width) float32.
    """
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    row, i, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cell = select_item(i, module0, module1, module2, module3) * tokens + row
    at, own_rank, own_split, _ = read_cell(cell, True, offset, rank, split, mixer)
    if (at >= 0) & (own_rank > own_split) & ((own_split == 1) == WHOLE):
        segment_rank, width = own_rank // own_split, d_in // own_split
        step = tl.cdiv(width, tl.num_programs(2))
        begin, end = part * step, tl.minimum(part * step + step, width)
        x_row = x + row.to(tl.int64) * x_stride
        out = sums + ((part * tl.num_programs(1) + i) * tokens + row).to(tl.int64) * v_width
        FEW: tl.constexpr = 4 if VEC == 8 else 2 if VEC == 4 else 1
        if (at % VEC == 0) & (segment_rank % VEC == 0):
            a = pool + at // VEC * VEC
            reduce_part(x_row, a, begin, end, width, own_rank, segment_rank, out, WHOLE, R, K, VEC)
        elif (at % FEW == 0) & (segment_rank % FEW == 0):
            a = pool + at // FEW * FEW
            reduce_part(x_row, a, begin, end, width, own_rank, segment_rank, out, WHOLE, R, K, FEW)
        else:
            # Few inputs at a time: loads of single elements need many registers.
            INPUTS: tl.constexpr = K // 4 if K >= 4 else K
            reduce_part(x_row, pool + at, begin, end, width, own_rank, segment_rank, out, WHOLE, R, INPUTS, 1)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["slots"])
def mix_parts(
    d_in, tokens, module0, module1, module2, module3,
    slots, pool, offset, rank, split, mixer, slot_count, sums, v, v_width, BY_TOKEN: tl.constexpr,
    PARTS: tl.constexpr, SINGLE: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write v = (the sum of all parts of u) C. A program is (token, layer). SINGLE: also for segments of rank 1.

    BY_TOKEN: the cells are by (layer, token), and `slot_count` is the number of tokens. Else they are the tables.
    sums (PARTS, layers, tokens, v_width), v (layers, tokens, v_width), float32.
    """
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    row, i = tl.program_id(0), tl.program_id(1)
    slot = row if BY_TOKEN else tl.load(slots + row)
    cell = select_item(i, module0, module1, module2, module3) * slot_count + slot
    at, own_rank, own_split, has_mixer = read_cell(cell, slot >= 0, offset, rank, split, mixer)
    if (at >= 0) & (SINGLE | (own_rank > own_split)):
        r = tl.arange(0, R)
        line = (i * tokens + row).to(tl.int64)
        lines = line + tl.arange(0, PARTS).to(tl.int64) * tl.num_programs(1) * tokens
        u = tl.sum(tl.load(sums + lines[:, None] * v_width + r[None, :], mask=(r < own_rank)[None, :], other=0), 0)
        out = v + line * v_width
        c = at + d_in * (own_rank // own_split)
        if has_mixer == 0:
            tl.store(out + r, u, mask=r < own_rank)
        elif (c % VEC == 0) & (own_rank % VEC == 0):
            mix(u, pool + c // VEC * VEC, own_rank, out, R, VEC)
        else:
            mix(u, pool + c, own_rank, out, R, 1)


@triton.jit
def b_offset(at, d_in, segment_rank, rank, mixer):
    """Return where B starts: after A, and after C if there is one."""
    return at + d_in * segment_rank + tl.where(mixer != 0, rank * rank, 0)


@triton.jit
def expanded(row, b, v, first, n, d_out, out_width, segment_rank, SINGLE: tl.constexpr, VEC: tl.constexpr):
    """Return v B for the columns n, whose first row of B was loaded already. Zero where first >= d_out.

    n (columns / VEC, VEC) are groups of neighbours in one segment, and first (columns / VEC,) are their first columns.
    """
    # Rows of B that are loaded together. Rows of single elements would need many registers, which wide rows then lack.
    ROWS: tl.constexpr = 8 if VEC > 1 else 1
    own = v + first // out_width * segment_rank
    update = tl.load(own, mask=first < d_out, other=0)[:, None] * row.to(tl.float32)
    if not SINGLE:
        for j0 in range(1, segment_rank, ROWS):
            for j1 in tl.static_range(ROWS):
                j = j0 + j1
                there = first < tl.where(j < segment_rank, d_out, 0)
                row = tl.load(b + j * d_out + n, mask=there[:, None], other=0)
                update += tl.load(own + j, mask=there, other=0)[:, None] * row.to(tl.float32)
    return update


@triton.jit
def expand_columns(
    y, b, v, n0, d_out, out_width, segment_rank, scaling,
    COLUMNS: tl.constexpr, SINGLE: tl.constexpr, ADD: tl.constexpr, VEC: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write scaling * v B, after ADD plus y, to the columns from n0 of one token. y (d_out,).

    out_width columns belong to a segment.
    """
    d_out = d_out // VEC * VEC
    first = n0 + tl.arange(0, COLUMNS // VEC) * VEC
    n = first[:, None] + tl.arange(0, VEC)[None, :]
    inside = (first < d_out)[:, None]
    row = tl.load(b + n, mask=inside, other=0)
    if OVERLAP:
        cuda.gdc_wait()
    if ADD:
        before = tl.load(y + n, mask=inside, other=0).to(tl.float32)
    update = scaling * expanded(row, b, v, first, n, d_out, out_width, segment_rank, SINGLE, VEC)
    if ADD:
        update += before
    tl.store(y + n, update.to(y.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[*_NUMBERS, *(f"{name}{i}" for name in ("width", "stride") for i in range(4))],
)
def expand(
    y0, y1, y2, y3, width0, width1, width2, width3, stride0, stride1, stride2, stride3,
    d_in, tokens, module0, module1, module2, module3,
    pool, offset, rank, split, mixer, scaling, v, v_width,
    COLUMNS: tl.constexpr, SINGLE: tl.constexpr, ADD: tl.constexpr, VEC: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write the updates of all tokens to up to four outputs. A program is (token, range of COLUMNS of an output).

    ADD: y += update, and tokens without an update keep their y. Else y = update, which is 0 for such tokens.
    y (tokens, width) with a stride of rows. An unused output has width 0. SINGLE: all segments have rank 1.
    """
    row, column = tl.program_id(0), tl.program_id(1)
    i, n0, d_out = column_range(column, width0, width1, width2, width3, COLUMNS)
    cell = select_item(i, module0, module1, module2, module3) * tokens + row
    at, own_rank, own_split, has_mixer = read_cell(cell, True, offset, rank, split, mixer)
    factor = tl.load(scaling + cell)
    y = select_item(i, y0, y1, y2, y3)
    y += row.to(tl.int64) * (select_item(i, stride0, stride1, stride2, stride3) // VEC * VEC)
    if at >= 0:
        out_width = d_out // own_split
        segment_rank = 1 if SINGLE else own_rank // own_split
        b = b_offset(at, d_in, segment_rank, own_rank, has_mixer)
        own_v = v + (i * tokens + row).to(tl.int64) * v_width
        if (b % VEC == 0) & (out_width % VEC == 0):
            expand_columns(
                y, pool + b // VEC * VEC, own_v, n0, d_out, out_width, segment_rank, factor,
                COLUMNS, SINGLE, ADD, VEC, OVERLAP,
            )  # fmt: skip
        else:
            expand_columns(
                y, pool + b, own_v, n0, d_out, out_width, segment_rank, factor, COLUMNS, SINGLE, ADD, 1, OVERLAP
            )
    else:
        if OVERLAP:
            cuda.gdc_wait()
        if not ADD:
            n = n0 + tl.arange(0, COLUMNS)
            width = d_out // VEC * VEC
            tl.store(y + n, tl.zeros((COLUMNS,), y.dtype.element_ty), mask=n < width)
