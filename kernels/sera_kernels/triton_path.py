"""The grouped operation on a GPU: one Triton launch for all layers that share an input, whatever adapters are in it.

A program updates a range of columns of one layer's output, for one token or for a tile of tokens of one adapter. It
reduces, mixes and expands by itself: the reduced vector is small, and cheaper made again by each program than handed
over. No element of an output belongs to two programs, so nothing is atomic.

The grid follows from shapes alone and the host reads nothing, so a CUDA graph that holds the launch may be replayed
over other slots, tables and factors. There is no gradient: training uses the layers' autograd.

Needs Triton 3.4 or newer; runs without a GPU if TRITON_INTERPRET=1 was set before this module's import.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sera_kernels.launches import Launch, choose_launch
from sera_kernels.operands import AdapterBatch, AdapterTables
from sera_kernels.triton_tiles import update_tile, update_token

OUTPUTS_A_LAUNCH = 4
"""Layers of one launch; more that share an input take another launch."""

SPARE_ROWS = 64
"""Rows of programs beyond those that full tiles need; tiles beyond them are taken in turn."""

# Arguments whose values may change without another compilation.
_NUMBERS = ["x_stride", "d_in", "tokens", "slot_count"]
_NUMBERS += [f"{name}{i}" for name in ("module", "width", "stride") for i in range(OUTPUTS_A_LAUNCH)]


def grouped_sera_triton(
    x: Tensor,
    outputs: Sequence[Tensor],
    modules: Sequence[int],
    batch: AdapterBatch,
    pool: Tensor,
    tables: AdapterTables,
) -> None:
    """`grouped_sera` for CUDA tensors; rows of x and of each output may lie further apart than they are wide."""
    for i in range(0, len(outputs), OUTPUTS_A_LAUNCH):
        some = slice(i, i + OUTPUTS_A_LAUNCH)
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
    """One launch with the given parameters, for at most `OUTPUTS_A_LAUNCH` outputs."""
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
    unused = OUTPUTS_A_LAUNCH - len(outputs)
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
            # The interpreter's tl.dot takes bfloat16 for integers.
            WIDEN=x.dtype == torch.bfloat16 and not isinstance(grouped_kernel, triton.JITFunction),
            # Factors are exact in TF32; of a reduced vector it keeps more bits than float16 or bfloat16 would.
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            maxnreg=launch.max_registers,
            # As it always was; Triton 3.9 warns of another default to come.
            enable_fp_fusion=True,
        )  # fmt: skip


def _vector(x: Tensor, outputs: Sequence[Tensor], pool: Tensor) -> int:
    """Elements of a 16-byte access if every row allows it, else 1; the kernel itself looks at the adapters' places."""
    elements = 16 // x.element_size()
    rows = all(
        t.data_ptr() % 16 == 0 and t.stride(0) % elements == 0 and t.shape[1] % elements == 0 for t in (x, *outputs)
    )
    return elements if rows and pool.data_ptr() % 16 == 0 else 1


@triton.jit
def pick(column, end0, end1, end2, item0, item1, item2, item3):
    """The item of the output that `column` falls into."""
    first, second = tl.where(column >= end0, item1, item0), tl.where(column >= end2, item3, item2)
    return tl.where(column >= end1, second, first)


