"""The Triton kernels against the float64 reference. Without a GPU, Triton's interpreter runs the kernels."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sera_kernels import (
    ABSENT,
    NO_ADAPTER,
    AdapterBatch,
    AdapterTables,
    ShapeClasses,
    grouped_sera_reference,
    triton_path,
)
from sera_kernels.cells import cells_of
from sera_kernels.launches import Launch
from sera_kernels.triton_path import RUN_PARTS, expand_updates, grouped_sera_triton, reduce_updates, updates_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
# Small blocks, so that small cases need several blocks of each kind. The interpreter's time grows with the programs.
RUNS = {"run_tokens": 16, "run_inputs": 32}
SMALL = Launch(reduce_elements=1024, reduce_thread=8, expand_columns=128, expand_warps=4, **RUNS)
NARROW = Launch(reduce_elements=1024, reduce_thread=8, expand_columns=32, expand_warps=4, **RUNS)
WIDE = Launch(reduce_elements=8192, reduce_thread=16, expand_columns=512, expand_warps=4, **RUNS)

POPULARITY = {
    "distinct": lambda tokens, slots: torch.arange(tokens) % slots,
    "one": lambda tokens, slots: torch.full((tokens,), min(2, slots - 1)),
    "uniform": lambda tokens, slots: torch.randint(slots, (tokens,)),
    "zipf": lambda tokens, slots: torch.multinomial(1 / torch.arange(1.0, slots + 1), tokens, replacement=True),
    "skewed": lambda tokens, slots: (torch.rand(tokens).pow(3) * slots).long(),
    "with no adapter": lambda tokens, slots: torch.randint(NO_ADAPTER, slots, (tokens,)),
    "runs": lambda tokens, slots: torch.arange(tokens) * slots // tokens - 1,
}


@dataclass(frozen=True)
class Widths:
    """Widths of a layer, and the shapes of adapters that fit the widths: rank, split, mixer."""

    d_in: int
    d_outs: tuple[int, ...]
    shapes: tuple[tuple[int, int, bool], ...]


EVEN = Widths(
    128,
    (192, 64),
    ((4, 4, True), (8, 8, True), (16, 4, True), (64, 64, True), (64, 1, False), (32, 2, True), (128, 64, False)),
)
TIMES_24 = Widths(
    24 * 5,
    (24 * 3, 24, 48),
    ((3, 3, False), (6, 3, True), (12, 12, True), (24, 24, True), (24, 4, False), (48, 24, True), (48, 1, True)),
)
TIMES_65 = Widths(
    65 * 3,
    (65, 130),
    ((65, 65, True), (13, 13, False), (5, 5, True), (10, 5, False), (26, 13, True), (1, 1, True), (195, 65, True)),
)
LARGE = Widths(
    256, (512,), ((256, 256, True), (256, 1, False), (128, 2, True), (256, 64, False), (128, 64, True), (256, 4, True))
)

SINGLE = Widths(128, (192, 64), ((64, 64, True), (16, 16, True), (8, 8, False), (1, 1, True)))
WHOLE = Widths(96, (64, 40), ((16, 1, False), (64, 1, True), (3, 1, False), (4, 1, True)))
# Ranges of columns that start and end inside segments, and need several chunks of ranks.
TIMES_195 = Widths(195, (585,), ((195, 195, True), (195, 195, False)))

# Segments of fewer inputs than a round takes. Some take the 16-byte accesses and some do not.
NARROW_SEGMENTS = Widths(
    64, (128, 64), ((16, 16, True), (64, 64, False), (32, 32, True), (2, 2, True), (8, 8, False), (64, 64, True))
)
# More segments than blocks of neighbours are computed for.
MANY_SEGMENTS = Widths(520, (520,), ((260, 260, True), (4, 4, True), (2, 1, True)))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Some programs then take several tiles, and A is read in several parts. Idle programs cost time in the interpreter.
    monkeypatch.setattr(triton_path, "SPARE_ROWS", 1)
    monkeypatch.setattr(triton_path, "PART_ELEMENTS", 1 << 10)
    monkeypatch.setattr(triton_path, "MOST_PARTS", 2)
    monkeypatch.setattr(triton_path, "TILE_TOKENS", 16)
    monkeypatch.setattr(triton_path, "EXPAND_WIDTH", 256)
    monkeypatch.setattr(triton_path, "EXPAND_BYTES", 2048)
    # What a kernel reads before it was written shows.
    monkeypatch.setattr(triton_path, "_buffer", lambda device, *size: torch.full(size, NAN, device=device))


@pytest.fixture
def _tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute tiles and blocks, however few the tokens are: large blocks and small ones."""
    monkeypatch.setattr(triton_path, "PREFILL_TOKENS", 0)
    monkeypatch.setattr(triton_path, "RUN_ROWS", 60)


