"""The Triton kernel of gains and offsets: y = gain * y + offset, for tokens whose adapter has them.

It is a launch of its own after the updates, made only for batches that may have such an adapter. The kernels of updates
are the same with and without it. See `decode_kernels` for the words VEC and OVERLAP.
"""

# Triton's own language: its values have no Python type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from sera_kernels.decode_kernels import column_range, select_item

_NUMBERS = ["slot_count", *(f"{name}{i}" for name in ("width", "stride", "module") for i in range(4))]


@triton.jit
def scale_columns(y, gain, offset, n0, d_out, COLUMNS: tl.constexpr, VEC: tl.constexpr, OVERLAP: tl.constexpr):
    """Apply gain and offset to the columns from n0 of one token. y, gain, offset (d_out,)."""
    d_out = d_out // VEC * VEC
    n = n0 + tl.arange(0, COLUMNS)
    inside = n < d_out
    factor = tl.load(gain + n, mask=inside, other=0).to(tl.float32)
    addend = tl.load(offset + n, mask=inside, other=0).to(tl.float32)
    if OVERLAP:
        cuda.gdc_wait()
    before = tl.load(y + n, mask=inside, other=0).to(tl.float32)
    tl.store(y + n, (factor * before + addend).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["slots"])
def scale_and_shift(
    y0, y1, y2, y3, width0, width1, width2, width3, stride0, stride1, stride2, stride3,
    module0, module1, module2, module3, slots, pool, offset, vectors, slot_count,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Apply gains and offsets to up to four outputs. A program is (token, range of COLUMNS of an output).

    y (tokens, width) with a stride of rows. An unused output has width 0.
    """
    row, column = tl.program_id(0), tl.program_id(1)
    i, n0, d_out = column_range(column, width0, width1, width2, width3, COLUMNS)
    slot = tl.load(slots + row)
    cell = select_item(i, module0, module1, module2, module3) * slot_count + slot
    at = tl.load(vectors + cell, mask=slot >= 0, other=-1)
    if (tl.load(offset + cell, mask=slot >= 0, other=-1) >= 0) & (at >= 0):
        y = select_item(i, y0, y1, y2, y3)
        y += row.to(tl.int64) * (select_item(i, stride0, stride1, stride2, stride3) // VEC * VEC)
        if (at % VEC == 0) & (d_out % VEC == 0):
            gain = pool + at // VEC * VEC
            scale_columns(y, gain, gain + d_out // VEC * VEC, n0, d_out, COLUMNS, VEC, OVERLAP)
        else:
            gain = pool + at
            scale_columns(y, gain, gain + d_out, n0, d_out, COLUMNS, 1, OVERLAP)
    elif OVERLAP:
        cuda.gdc_wait()