@triton.jit
def fits_vector(d_in, at, rank, split, mixer, VEC: tl.constexpr):
    """Whether all parts of an adapter's factors, and of x by segments, begin at multiples of VEC elements."""
    segments = (rank == split) | (rank // split % VEC == 0)
    return (at % VEC == 0) & (d_in // split % VEC == 0) & segments & ((mixer == 0) | (rank % VEC == 0))


@triton.jit
def ranks_of(n0, d_out, rank, split, COLUMNS: tl.constexpr):
    """How many ranks the segments of a range of columns have."""
    out_width = d_out // split
    return ((tl.minimum(n0 + COLUMNS, d_out) - 1) // out_width - n0 // out_width + 1) * (rank // split)


@triton.jit
def token_of_any_size(
    x, y, pool, n0, d_in, d_out, at, rank, split, mixer, scaling,
    COLUMNS: tl.constexpr, ELEMENTS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """`update_token` in blocks that fit the adapter: few ranks shall not pay for many."""
    if fits_vector(d_in, at, rank, split, mixer, VEC):
        if tl.where(mixer != 0, rank, ranks_of(n0, d_out, rank, split, COLUMNS)) <= 16:
            update_token(x, y, pool, n0, d_in, d_out, at, rank, split, mixer, scaling, COLUMNS, ELEMENTS, 16, 16, VEC)
        else:
            update_token(x, y, pool, n0, d_in, d_out, at, rank, split, mixer, scaling, COLUMNS, ELEMENTS, 32, 64, VEC)
    else:
        update_token(x, y, pool, n0, d_in, d_out, at, rank, split, mixer, scaling, COLUMNS, ELEMENTS // 2, 16, 64, 1)


@triton.jit
def tile_of_any_size(
    x_rows, y_rows, is_row, pool, n0, d_in, d_out, at, rank, split, mixer, scaling,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    VEC: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`update_tile` in blocks that fit the adapter; y is written, and so rounded, once for every MANY ranks."""
    NARROW: tl.constexpr = BLOCK_N // 2
    # Without a matrix unit, wide blocks do not fit registers; and float32 loses little by more roundings.
    MANY: tl.constexpr = 64 if PRECISION == "ieee" else 256
    if fits_vector(d_in, at, rank, split, mixer, VEC):
        if ranks_of(n0, d_out, rank, split, COLUMNS) <= 64:
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
    """Programs (row, range of columns): the row-th token, or every so-many-th tile from the row-th on.

    `slots` is in the order of tokens where BLOCK_M is 1, else sorted; tile_first and tile_ordinal are
    `AdapterBatch.tiles`, order is that of `AdapterBatch.sorted_slots`.
    """
    # Outputs that are not there have width 0.
    end0 = tl.cdiv(width0, COLUMNS)
    end1 = end0 + tl.cdiv(width1, COLUMNS)
    end2 = end1 + tl.cdiv(width2, COLUMNS)
    columns = end2 + tl.cdiv(width3, COLUMNS)
    column, row = tl.program_id(0) % columns, tl.program_id(0) // columns
    y = pick(column, end0, end1, end2, y0, y1, y2, y3)
    module = pick(column, end0, end1, end2, module0, module1, module2, module3)
    d_out = pick(column, end0, end1, end2, width0, width1, width2, width3)
    y_stride = pick(column, end0, end1, end2, stride0, stride1, stride2, stride3) // VEC * VEC
    n0 = (column - pick(column, end0, end1, end2, 0, end0, end1, end2)) * COLUMNS
    x_stride = x_stride // VEC * VEC
    if BLOCK_M == 1:
        slot = tl.load(slots + row)
        cell = module * slot_count + slot
        # All at once, not one after the other.
        at = tl.load(offset + cell, mask=slot >= 0, other=-1)
        adapter_rank, adapter_split = tl.load(rank + cell, mask=slot >= 0), tl.load(split + cell, mask=slot >= 0)
        has_mixer, factor = tl.load(mixer + cell, mask=slot >= 0), tl.load(scaling + cell, mask=slot >= 0)
        if at >= 0:
            token_of_any_size(
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
                    token_of_any_size(
                        x + only * x_stride, y + only * y_stride, pool, n0, d_in, d_out,
                        at, adapter_rank, adapter_split, has_mixer, factor, COLUMNS, ELEMENTS, VEC,
                    )  # fmt: skip
                else:
                    tile_of_any_size(
                        x + token * x_stride, y + token * y_stride, is_row, pool, n0, d_in, d_out,
                        at, adapter_rank, adapter_split, has_mixer, factor,
                        COLUMNS, BLOCK_M, BLOCK_N, BLOCK_R, BLOCK_K, VEC, WIDEN, PRECISION,
                    )  # fmt: skip