def adapters(
    widths: Widths, dtype: torch.dtype, offset_step: int = 8, vectors: bool = False
) -> tuple[Tensor, AdapterTables]:
    """Make one adapter of each shape, some without some modules. All other memory of the pool is NaN.

    With `vectors`, about half of the modules have a gain and an offset.
    """
    tables = AdapterTables.empty(len(widths.d_outs), len(widths.shapes))
    chunks, end = [], 0

    def skip(count: int) -> int:
        nonlocal end
        chunks.append(torch.full((count,), NAN))
        end += count
        return end

    for slot, (rank, split, mixer) in enumerate(widths.shapes):
        for module, d_out in enumerate(widths.d_outs):
            if module == slot % 4 == 1:
                continue
            tables.offset[module, slot] = skip(-end % offset_step + offset_step)
            tables.rank[module, slot], tables.split[module, slot] = rank, split
            tables.mixer[module, slot], tables.scaling[module, slot] = int(mixer), 0.5 + slot
            size = (widths.d_in + d_out) * (rank // split) + (rank**2 if mixer else 0)
            chunks.append(torch.randn(size) / 8)
            end += size
            if vectors and (slot + module) % 2 == 0:
                tables.vectors[module, slot] = skip(-end % offset_step + offset_step)
                chunks += [1 + torch.randn(d_out) / 4, torch.randn(d_out)]
                end += 2 * d_out
    skip(offset_step)
    return torch.cat(chunks).to(dtype).to(DEVICE), on_device(tables)


def on_device(tables: AdapterTables) -> AdapterTables:
    return AdapterTables(**{name: getattr(tables, name).to(DEVICE) for name in AdapterTables.__dataclass_fields__})


def poisoned(rows: int, width: int, dtype: torch.dtype, margin: int) -> Tensor:
    """Make a random (rows, width) view of a buffer. The buffer is NaN on all sides of the view."""
    buffer = torch.full((rows + 2, margin + width + margin), NAN, dtype=dtype, device=DEVICE)
    view = buffer[1:-1, margin : margin + width]
    view.copy_(torch.randn(rows, width))
    return view


def check(
    launch: Launch, x: Tensor, got: list[Tensor], batch: AdapterBatch, pool: Tensor, tables: AdapterTables
) -> None:
    """Run the kernel and compare its outputs with the reference."""
    before = [y.clone() for y in got]
    want = [y.double() for y in got]
    modules = list(range(len(got)))
    grouped_sera_reference(x, want, modules, batch, pool, tables)
    grouped_sera_triton(x, got, modules, batch, pool, tables, launch)
    slots = batch.token_slots.long()
    for module, (mine, exact, old) in enumerate(zip(got, want, before, strict=True)):
        touched = (slots >= 0) & (tables.offset[module, slots.clamp(min=0)] >= 0)
        assert torch.equal(mine[~touched], old[~touched])
        # The result is rounded once and the sums are in float32. On a GPU, the mixer's input has eleven bits (TF32).
        unit, update = torch.finfo(x.dtype).eps, (exact - old.double()).abs().max().item()
        tf32 = 2**-10 if mine.is_cuda and x.dtype != torch.float32 else 0
        atol = (16 * 2**-23 + tf32) * (update + exact.abs().max().item())
        torch.testing.assert_close(mine.double(), exact, rtol=unit, atol=atol)
        outside = mine._base
        assert outside is not None
        assert torch.isnan(outside).sum() == outside.numel() - mine.numel()


def run_case(
    widths: Widths, popularity: str, tokens: int, dtype: torch.dtype, launch: Launch, margin: int, offset_step: int
) -> None:
    pool, tables = adapters(widths, dtype, offset_step)
    batch = AdapterBatch(POPULARITY[popularity](tokens, len(widths.shapes)).to(torch.int32).to(DEVICE))
    x = poisoned(tokens, widths.d_in, dtype, margin)
    got = [poisoned(tokens, d_out, dtype, margin) for d_out in widths.d_outs]
    check(launch, x, got, batch, pool, tables)


@pytest.mark.parametrize(
    ("widths", "popularity", "tokens", "dtype", "launch", "margin", "offset_step"),
    [
        (EVEN, "distinct", 7, torch.float32, SMALL, 8, 8),
        (EVEN, "distinct", 7, torch.bfloat16, SMALL, 8, 8),
        (EVEN, "with no adapter", 9, torch.float16, SMALL, 8, 1),
        (EVEN, "distinct", 7, torch.bfloat16, WIDE, 3, 8),
        pytest.param(EVEN, "distinct", 6, torch.float16, NARROW, 8, 8, marks=pytest.mark.slow),
        (SINGLE, "distinct", 6, torch.bfloat16, SMALL, 8, 8),
        (SINGLE, "zipf", 9, torch.float32, NARROW, 8, 8),
        (WHOLE, "distinct", 5, torch.bfloat16, SMALL, 8, 8),
        (TIMES_24, "distinct", 7, torch.bfloat16, SMALL, 8, 8),
        pytest.param(TIMES_24, "zipf", 9, torch.float16, SMALL, 8, 3, marks=pytest.mark.slow),
        (TIMES_24, "with no adapter", 9, torch.float32, NARROW, 5, 8),
        (TIMES_65, "distinct", 7, torch.float32, SMALL, 8, 8),
        pytest.param(TIMES_65, "uniform", 7, torch.bfloat16, SMALL, 1, 1, marks=pytest.mark.slow),
        (TIMES_195, "distinct", 3, torch.float32, SMALL, 8, 8),
        (LARGE, "distinct", 6, torch.bfloat16, WIDE, 8, 8),
        pytest.param(LARGE, "distinct", 6, torch.float32, SMALL, 8, 8, marks=pytest.mark.slow),
        (LARGE, "one", 1, torch.float16, WIDE, 8, 8),
    ],
)
def test_decoding_is_the_reference(
    widths: Widths, popularity: str, tokens: int, dtype: torch.dtype, launch: Launch, margin: int, offset_step: int
) -> None:
    run_case(widths, popularity, tokens, dtype, launch, margin, offset_step)


@pytest.mark.slow
@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize(
    ("widths", "popularity", "tokens", "dtype", "margin", "offset_step"),
    [
        (EVEN, "runs", 40, torch.float32, 8, 8),
        pytest.param(EVEN, "runs", 50, torch.bfloat16, 8, 8, marks=pytest.mark.slow),
        pytest.param(EVEN, "skewed", 30, torch.float16, 8, 1, marks=pytest.mark.slow),
        (SINGLE, "runs", 40, torch.bfloat16, 8, 8),
        (SINGLE, "one", 100, torch.float16, 3, 8),
        pytest.param(SINGLE, "distinct", 20, torch.float32, 8, 1, marks=pytest.mark.slow),
        (MANY_SEGMENTS, "runs", 20, torch.float32, 8, 8),
        (NARROW_SEGMENTS, "uniform", 18, torch.bfloat16, 8, 8),
        (WHOLE, "runs", 40, torch.bfloat16, 8, 8),
        pytest.param(TIMES_24, "runs", 50, torch.bfloat16, 8, 8, marks=pytest.mark.slow),
        (TIMES_24, "with no adapter", 35, torch.float32, 5, 3),
        (TIMES_65, "runs", 40, torch.float32, 8, 8),
        (TIMES_65, "uniform", 24, torch.bfloat16, 1, 8),
        (TIMES_195, "distinct", 3, torch.float32, 8, 8),
        (LARGE, "runs", 15, torch.float32, 8, 8),
        pytest.param(LARGE, "uniform", 30, torch.float16, 8, 8, marks=pytest.mark.slow),
    ],
)
def test_tiles_are_the_reference(
    widths: Widths, popularity: str, tokens: int, dtype: torch.dtype, margin: int, offset_step: int
) -> None:
    run_case(widths, popularity, tokens, dtype, SMALL, margin, offset_step)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("tokens", [4, 8])
@pytest.mark.parametrize("inputs", [32, 64])
def test_large_blocks_of_each_size_are_the_reference(tokens: int, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_path, "RUN_ROWS", 0)
    run_case(SINGLE, "runs", 20, torch.bfloat16, replace(SMALL, run_tokens=tokens, run_inputs=inputs), 8, 8)


# Two layers of 20 tokens each.
@pytest.mark.slow
@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("popularity", ["runs", "with no adapter"])
@pytest.mark.parametrize(("rows", "parts"), [(39, 1), (40, RUN_PARTS)])
def test_large_and_small_blocks_are_the_reference(
    rows: int, parts: int, popularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_path, "RUN_ROWS", rows)
    assert triton_path._run_parts(2, 20, ShapeClasses(single=64)) == parts
    run_case(SINGLE, popularity, 20, torch.bfloat16, SMALL, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize(
    ("widths", "dtype", "margin", "offset_step"),
    [
        (EVEN, torch.float32, 8, 8),
        pytest.param(EVEN, torch.bfloat16, 8, 8, marks=pytest.mark.slow),
        pytest.param(EVEN, torch.float16, 3, 8, marks=pytest.mark.slow),
        (TIMES_24, torch.bfloat16, 8, 3),
        (TIMES_65, torch.float32, 1, 1),
        # More columns than a program takes, and an uneven rest.
        (Widths(32, (1200, 1040), ((4, 4, True), (4, 1, False), (2, 2, True), (1, 1, True))), torch.float16, 8, 8),
    ],
)
def test_gains_and_offsets_are_the_reference(
    widths: Widths, dtype: torch.dtype, margin: int, offset_step: int, prefill: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if prefill:
        monkeypatch.setattr(triton_path, "PREFILL_TOKENS", 0)
    pool, tables = adapters(widths, dtype, offset_step, vectors=True)
    slots = torch.arange(7, dtype=torch.int32, device=DEVICE) % len(widths.shapes)
    slots[5] = NO_ADAPTER
    x = poisoned(7, widths.d_in, dtype, margin)
    got = [poisoned(7, d_out, dtype, margin) for d_out in widths.d_outs]
    before = [y.clone() for y in got]
    updated, want = [y.clone() for y in got], [y.double() for y in got]
    modules = list(range(len(got)))
    grouped_sera_reference(x, want, modules, AdapterBatch(slots), pool, tables)
    grouped_sera_triton(
        x, updated, modules, AdapterBatch(slots, replace(tables.classes, vectors=False)), pool, tables, SMALL
    )
    grouped_sera_triton(x, got, modules, AdapterBatch(slots), pool, tables, SMALL)
    for module, (mine, exact, plain) in enumerate(zip(got, want, updated, strict=True)):
        cells = slots.long().clamp(min=0)
        has = (slots >= 0) & (tables.offset[module, cells] >= 0) & (tables.vectors[module, cells] >= 0)
        assert torch.equal(mine[~has], plain[~has])
        assert has.any() and not torch.equal(mine[has], plain[has])
        # The output is rounded before the gain, which may be 2, and after it; the interpreter cuts bfloat16 off.
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(mine.double(), exact, rtol=4 * unit, atol=8 * unit * exact.abs().max().item())
        assert torch.equal(mine[5], before[module][5])
        outside = mine._base
        assert outside is not None
        assert torch.isnan(outside).sum() == outside.numel() - mine.numel()


@pytest.mark.slow
def test_more_than_256_tokens_are_computed_in_tiles() -> None:
    run_case(Widths(32, (48,), ((4, 4, True), (4, 1, False))), "runs", 300, torch.bfloat16, SMALL, 8, 8)


def changed_tables(same_batch: bool) -> None:
    pool, tables = adapters(EVEN, torch.float32)
    batch = AdapterBatch(torch.tensor([1, 3, 3, 5, -1, 0, 4], dtype=torch.int32, device=DEVICE))
    x = poisoned(7, EVEN.d_in, torch.float32, 8)
    got = [poisoned(7, d_out, torch.float32, 8) for d_out in EVEN.d_outs]
    check(SMALL, x, got, batch, pool, tables)
    for table in (tables.offset, tables.rank, tables.split, tables.mixer, tables.scaling):
        table.copy_(table.roll(1, 1))
    pool *= 0.5
    tables.offset[0, 3] = ABSENT
    check(SMALL, x, got, batch if same_batch else AdapterBatch(batch.token_slots), pool, tables)


def test_tables_and_factors_may_change_between_steps() -> None:
    changed_tables(same_batch=False)


@pytest.mark.usefixtures("_tiles")
def test_tables_and_factors_may_change_between_tiles_of_a_batch() -> None:
    # A replay of a CUDA graph relies on this: the metadata of tiles depends on token slots alone.
    changed_tables(same_batch=True)


@pytest.mark.parametrize("tokens", [1, 64, 65, 200])
def test_the_cells_of_a_batch_are_copied_once_for_each_tables(tokens: int) -> None:
    _, tables = adapters(EVEN, torch.float32)
    tables.offset[1, 2] = ABSENT
    slots = torch.randint(NO_ADAPTER, len(EVEN.shapes), (tokens,)).to(torch.int32).to(DEVICE)
    slots[0] = 2
    batch = AdapterBatch(slots)
    cells = cells_of(batch, tables)
    used = slots >= 0
    for name, own in cells._asdict().items():
        table = getattr(tables, name)
        assert own.dtype == table.dtype
        assert torch.equal(own[:, used], table[:, slots[used].long()])
    assert (cells.offset[:, ~used] == ABSENT).all() and cells.offset[1, 0] == ABSENT
    # Kernels divide by them.
    assert (cells.rank[:, ~used] == 1).all() and (cells.split[:, ~used] == 1).all()
    assert cells_of(batch, tables) is cells
    other = replace(tables, offset=tables.offset + 1)
    assert torch.equal(cells_of(batch, other).offset[0, used], cells.offset[0, used] + 1)
    assert cells_of(batch, tables) is cells


@pytest.mark.parametrize("vectors", [False, True])
def test_kinds_and_buckets_beyond_what_occurs_change_nothing(vectors: bool) -> None:
    widths = Widths(64, (64, 32), ((4, 4, True), (8, 8, False), (2, 1, True), (8, 2, False)))
    pool, tables = adapters(widths, torch.float32)
    assert tables.classes == ShapeClasses(16, 16, 16)
    tables.set_classes(ShapeClasses(64, 256, 64, vectors))
    batch = AdapterBatch(torch.tensor([0, 1, 2, 3, -1], dtype=torch.int32, device=DEVICE))
    x = poisoned(5, 64, torch.float32, 8)
    check(SMALL, x, [poisoned(5, d_out, torch.float32, 8) for d_out in widths.d_outs], batch, pool, tables)


def test_without_a_resident_adapter_nothing_is_launched() -> None:
    tables = on_device(AdapterTables.empty(1, 3))
    batch = AdapterBatch(torch.tensor([2, -1], dtype=torch.int32, device=DEVICE))
    x = torch.full((2, 16), NAN, device=DEVICE)
    assert reduce_updates(x, [0], batch, x[0], tables) is None


def test_phases_may_run_apart() -> None:
    # The second phase reads the workspace, and neither x nor A.
    pool, tables = adapters(SINGLE, torch.float32)
    batch = AdapterBatch(torch.tensor([2, 1, -1, 0], dtype=torch.int32, device=DEVICE))
    x = poisoned(4, SINGLE.d_in, torch.float32, 8)
    got = [poisoned(4, d_out, torch.float32, 8) for d_out in SINGLE.d_outs]
    want = [y.double() for y in got]
    grouped_sera_reference(x, want, [0, 1], batch, pool, tables)
    workspace = reduce_updates(x, [0, 1], batch, pool, tables, consecutive=False)
    assert workspace is not None
    x.fill_(NAN)
    expand_updates(workspace, got)
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("widths", "dtype", "offset_step", "launch"),
    [
        (Widths(64, (96, 96), ((8, 8, True), (4, 4, False), (32, 32, True), (1, 1, True))), torch.float32, 1, NARROW),
        (Widths(64, (96, 96), ((8, 8, True), (4, 4, False), (32, 32, True), (1, 1, True))), torch.bfloat16, 8, NARROW),
        (Widths(64, (96, 96), ((8, 8, True), (4, 4, False), (8, 2, True), (4, 1, True))), torch.float32, 8, SMALL),
        (Widths(45, (75, 75), ((15, 15, True), (5, 5, False), (6, 3, True), (4, 1, True))), torch.float16, 3, NARROW),
    ],
)
def test_updates_may_be_written_instead_of_added(
    widths: Widths, dtype: torch.dtype, offset_step: int, launch: Launch
) -> None:
    pool, tables = adapters(widths, dtype, offset_step)
    batch = AdapterBatch(torch.tensor([3, 1, -1, 0, 2, 0], dtype=torch.int32, device=DEVICE))
    x = poisoned(6, widths.d_in, dtype, 8)
    want = [torch.zeros(6, width, dtype=torch.float64, device=DEVICE) for width in widths.d_outs]
    grouped_sera_reference(x, want, [0, 1], batch, pool, tables)
    got = updates_of(x, widths.d_outs, [0, 1], batch, pool, tables, launch)
    assert got is not None
    unit = torch.finfo(dtype).eps
    for mine, exact in zip(got, want, strict=True):
        assert mine.dtype == dtype and not mine[2].any() and exact[0].any()
        torch.testing.assert_close(mine.double(), exact, rtol=2 * unit, atol=2 * unit * exact.abs().max().item())
    assert updates_of(x, widths.d_outs, [0, 1], batch, pool, on_device(AdapterTables.empty(2, 4))) is None


@pytest.mark.usefixtures("_tiles")
def test_a_token_has_the_same_bits_whatever_its_neighbours_and_their_factors() -> None:
    pool, tables = adapters(SINGLE, torch.float32)
    x, y = poisoned(20, SINGLE.d_in, torch.float32, 8), poisoned(20, 192, torch.float32, 8)
    alone, beside = y.clone(), y.clone()
    slots = torch.zeros(20, dtype=torch.int32, device=DEVICE)
    grouped_sera_triton(x, [alone], [0], AdapterBatch(slots), pool, tables)
    slots[::3], slots[1] = 2, NO_ADAPTER
    # Another tenant's factors, and inputs, that are not numbers.
    first, last = tables.offset[0, 2], tables.offset[0, 2] + SINGLE.d_in + 192
    pool[first:last], x[slots != 0] = NAN, NAN
    grouped_sera_triton(x, [beside], [0], AdapterBatch(slots), pool, tables)
    assert torch.equal(beside[slots == 0], alone[slots == 0])
    assert torch.equal(beside[1], y[1])
    assert torch.isnan(beside[slots == 2]).all()


def test_results_are_the_same_bits_each_time() -> None:
    pool, tables = adapters(EVEN, torch.bfloat16)
    batch = AdapterBatch(torch.arange(7, dtype=torch.int32, device=DEVICE))
    x, y = poisoned(7, EVEN.d_in, torch.bfloat16, 8), poisoned(7, 192, torch.bfloat16, 8)
    results = [y.clone(), y.clone()]
    for result in results:
        grouped_sera_triton(x, [result], [0], batch, pool, tables)
    assert torch.equal(*results)


def test_more_outputs_than_one_launch_takes() -> None:
    widths = Widths(32, (16, 48, 32, 16, 64), ((4, 4, True), (2, 1, False)))
    pool, tables = adapters(widths, torch.float32)
    batch = AdapterBatch(torch.tensor([1, NO_ADAPTER, 0], dtype=torch.int32, device=DEVICE))
    x = poisoned(3, 32, torch.float32, 8)
    check(SMALL, x, [poisoned(3, d_out, torch.float32, 8) for d_out in widths.d_outs], batch, pool, tables)


def test_no_tokens() -> None:
    pool, tables = adapters(EVEN, torch.float32)
    batch = AdapterBatch(torch.zeros(0, dtype=torch.int32, device=DEVICE))
    x, y = torch.zeros(0, 128, device=DEVICE), torch.zeros(0, 192, device=DEVICE)
    grouped_sera_triton(x, [y], [0], batch, pool, tables)


@pytest.mark.parametrize("block", [1, 16, 64])
@pytest.mark.parametrize("popularity", POPULARITY)
def test_every_token_with_an_adapter_is_in_one_tile(popularity: str, block: int) -> None:
    for tokens in (1, 5, 33, 200):
        batch = AdapterBatch(POPULARITY[popularity](tokens, 7).to(torch.int32))
        slots, order = batch.sorted_slots
        first, ordinal = batch.tiles(block)
        seen: list[int] = []
        for start in first[: ordinal[-1]].tolist():
            # The kernel reads a tile in the same way: the tile ends with its slot, or after `block` tokens.
            tile = [place for place in range(start, min(start + block, tokens)) if slots[place] == slots[start]]
            assert slots[start] != NO_ADAPTER
            seen += order[tile].tolist()
        assert sorted(seen) == (batch.token_slots != NO_ADAPTER).nonzero().flatten().tolist()


def test_tiles_are_made_without_reading_values() -> None:
    # A meta tensor has no values. An operation that reads a value, or whose shape depends on a value, raises.
    batch = AdapterBatch(torch.empty(37, dtype=torch.int32, device="meta"))
    assert [part.shape for part in (*batch.sorted_slots, *batch.tiles(16))] == [(37,)] * 4
