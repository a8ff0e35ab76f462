"""The Triton kernel against the float64 reference. Without a GPU, Triton's interpreter runs the kernel."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sera_kernels import ABSENT, NO_ADAPTER, AdapterBatch, AdapterTables, grouped_sera_reference
from sera_kernels.launches import Launch
from sera_kernels.triton_path import grouped_sera_triton, launch_grouped

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
# Small blocks, so that small cases need several blocks of each kind. The interpreter's time grows with the programs.
TOKEN = Launch(1, 128, 1024, 32, 16, 32, 4, 1, 128)
TILE = Launch(16, 128, 1024, 32, 16, 64, 8, 2, 128)

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
    256, (512,), ((256, 256, True), (256, 1, False), (128, 2, True), (256, 64, False), (192, 64, True), (256, 4, True))
)

# Ranges of columns that start and end inside segments, and need several chunks of ranks.
TIMES_195 = Widths(195, (585,), ((195, 195, True), (195, 195, False)))


@pytest.fixture(autouse=True)
def _few_spare_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Some programs then take several tiles. Also, idle programs cost time in the interpreter.
    monkeypatch.setattr("sera_kernels.triton_path.SPARE_ROWS", 1)


def adapters(widths: Widths, dtype: torch.dtype, offset_step: int = 8) -> tuple[Tensor, AdapterTables]:
    """Make one adapter of each shape, some without some modules. All other memory of the pool is NaN."""
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
    launch: Launch | None, x: Tensor, got: list[Tensor], batch: AdapterBatch, pool: Tensor, tables: AdapterTables
) -> None:
    """Run the kernel and compare its outputs with the reference."""
    before = [y.clone() for y in got]
    want = [y.double() for y in got]
    modules = list(range(len(got)))
    grouped_sera_reference(x, want, modules, batch, pool, tables)
    if launch is None:
        grouped_sera_triton(x, got, modules, batch, pool, tables)
    else:
        launch_grouped(launch, x, got, modules, batch, pool, tables)
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


@pytest.mark.parametrize(
    ("widths", "popularity", "tokens", "dtype", "launch", "margin", "offset_step"),
    [
        # Each program updates one token.
        (EVEN, "distinct", 7, torch.float32, TOKEN, 8, 8),
        (EVEN, "distinct", 7, torch.bfloat16, TOKEN, 8, 8),
        (EVEN, "with no adapter", 9, torch.float16, TOKEN, 8, 1),
        (EVEN, "distinct", 7, torch.bfloat16, replace(TOKEN, columns=512, elements=2048), 3, 8),
        (EVEN, "distinct", 6, torch.float16, replace(TOKEN, columns=32), 8, 8),
        (TIMES_24, "distinct", 7, torch.bfloat16, TOKEN, 8, 8),
        (TIMES_24, "zipf", 9, torch.float16, TOKEN, 8, 3),
        (TIMES_24, "with no adapter", 9, torch.float32, replace(TOKEN, columns=32), 5, 8),
        (TIMES_65, "distinct", 7, torch.float32, TOKEN, 8, 8),
        (TIMES_65, "uniform", 7, torch.bfloat16, TOKEN, 1, 1),
        (LARGE, "distinct", 6, torch.bfloat16, replace(TOKEN, columns=512, elements=4096), 8, 8),
        (LARGE, "distinct", 6, torch.float32, replace(TOKEN, columns=512), 8, 8),
        (LARGE, "one", 1, torch.float16, replace(TOKEN, columns=512, elements=2048), 8, 8),
        # Tiles. Some tiles have one token.
        (EVEN, "runs", 40, torch.float32, TILE, 8, 8),
        (EVEN, "runs", 70, torch.bfloat16, TILE, 8, 8),
        (EVEN, "skewed", 40, torch.float16, TILE, 8, 1),
        (EVEN, "one", 512, torch.bfloat16, replace(TILE, block_m=64, columns=256), 8, 8),
        (EVEN, "zipf", 200, torch.float16, replace(TILE, block_m=32), 8, 8),
        (TIMES_24, "runs", 90, torch.bfloat16, TILE, 8, 8),
        (TIMES_24, "with no adapter", 65, torch.float32, TILE, 5, 3),
        (TIMES_65, "runs", 80, torch.float32, TILE, 8, 8),
        (TIMES_65, "uniform", 24, torch.bfloat16, replace(TILE, columns=64), 1, 8),
        (TIMES_195, "distinct", 5, torch.float32, replace(TILE, columns=256), 8, 8),
        (LARGE, "runs", 15, torch.float32, replace(TILE, columns=512), 8, 8),
        (LARGE, "runs", 30, torch.bfloat16, replace(TILE, columns=512, block_r=32), 8, 8),
        (LARGE, "uniform", 40, torch.float16, replace(TILE, columns=512, block_n=128, block_k=128), 8, 8),
    ],
)
def test_the_kernel_is_the_reference(
    widths: Widths, popularity: str, tokens: int, dtype: torch.dtype, launch: Launch, margin: int, offset_step: int
) -> None:
    pool, tables = adapters(widths, dtype, offset_step)
    batch = AdapterBatch(POPULARITY[popularity](tokens, len(widths.shapes)).to(torch.int32).to(DEVICE))
    x = poisoned(tokens, widths.d_in, dtype, margin)
    got = [poisoned(tokens, d_out, dtype, margin) for d_out in widths.d_outs]
    check(launch, x, got, batch, pool, tables)


@pytest.mark.parametrize("launch", [TOKEN, TILE], ids=["token", "tile"])
def test_tables_and_factors_may_change_between_launches_of_a_batch(launch: Launch) -> None:
    # A replay of a CUDA graph relies on this: the metadata of a batch depends on token slots alone.
    pool, tables = adapters(EVEN, torch.float32)
    batch = AdapterBatch(torch.tensor([1, 3, 3, 5, -1, 0, 4], dtype=torch.int32, device=DEVICE))
    x = poisoned(7, EVEN.d_in, torch.float32, 8)
    got = [poisoned(7, d_out, torch.float32, 8) for d_out in EVEN.d_outs]
    check(launch, x, got, batch, pool, tables)
    for table in (tables.offset, tables.rank, tables.split, tables.mixer, tables.scaling):
        table.copy_(table.roll(1, 1))
    pool *= 0.5
    tables.offset[0, 3] = ABSENT
    check(launch, x, got, batch, pool, tables)


def test_more_outputs_than_one_launch_takes() -> None:
    widths = Widths(32, (16, 48, 32, 16, 64), ((4, 4, True), (2, 1, False)))
    pool, tables = adapters(widths, torch.float32)
    batch = AdapterBatch(torch.tensor([1, NO_ADAPTER, 0], dtype=torch.int32, device=DEVICE))
    x = poisoned(3, 32, torch.float32, 8)
    # None selects the shipped launch parameters.
    check(None, x, [poisoned(3, d_out, torch.float32, 8) for d_out in widths.d_outs], batch, pool, tables)


@pytest.mark.parametrize("launch", [TOKEN, TILE], ids=["token", "tile"])
def test_no_tokens(launch: Launch) -> None:
    pool, tables = adapters(EVEN, torch.float32)
    y = torch.empty(0, 192, device=DEVICE)
    batch = AdapterBatch(torch.empty(0, dtype=torch.int32, device=DEVICE))
    launch_grouped(launch, torch.empty(0, 128, device=DEVICE), [y], [0], batch, pool, tables)


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
