"""The grouped operation on a GPU, in two phases of Triton kernels.

`reduce_updates` computes v = (x A) C for every token and layer, into a workspace. `expand_updates` adds scaling * v B
to the outputs. For batches that may have a gain and an offset, it then applies these in a further launch. The first
phase needs x alone, so a caller may run it on another stream, beside the base layers.

Up to `PREFILL_TOKENS`, each token has its own programs (`decode_kernels`), which read copies of the tables' cells
(`cells`). With more tokens, blocks of neighbours share programs if all segments have rank 1 (`run_kernels`). Tokens of
other adapters are sorted into tiles of one adapter, for the matrix unit (`prefill_kernels`). Every sum is in float32
and has a fixed order: nothing is atomic, and no two programs write the same element.

Launches follow from shapes alone, and from the kinds of resident adapters (`ShapeClasses`). The host reads no values of
the device. A CUDA graph that holds the launches can therefore be replayed with other slots, tables and factors, as
long as the kinds are among those of its capture. There is no gradient: training uses the layers' autograd.

Triton 3.6 or newer is required. Without a GPU, the kernels run if TRITON_INTERPRET=1 was set before this module is
imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from sera_kernels.cells import Cells, cells_of
from sera_kernels.decode_kernels import expand, mix_parts, reduce_mix, reduce_parts
from sera_kernels.launches import Launch, choose_launch, vector_elements
from sera_kernels.operands import AdapterBatch, AdapterTables
from sera_kernels.prefill_kernels import expand_tiles, reduce_tiles
from sera_kernels.run_kernels import RUN_SHARES, expand_runs, reduce_runs
from sera_kernels.shape_classes import MOST_SUMS_BYTES, OUTPUTS_PER_LAUNCH, ShapeClasses
from sera_kernels.vector_kernels import scale_and_shift

PREFILL_TOKENS = 256
"""With more tokens, blocks and tiles of tokens are computed."""

RUN_BUCKET = 256
"""The largest rank bucket of segments of rank 1 that blocks of neighbours are computed for. Others take tiles."""

RUN_ROWS = 2048
"""Layers times tokens at most of a launch of small blocks. More have enough programs for a GPU."""

SMALL_RUN_TOKENS = 4
"""Tokens of a small block: `RUN_SHARES`, so that each of a step's decodes has a program of its own."""

SMALL_RUN_INPUTS = 64
"""Inputs of each segment that a small block's program multiplies at a time, of 16 bits."""

RUN_PARTS = 4
"""Parts of v for small blocks: programs that share a block's rounds. They take less memory than v for `MOST_RANK`."""

EXPAND_BYTES = 16384
"""Bytes of an output that a block's program of the second phase updates; of small blocks, a `RUN_PARTS`th of them."""

EXPAND_WIDTH = 2048
"""Bytes of a row among them."""

MOST_HELD = 1 << 14
"""Factors that a program of the first phase holds at a time, at most, where whole vectors would be more."""

PART_ELEMENTS = 1 << 14
"""Elements of A that one program reads, if A is read in parts."""

MOST_PARTS = 16
"""Parts of A at most. Fewer where their sums would take more than `MOST_SUMS_BYTES`, or too many registers."""

SPARE_ROWS = 64
"""Rows of programs in addition to the rows that full tiles need. With still more tiles, programs take several tiles."""

TILE_TOKENS = 64
"""Tokens of a tile. From 64, the matrix unit of sm_90 multiplies at its full rate."""

TILE_WIDTH = 64
"""Inputs and ranks that a tile's program multiplies at a time, and half of its columns. In float32, half of each."""

SCALED_COLUMNS = 1024
"""Columns of an output that a program applies a gain and an offset to."""

INTERPRETED = not isinstance(expand, triton.JITFunction)


