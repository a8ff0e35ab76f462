"""The kernel against the float64 reference, and a CUDA graph replayed over what changes beneath it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu.operands import Member, behind, mixed_pool
from benchmarks.gpu.setting import Grouped, Row, Setting, find_operation
from benchmarks.gpu.timing import capture
from sera_kernels import ABSENT, MOST_RANK, NO_ADAPTER, AdapterBatch, AdapterTables, grouped_sera_reference

# Largest norm of the error over that of the update or the output, whichever is more: of the update alone, rounding an
# output beside a small update would be much. A float32 result computed in tf32 is off by 3e-4.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
# A single element may be off by this much more, relative to its size plus the outputs' root mean square.
SINGLE = 4
GUARD_ROWS = 2

Popularity = Callable[[int, int], Tensor]
POPULARITY: dict[str, Popularity] = {
    "distinct": lambda tokens, slots: torch.arange(tokens) % slots,
    "identical": lambda tokens, slots: torch.full((tokens,), slots - 1),
    "uniform": lambda tokens, slots: torch.randint(slots, (tokens,)),
    "zipf": lambda tokens, slots: torch.multinomial(1 / torch.arange(1.0, slots + 1), tokens, replacement=True),
    "skewed": lambda tokens, slots: (torch.rand(tokens).pow(3) * slots).long(),
    "with base_only": lambda tokens, slots: torch.randint(-1, slots, (tokens,)),
    "base_only": lambda tokens, slots: torch.full((tokens,), NO_ADAPTER),
}
RANKS = (1, 2, 3, 4, 8, 15, 16, 17, 32, 64, 128, 256)


@dataclass(frozen=True)
class Widths:
    """Layers that share an input, and the adapters on them; `gap` elements of NaN between factors."""

    d_in: int
    d_outs: tuple[int, ...]
    gap: int = 8

    def members(self, ranks: Sequence[int] = RANKS) -> list[Member]:
        """Every rank with its least, middle and greatest split that fits, with and without a mixer."""
        found: list[Member] = []
        for rank in ranks:
            splits = [s for s in range(1, rank + 1) if rank % s == 0 and Member(rank, s).fits(self.d_in, *self.d_outs)]
            for split in sorted({splits[0], splits[len(splits) // 2], splits[-1]}):
                found += [Member(rank, split, True), Member(rank, split, False)]
        return found


# Elements of 1,200 adapters of r = split = 64 on Llama-3-8B: behind them, 32 bits do not count any more.
FAR = 1 << 32
LARGE_MEMBERS = [Member(64, 64), Member(16, 16), Member(16, 1, False), Member(64, 16), Member(64, 1, False)]


def check_kernel(setting: Setting, part: str) -> Iterator[Row]:
    """One row for each case of a part, a dtype or "llama", with `correct` and the largest error."""
    torch.manual_seed(0)
    yield from _llama_cases(setting) if part == "llama" else _cases(setting, getattr(torch, part))


def _cases(setting: Setting, dtype: torch.dtype) -> Iterator[Row]:
    even = Widths(64, (64, 32, 128)) if setting.small else Widths(768, (768, 256, 2304))
    # Odd widths, and factors that begin at odd addresses.
    odd = Widths(45, (45, 90), 3) if setting.small else Widths(765, (765, 255, 1530), 3)
    for widths in (even, odd):
        members = widths.members((1, 4, 15, 16) if setting.small else RANKS)
        operands = mixed_pool(widths.d_in, widths.d_outs, members, dtype, setting.device, widths.gap)
        for tokens in (6,) if setting.small else (1, 7, 64, 300, 512):
            for name, draw in POPULARITY.items():
                slots = draw(tokens, len(members)).to(setting.device, torch.int32)
                yield _case(setting.operation[1], name, widths, slots, *operands)
        setting.say(f"kernel, {dtype}, {widths.d_in} wide: done")
    yield from _replays(setting, even, dtype)
    if setting.small and dtype == torch.float32:
        # Enough for tiles of tokens; in float32 alone, since Triton's interpreter cannot multiply bfloat16.
        slots = POPULARITY["uniform"](260, len(members)).to(setting.device, torch.int32)
        yield _case(setting.operation[1], "uniform", widths, slots, *operands)


def _llama_cases(setting: Setting) -> Iterator[Row]:
    """The layers of Llama-3-8B in bfloat16, decoding and prefilling; on a CPU in Triton's interpreter."""
    if not setting.on_gpu:
        setting = replace(setting, operation=find_operation(setting.device, interpreted=True))
    large = (Widths(4096, (4096, 1024, 1024)), Widths(4096, (14336, 14336)), Widths(14336, (4096,)))
    # The interpreter cuts bfloat16 off, and does not round.
    dtype = torch.float32 if setting.small else torch.bfloat16
    for widths in (Widths(64, (64, 64)),) if setting.small else large:
        operands = mixed_pool(widths.d_in, widths.d_outs, LARGE_MEMBERS, dtype, setting.device, 8)
        for tokens in (8,) if setting.small else (64, 320, 2048):
            slots = POPULARITY["with base_only"](tokens, len(LARGE_MEMBERS)).sort().values
            yield _case(setting.operation[1], "llama", widths, slots.to(setting.device, torch.int32), *operands)
    far = 8 if setting.small else FAR
    operands = behind(far, *operands)
    for tokens in (8,) if setting.small else (64, 320, 2048):
        slots = POPULARITY["with base_only"](tokens, len(LARGE_MEMBERS)).sort().values
        yield _case(setting.operation[1], "large pool", widths, slots.to(setting.device, torch.int32), *operands)
    # The highest rank that is served, where it is the width: a segment has one input.
    rank = 64 if setting.small else MOST_RANK
    widths = Widths(rank, (rank,))
    members = [Member(rank, rank), Member(rank, 1, False), Member(rank, rank // 8)]
    operands = mixed_pool(rank, widths.d_outs, members, dtype, setting.device, 8)
    for tokens in (8,) if setting.small else (64, 320):
        slots = POPULARITY["with base_only"](tokens, len(members)).sort().values
        yield _case(setting.operation[1], "highest rank", widths, slots.to(setting.device, torch.int32), *operands)
    # Small blocks of tokens and large ones.
    widths = Widths(64, (64, 64)) if setting.small else large[1]
    # The third one has a gain and an offset, and segments of another rank: the activation has a launch of its own.
    for count in (2, 3):
        operands = mixed_pool(widths.d_in, widths.d_outs, LARGE_MEMBERS[:count], dtype, setting.device, 8)
        operands = behind(far, *operands)
        for tokens in (8,) if setting.small else (320, 2048):
            slots = POPULARITY["with base_only"](tokens, count).sort().values
            yield _activation_case(widths, slots.to(setting.device, torch.int32), *operands)


def check_case(
    operation: Grouped, widths: Widths, members: list[Member], dtype: torch.dtype, tokens: int, device: torch.device
) -> Row:
    """One case with a random adapter for each token."""
    pool, tables = mixed_pool(widths.d_in, widths.d_outs, members, dtype, device, widths.gap)
    slots = POPULARITY["uniform"](tokens, len(members)).to(device, torch.int32)
    return _case(operation, "uniform", widths, slots, pool, tables)


def _case(
    operation: Grouped, popularity: str, widths: Widths, slots: Tensor, pool: Tensor, tables: AdapterTables
) -> Row:
    x = torch.randn(len(slots), widths.d_in, device=pool.device).to(pool.dtype)
    guarded = [
        torch.randn(len(slots) + GUARD_ROWS, d_out, device=pool.device).to(pool.dtype) for d_out in widths.d_outs
    ]
    before = [y.clone() for y in guarded]
    ys = [y[: len(slots)] for y in guarded]
    operation(x, ys, range(len(ys)), AdapterBatch(slots), pool, tables)
    row = compared(x, guarded, before, slots, pool, tables)
    return _described(popularity, widths, pool.dtype, len(slots)) | row


def _activation_case(widths: Widths, slots: Tensor, pool: Tensor, tables: AdapterTables) -> Row:
    """The activation of an MLP with the updates of its two first layers, which share a launch."""
    # Imported here, because without a GPU Triton is imported for its interpreter alone.
    from sera_kernels.activation import updated_silu_mul

    x = torch.randn(len(slots), widths.d_in, device=pool.device).to(pool.dtype)
    gate, up = torch.randn(len(slots), sum(widths.d_outs), device=pool.device).to(pool.dtype).split(widths.d_outs, 1)
    layers = [gate.double(), up.double()]
    grouped_sera_reference(x, layers, range(2), AdapterBatch(slots), pool, tables)
    want = torch.nn.functional.silu(layers[0]) * layers[1]
    error = (updated_silu_mul(x, gate, up, range(2), AdapterBatch(slots), pool, tables).double() - want).norm()
    row = _described("activation", widths, pool.dtype, len(slots)) | {"error": (error / want.norm()).item()}
    return row | {"correct": row["error"] <= TOLERANCE[pool.dtype]}


def _described(popularity: str, widths: Widths, dtype: torch.dtype, tokens: int) -> Row:
    shape = f"{widths.d_in}->{','.join(map(str, widths.d_outs))}"
    return {"case": popularity, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens}


def compared(
    x: Tensor, got: list[Tensor], before: list[Tensor], slots: Tensor, pool: Tensor, tables: AdapterTables
) -> Row:
    """Errors of outputs, which may have rows beyond the tokens; rows that no adapter touches must be bit-equal."""
    tokens = len(slots)
    want = [y[:tokens].double() for y in before]
    grouped_sera_reference(x, want, range(len(want)), AdapterBatch(slots), pool, tables)
    worst = largest = 0.0
    untouched_equal = True
    for module, (mine, old, right) in enumerate(zip(got, before, want, strict=True)):
        adapted = (slots >= 0) & (tables.offset[module, slots.clamp(min=0).long()] != ABSENT)
        untouched_equal &= torch.equal(mine[tokens:], old[tokens:])
        untouched_equal &= torch.equal(mine[:tokens][~adapted], old[:tokens][~adapted])
        if adapted.any():
            error = mine[:tokens].double() - right
            scale = torch.maximum((right - old[:tokens].double()).norm(), right.norm())
            worst = max(worst, (error.norm() / scale).item())
            size = right.abs() + right.square().mean().sqrt()
            largest = max(largest, (error.abs() / size).max().item())
            # max() of a NaN and a number depends on their order.
            untouched_equal &= bool(error.isfinite().all())
    tolerance = TOLERANCE[pool.dtype]
    correct = untouched_equal and worst <= tolerance and largest <= SINGLE * tolerance
    return {"correct": correct, "error": worst, "largest_error": largest, "untouched_rows_equal": untouched_equal}


def _replays(setting: Setting, widths: Widths, dtype: torch.dtype) -> Iterator[Row]:
    """One graph, captured over one state, replayed over others: slots, table entries and pool contents change."""
    members = widths.members((1, 4, 16) if setting.small else (1, 16, 64, 256))
    pool, tables = mixed_pool(widths.d_in, widths.d_outs, members, dtype, setting.device, 8)
    for tokens in (3,) if setting.small else (64, 512):
        slots = POPULARITY["uniform"](tokens, len(members)).to(setting.device, torch.int32)
        x = torch.randn(tokens, widths.d_in, device=setting.device).to(dtype)
        before = [torch.randn(tokens, d_out, device=setting.device).to(dtype) for d_out in widths.d_outs]
        ys = [y.clone() for y in before]

        def step(x: Tensor = x, ys: list[Tensor] = ys, slots: Tensor = slots) -> None:
            # The batch is made inside, as it is in every step.
            setting.operation[1](x, ys, range(len(ys)), AdapterBatch(slots), pool, tables)

        replay = capture(step).replay if setting.on_gpu else step
        for change in (
            "none",
            "identical",
            "with base_only",
            "distinct",
            "adapter removed",
            "shapes swapped",
            "contents",
        ):
            if change in POPULARITY:
                slots.copy_(POPULARITY[change](tokens, len(members)))
            elif change == "adapter removed":
                tables.clear(int(slots[0].clamp(min=0)))
            elif change == "shapes swapped":
                for table in tables.tensors:
                    table.copy_(table.flip(1))
            elif change == "contents":
                pool.copy_(torch.where(pool.isnan(), pool, torch.randn_like(pool)))
            for y, old in zip(ys, before, strict=True):
                y.copy_(old)
            replay()
            row = _described(f"replay, {change}", widths, dtype, tokens) | compared(x, ys, before, slots, pool, tables)
            yield row | {"graph": setting.on_gpu}