@dataclass(frozen=True)
class Workspace:
    """The first phase's results for a group of layers, and what they were computed from.

    Attributes:
        v: float32 (layers, tokens, rank bucket). Only the ranks of a token's own adapter have a meaning.
        d_in: Width of the layers' input.
        modules: The layers' rows in `tables`.
        batch: The slot of each token.
        pool: (elements,), the factors.
        tables: The offset and the shape of each adapter's factors.
        classes: The kinds of shapes that the first phase was launched for.
        consecutive: Both phases are launched one after the other on one stream.
        parts: For adapters that are computed in blocks of neighbours, `v` is the first of so many parts, which follow
            each other in memory and are to be added.
    """

    v: Tensor
    d_in: int
    modules: tuple[int, ...]
    batch: AdapterBatch
    pool: Tensor
    tables: AdapterTables
    classes: ShapeClasses
    consecutive: bool = True
    parts: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """Options of every launch. OVERLAP: programmatic dependent launch, if the device has it."""
        overlap = self.consecutive and _can_overlap(self.v.device)
        # Fusion is the default so far. Triton 3.9 warns that the default will change.
        return {"OVERLAP": overlap, "enable_fp_fusion": True} | ({"launch_pdl": True} if overlap else {})

    @property
    def layers(self) -> tuple[int, ...]:
        """`d_in`, the number of tokens, and `modules` padded to `OUTPUTS_PER_LAUNCH`, as kernels take them."""
        unused = OUTPUTS_PER_LAUNCH - len(self.modules)
        return (self.d_in, self.v.shape[1], *self.modules, *[0] * unused)

    @property
    def shapes(self) -> tuple[Tensor, ...]:
        """The pool, and the tables of the factors' places and shapes, as kernels take them."""
        tables = self.tables
        return (self.pool, tables.offset, tables.rank, tables.split, tables.mixer)

    @property
    def slots(self) -> int:
        """Number of slots of the tables."""
        return self.tables.offset.shape[1]

    @property
    def cells(self) -> Cells:
        """What the tables hold about each token's own adapter. For few tokens: they take more than the tables."""
        return cells_of(self.batch, self.tables)

    @property
    def own_shapes(self) -> tuple[Tensor, ...]:
        """The pool, and `cells` but for the scaling, as kernels take them."""
        return (self.pool, *self.cells[:4])

    @property
    def runs(self) -> bool:
        """Whether adapters with segments of rank 1 are computed in blocks of neighbours."""
        return _has_runs(self.v.shape[1], self.classes)

    @property
    def v_parts(self) -> tuple[Tensor, int, int]:
        """`v`, the length of its rows, and the elements between two parts, as kernels of blocks take them."""
        return (self.v, self.v.shape[2], self.v.numel())

    @property
    def has_tiles(self) -> bool:
        """Whether adapters are computed in tiles: those that blocks of neighbours leave."""
        others = self.classes.segmented or self.classes.whole
        return self.v.shape[1] > PREFILL_TOKENS and (others > 0 or not self.runs)

    @property
    def tiles(self) -> tuple[Tensor, ...]:
        """The tiles of the batch, as kernels take them."""
        return (*self.batch.sorted_slots, *self.batch.tiles(TILE_TOKENS))

    @property
    def tile_rows(self) -> int:
        """Rows of programs for all tiles."""
        return -(-self.v.shape[1] // TILE_TOKENS) + SPARE_ROWS


def grouped_sera_triton(
    x: Tensor,
    outputs: Sequence[Tensor],
    modules: Sequence[int],
    batch: AdapterBatch,
    pool: Tensor,
    tables: AdapterTables,
    launch: Launch | None = None,
) -> None:
    """Run `grouped_sera` on CUDA tensors. The row stride of x and of each output may exceed the row's width.

    `launch` replaces the launch parameters from `launches.json`.
    """
    for i in range(0, len(outputs), OUTPUTS_PER_LAUNCH):
        some = slice(i, i + OUTPUTS_PER_LAUNCH)
        workspace = reduce_updates(x, modules[some], batch, pool, tables, launch=launch)
        if workspace is not None:
            expand_updates(workspace, outputs[some], launch)


def reduce_updates(
    x: Tensor,
    modules: Sequence[int],
    batch: AdapterBatch,
    pool: Tensor,
    tables: AdapterTables,
    *,
    consecutive: bool = True,
    launch: Launch | None = None,
) -> Workspace | None:
    """Run the first phase for up to `OUTPUTS_PER_LAUNCH` layers, and return what the second phase needs.

    The workspace's memory belongs to the current stream.

    Args:
        x: (tokens, d_in). Rows may be farther apart than their width.
        modules: The layers' rows in `tables`.
        batch: The slot of each token.
        pool: (elements,), of x's dtype.
        tables: The offset and the shape of each adapter's factors.
        consecutive: The second phase is the next launch on this stream. False if it runs on another stream, after an
            event, or if other kernels are launched in between.
        launch: Launch parameters, instead of those from `launches.json`.

    Returns:
        None if there is nothing to add: no tokens, or no resident adapter.
    """
    classes = batch.classes_in(tables)
    tokens, d_in = x.shape
    if tokens == 0 or classes.width == 0 or not modules:
        return None
    launch = launch or choose_launch(x.dtype, x.device)
    parts = _run_parts(len(modules), tokens, classes)
    v = _buffer(x.device, parts * len(modules), tokens, classes.width)[: len(modules)]
    workspace = Workspace(v, d_in, tuple(modules), batch, pool, tables, classes, consecutive, parts)
    with torch.cuda.device_of(x):
        if workspace.runs:
            _reduce_runs(x, workspace, launch)
        if workspace.has_tiles:
            _reduce_tiles(x, workspace)
        if tokens <= PREFILL_TOKENS:
            if classes.single:
                _reduce_mix(x, workspace, launch)
            if classes.segmented or classes.whole:
                _reduce_in_parts(x, workspace, launch)
    return workspace


def expand_updates(workspace: Workspace, outputs: Sequence[Tensor], launch: Launch | None = None) -> None:
    """Run the second phase: add the updates of all tokens, in place, to the outputs of the workspace's layers.

    Gains and offsets are applied too.

    Args:
        workspace: The result of `reduce_updates`.
        outputs: One (tokens, d_out) tensor for each layer. Rows may be farther apart than their width.
        launch: Launch parameters of decoding, instead of those from `launches.json`.
    """
    _expand(workspace, outputs, launch, add=True)
    if workspace.classes.vectors:
        _scale_and_shift(workspace, outputs)


def updates_of(
    x: Tensor,
    widths: Sequence[int],
    modules: Sequence[int],
    batch: AdapterBatch,
    pool: Tensor,
    tables: AdapterTables,
    launch: Launch | None = None,
) -> list[Tensor] | None:
    """Run both phases for up to `OUTPUTS_PER_LAUNCH` layers, and return the updates instead of adding them.

    A caller may run this on another stream, beside the base layers.

    Args:
        x: (tokens, d_in), at most `PREFILL_TOKENS`. Rows may be farther apart than their width.
        widths: d_out of each layer.
        modules: The layers' rows in `tables`.
        batch: The slot of each token. No adapter in it has a gain or an offset, which apply to complete outputs.
        pool: (elements,), of x's dtype.
        tables: The offset and the shape of each adapter's factors.
        launch: Launch parameters, instead of those from `launches.json`.

    Returns:
        One (tokens, d_out) tensor for each layer, of x's dtype: views of one tensor, 0 where a token has no update.
        None if there is nothing to add: no tokens, or no resident adapter.
    """
    workspace = reduce_updates(x, modules, batch, pool, tables, consecutive=False, launch=launch)
    if workspace is None:
        return None
    updates = list(x.new_empty(len(x), sum(widths)).split(list(widths), dim=1))
    _expand(workspace, updates, launch, add=False)
    return updates


def _expand(workspace: Workspace, outputs: Sequence[Tensor], launch: Launch | None, *, add: bool) -> None:
    """Add the updates of all tokens to the outputs, or write them."""
    tokens, pool, classes = workspace.v.shape[1], workspace.pool, workspace.classes
    single = not (classes.segmented or classes.whole)
    widths, rows = _rows(outputs)
    shapes = (*workspace.shapes, workspace.tables.scaling, workspace.slots, workspace.v, workspace.v.shape[2])
    vector = vector_elements(*outputs, pool=pool)
    with torch.cuda.device_of(pool):
        if tokens <= PREFILL_TOKENS:
            launch = launch or choose_launch(pool.dtype, pool.device)
            expand[(tokens, sum(-(-width // launch.expand_columns) for width in widths))](
                *rows, *workspace.layers, *workspace.own_shapes, workspace.cells.scaling,
                workspace.v, workspace.v.shape[2],
                COLUMNS=launch.expand_columns, SINGLE=single, ADD=add, VEC=vector,
                num_warps=launch.expand_warps, **workspace.options,
            )  # fmt: skip
            return
        if workspace.runs:
            columns = EXPAND_WIDTH // pool.element_size()
            block = EXPAND_BYTES // EXPAND_WIDTH // workspace.parts
            expand_runs[(-(-tokens // block), sum(-(-width // columns) for width in widths))](
                *rows, *workspace.layers, workspace.batch.token_slots, *shapes[:-2], *workspace.v_parts,
                M=block, COLUMNS=columns, PARTS=workspace.parts, VEC=vector, num_warps=4, **workspace.options,
            )  # fmt: skip
        if workspace.has_tiles:
            columns = 4 * TILE_WIDTH // pool.element_size()
            ranks = 16 if classes.width == 16 or pool.dtype == torch.float32 else 32
            expand_tiles[(workspace.tile_rows, sum(-(-width // columns) for width in widths))](
                *rows, *workspace.layers, *workspace.tiles, *shapes, SINGLE=not workspace.runs,
                M=TILE_TOKENS, COLUMNS=columns, Q=ranks, VEC=vector, PRECISION=_precision(pool.dtype),
                num_warps=8, num_stages=2, **_two_programs(pool), **workspace.options,
            )  # fmt: skip


def _scale_and_shift(workspace: Workspace, outputs: Sequence[Tensor]) -> None:
    """Apply the gains and offsets of all tokens to the complete outputs. The launch before this one expanded them."""
    widths, rows = _rows(outputs)
    pool, tables = workspace.pool, workspace.tables
    # The same for all widths: each number of columns is another kernel, and `warm_up` compiles one.
    columns = SCALED_COLUMNS
    with torch.cuda.device_of(pool):
        scale_and_shift[(workspace.v.shape[1], sum(-(-width // columns) for width in widths))](
            *rows, *workspace.layers[2:], workspace.batch.token_slots, pool, tables.offset, tables.vectors,
            workspace.slots, COLUMNS=columns, VEC=vector_elements(*outputs, pool=pool), num_warps=4,
            **workspace.options,
        )  # fmt: skip


def _rows(outputs: Sequence[Tensor]) -> tuple[list[int], tuple[Any, ...]]:
    """Widths of the outputs; and outputs, widths and strides, padded to `OUTPUTS_PER_LAUNCH`, as kernels take them."""
    unused = OUTPUTS_PER_LAUNCH - len(outputs)
    widths = [y.shape[1] for y in outputs]
    padded = (*outputs, *[outputs[0]] * unused, *widths, *[0] * unused, *(y.stride(0) for y in outputs), *[0] * unused)
    return widths, padded


def _reduce_mix(x: Tensor, workspace: Workspace, launch: Launch) -> None:
    """Compute v for segments of rank 1."""
    v, bucket, vector = workspace.v, workspace.classes.single, vector_elements(x, pool=workspace.pool)
    # All inputs of a segment at once if they are few enough. More than `MOST_HELD` factors would not fit registers.
    inputs = min(launch.reduce_elements // bucket, _power_of_two(-(-workspace.d_in // bucket)))
    inputs = max(inputs, min(vector, MOST_HELD // bucket))
    held = max(inputs * bucket, min(bucket * bucket, 4096))
    reduce_mix[(v.shape[1], v.shape[0])](
        x, x.stride(0), *workspace.layers, *workspace.own_shapes,
        v, v.shape[2], R=bucket, K=inputs, VEC=vector, num_warps=_warps(held, launch), **workspace.options,
    )  # fmt: skip


def _reduce_in_parts(x: Tensor, workspace: Workspace, launch: Launch) -> None:
    """Compute v for segments of ranks above 1."""
    v, classes = workspace.v, workspace.classes
    largest = max(classes.segmented, classes.whole)
    # A segment of a segmented A has few ranks, as a rule.
    elements = workspace.d_in * largest // (1 if classes.whole else 4)
    sums = _sums(v, elements // PART_ELEMENTS)
    for whole, bucket in ((False, classes.segmented), (True, classes.whole)):
        if bucket:
            inputs = max(1, launch.reduce_elements // 2 // bucket)
            reduce_parts[(v.shape[1], v.shape[0], len(sums))](
                x, x.stride(0), *workspace.layers, *workspace.own_shapes,
                sums, v.shape[2], WHOLE=whole, R=bucket, K=inputs, VEC=vector_elements(pool=workspace.pool),
                # Twice as many factors of 16 bits in a thread as in `_reduce_mix`: loads do not wait for one another.
                num_warps=_warps(inputs * bucket * x.element_size() // 4, launch), **workspace.options,
            )  # fmt: skip
    _mix_parts(workspace, sums, largest, single=False)


def _has_runs(tokens: int, classes: ShapeClasses) -> bool:
    return tokens > PREFILL_TOKENS and 0 < classes.single <= RUN_BUCKET


def _run_parts(layers: int, tokens: int, classes: ShapeClasses) -> int:
    """Return the parts of v, which programs of a block compute side by side. With several parts, blocks are small.

    A program's rounds are its time, and few tokens have few programs. Many tokens have enough, and no parts to add.
    """
    is_small = _has_runs(tokens, classes) and layers * tokens <= RUN_ROWS and classes.width <= RUN_BUCKET
    return RUN_PARTS if is_small else 1


def _reduce_runs(x: Tensor, workspace: Workspace, launch: Launch) -> None:
    """Compute v for blocks of neighbours, if segments have rank 1."""
    v, bucket = workspace.v, workspace.classes.single
    is_small = workspace.parts > 1
    block, inputs = (SMALL_RUN_TOKENS, SMALL_RUN_INPUTS) if is_small else (launch.run_tokens, launch.run_inputs)
    # 32 inputs of 16 bits of a round in a thread.
    warps = max(block * inputs // 64, 2)
    # Rounds of a large mixer hold fewer inputs.
    inputs = inputs * 2 // x.element_size() // (2 if bucket > 64 else 1)
    reduce_runs[(v.shape[0], -(-v.shape[1] // block), RUN_SHARES.value * workspace.parts)](
        x, x.stride(0), *workspace.layers, workspace.batch.token_slots, *workspace.shapes, workspace.slots,
        v, v.shape[2], M=block, R=bucket, S=16, K=inputs, STAGES=3 if bucket > 64 else 4,
        VEC=vector_elements(x, pool=workspace.pool), PRECISION="ieee" if x.dtype == torch.float32 else "tf32x3",
        num_warps=16 if bucket > 64 else warps, **workspace.options,
    )  # fmt: skip


def _reduce_tiles(x: Tensor, workspace: Workspace) -> None:
    """Compute v for tiles of tokens."""
    v, d_in = workspace.v, workspace.d_in
    width = 2 * TILE_WIDTH // x.element_size()
    ranks = min(v.shape[2], width)
    sums = _sums(v, d_in // 1024)
    chunks = v.shape[2] // ranks
    reduce_tiles[(workspace.tile_rows, v.shape[0] * chunks, len(sums))](
        x, x.stride(0), *workspace.layers, *workspace.tiles, *workspace.shapes, workspace.slots, sums, v.shape[2],
        CHUNKS=chunks, SINGLE=not workspace.runs, M=TILE_TOKENS, R=ranks, K=width,
        X_VEC=vector_elements(x), VEC=vector_elements(pool=workspace.pool),
        # The interpreter's tl.dot reads bfloat16 as integers.
        WIDEN=INTERPRETED and x.dtype == torch.bfloat16,
        PRECISION=_precision(x.dtype), STAGES=3, num_warps=8, **_two_programs(x), **workspace.options,
    )  # fmt: skip
    _mix_parts(workspace, sums, v.shape[2], single=not workspace.runs)


def _mix_parts(workspace: Workspace, sums: Tensor, bucket: int, *, single: bool) -> None:
    """Compute v from parts of sums (parts, layers, tokens, rank bucket). single: also for segments of rank 1."""
    v = workspace.v
    by_token = v.shape[1] <= PREFILL_TOKENS
    shapes, count = (workspace.own_shapes, v.shape[1]) if by_token else (workspace.shapes, workspace.slots)
    mix_parts[(v.shape[1], v.shape[0])](
        *workspace.layers, workspace.batch.token_slots, *shapes, count, sums, v, v.shape[2], BY_TOKEN=by_token,
        PARTS=len(sums), SINGLE=single, R=bucket, VEC=vector_elements(pool=workspace.pool), num_warps=8,
        **workspace.options,
    )  # fmt: skip


@cache
def _can_overlap(device: torch.device) -> bool:
    """Return whether the device has programmatic dependent launch: CUDA from compute capability 9.0."""
    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] >= 9


def _buffer(device: torch.device, *size: int) -> Tensor:
    """Return float32 memory without contents. In a CUDA graph, it comes from the graph's own memory."""
    return torch.empty(size, dtype=torch.float32, device=device)


def _sums(v: Tensor, parts: int) -> Tensor:
    """Return memory for parts of the sums, float32 (parts, layers, tokens, rank bucket): a power of two of them.

    Many tokens of large ranks keep the device busy without parts.
    """
    fitting = max(MOST_SUMS_BYTES // v.nbytes, 1)
    # A program of `mix_parts` holds all parts of a row of v.
    most = min(MOST_PARTS, 2 * MOST_HELD // v.shape[2], 1 << (fitting.bit_length() - 1))
    return _buffer(v.device, min(_power_of_two(parts), most), *v.shape)


def _power_of_two(least: int) -> int:
    """Return the smallest power of two of at least `least`."""
    return 1 << max(least - 1, 0).bit_length()


def _warps(elements: int, launch: Launch) -> int:
    """Return the warps of a program of the first phase that holds so many factors."""
    return min(max(elements // launch.reduce_thread // 32, 2), 16)


def _precision(dtype: torch.dtype) -> str:
    """Return the precision of products. TF32 holds factors of 16 bits exactly."""
    return "ieee" if dtype == torch.float32 else "tf32"


def _two_programs(factors: Tensor) -> dict[str, int]:
    """Return the option that lets a multiprocessor hold two programs of 8 warps. Loads of one run beside the other."""
    # Other matrix units than those since sm_90, and sums of float32, need more registers.
    return {"maxnreg": 128} if factors.element_size() == 2 and _can_overlap(factors.device) else {}
