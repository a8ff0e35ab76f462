"""The grouped operation against its float64 reference."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import pytest
import torch
from torch import Tensor

from sera_kernels import (
    NO_ADAPTER,
    AdapterBatch,
    AdapterTables,
    ShapeClasses,
    grouped_sera,
    grouped_sera_reference,
    numba_path,
    warm_up,
)
from sera_kernels.numba_path import grouped_sera_numba
from sera_kernels.torch_path import grouped_sera_torch

SHAPES = [
    (8, 8, True),
    (8, 8, False),
    (16, 4, True),
    (4, 1, False),
    (4, 1, True),
    (64, 64, True),
    (1, 1, False),
]
POPULARITY = {
    "distinct": lambda tokens, slots: torch.arange(tokens) % slots,
    "identical": lambda tokens, slots: torch.full((tokens,), 3),
    "uniform": lambda tokens, slots: torch.randint(slots, (tokens,)),
    "skewed": lambda tokens, slots: (torch.rand(tokens).pow(3) * slots).long(),
    "with no adapter": lambda tokens, slots: torch.randint(-1, slots, (tokens,)),
    "no adapter": lambda tokens, slots: torch.full((tokens,), NO_ADAPTER),
}


def random_pool(
    d_in: int, d_outs: list[int], dtype: torch.dtype, vectors: bool = False
) -> tuple[Tensor, AdapterTables]:
    """Make one adapter of each shape, some without the second module. All other memory of the pool is NaN.

    With `vectors`, every second adapter has gains and offsets, some of them not in all modules.
    """
    tables = AdapterTables.empty(len(d_outs), len(SHAPES))
    chunks = [torch.full((5,), float("nan"))]
    for slot, (rank, split, mixer) in enumerate(SHAPES):
        for module, d_out in enumerate(d_outs):
            if module == 1 and slot % 3 == 1:
                continue
            size = (d_in + d_out) * (rank // split) + (rank**2 if mixer else 0)
            tables.offset[module, slot] = sum(map(len, chunks))
            tables.rank[module, slot], tables.split[module, slot] = rank, split
            tables.mixer[module, slot], tables.scaling[module, slot] = int(mixer), 0.5 + slot
            chunks += [torch.randn(size) / 8, torch.full((3,), float("nan"))]
            if vectors and slot % 2 == 0 and slot + module != 2:
                tables.vectors[module, slot] = sum(map(len, chunks))
                chunks += [1 + torch.randn(d_out) / 4, torch.randn(d_out), torch.full((2,), float("nan"))]
    return torch.cat(chunks).to(dtype), tables


PATHS = {"torch": grouped_sera_torch, "numba": grouped_sera_numba}


@pytest.mark.parametrize("path", ["torch", "numba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 40, 300])
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("vectors", [False, True])
def test_grouped_is_the_reference(vectors: bool, popularity: str, tokens: int, dtype: torch.dtype, path: str) -> None:
    # numba computes in float32 only. Other dtypes use the torch path.
    grouped = grouped_sera if path == "numba" and dtype != torch.float32 else PATHS[path]
    d_in, d_outs = 64, [128, 64, 192]
    pool, tables = random_pool(d_in, d_outs, dtype, vectors)
    assert tables.classes.vectors == vectors
    batch = AdapterBatch(POPULARITY[popularity](tokens, len(SHAPES)).to(torch.int32))
    x = torch.randn(tokens, d_in).to(dtype)
    got = [torch.randn(tokens, d_out).to(dtype) for d_out in d_outs]
    before = [y.clone() for y in got]
    want = [y.clone() for y in got]
    grouped(x, got, [0, 1, 2], batch, pool, tables)
    grouped_sera_reference(x, want, [0, 1, 2], batch, pool, tables)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for module, (mine, reference) in enumerate(zip(got, want, strict=True)):
        scale = reference.abs().max().item()
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance * scale)
        untouched = [
            token
            for token, slot in enumerate(batch.token_slots.tolist())
            if slot == NO_ADAPTER or tables.offset[module, slot] < 0
        ]
        assert torch.equal(mine[untouched], before[module][untouched])


@pytest.mark.parametrize("tokens", [1, 2])
def test_only_the_scaled_update_has_to_fit_the_dtype(tokens: int) -> None:
    tables = AdapterTables.empty(1, 1)
    tables.offset[0, 0], tables.rank[0, 0], tables.scaling[0, 0] = 0, 1, 1e-4
    x, y = torch.full((tokens, 64), 50.0).half(), torch.ones(tokens, 64).half()
    batch = AdapterBatch(torch.zeros(tokens, dtype=torch.int32))
    # The sum of 64 products of 50 and 60, times 60, is 11.5 million.
    grouped_sera_torch(x, [y], [0], batch, torch.full((128,), 60.0).half(), tables)
    assert y.unique().tolist() == [1153.0]


def test_reference_by_hand() -> None:
    # rank 2, split 2: A = [[1, 0], [2, 0], [0, 3], [0, 4]], C = [[0, 1], [1, 0]], B = [[5, 0], [0, 6]].
    pool = torch.tensor([1.0, 2, 3, 4, 0, 1, 1, 0, 5, 6])
    tables = AdapterTables.empty(1, 1)
    tables.offset[0, 0], tables.rank[0, 0], tables.split[0, 0] = 0, 2, 2
    tables.mixer[0, 0], tables.scaling[0, 0] = 1, 10.0
    y = torch.ones(1, 2)
    batch = AdapterBatch(torch.zeros(1, dtype=torch.int32))
    # x A = [1 + 4, 9 + 16] = [5, 25]; mixed = [25, 5]; times B = [125, 30].
    grouped_sera_reference(torch.tensor([[1.0, 2, 3, 4]]), [y], [0], batch, pool, tables)
    assert y.tolist() == [[1251.0, 301.0]]


def test_gain_and_offset_by_hand() -> None:
    # One adapter whose update is x: A = B = [[1]]. Its gain is 3, its offset 0.5.
    pool = torch.tensor([1.0, 1, 3, 0.5])
    tables = AdapterTables.empty(1, 2)
    tables.offset[0, 0], tables.rank[0, 0], tables.scaling[0, 0], tables.vectors[0, 0] = 0, 1, 1.0, 2
    # A slot that was given back keeps its other values.
    tables.vectors[0, 1] = 2
    batch = AdapterBatch(torch.tensor([0, 1, NO_ADAPTER], dtype=torch.int32))
    for grouped in (grouped_sera_reference, grouped_sera_torch, grouped_sera_numba):
        y = torch.full((3, 1), 10.0)
        grouped(torch.full((3, 1), 2.0), [y], [0], batch, pool, tables)
        assert y.flatten().tolist() == [36.5, 10.0, 10.0]


def test_vectors_are_looked_for_only_where_the_batch_may_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, tables = random_pool(64, [64], torch.float32, vectors=True)
    x, slots = torch.randn(5, 64), torch.tensor([0, 1, 4, -1, 3], dtype=torch.int32)
    monkeypatch.setattr(numba_path, "_apply_vectors", lambda *arguments: pytest.fail("they were looked for"))
    batch = AdapterBatch(slots, ShapeClasses.of([(4, 1)]))
    grouped_sera_numba(x, [torch.zeros(5, 64)], [0], batch, pool, tables)
    with pytest.raises(pytest.fail.Exception):
        grouped_sera_numba(x, [torch.zeros(5, 64)], [0], AdapterBatch(slots), pool, tables)


def test_arguments_that_do_not_fit_are_refused() -> None:
    pool, tables = random_pool(64, [64], torch.float32)
    batch = AdapterBatch(torch.zeros(4, dtype=torch.int32))
    x, y = torch.randn(4, 64), torch.randn(4, 64)
    with pytest.raises(ValueError, match="4 tokens"):
        grouped_sera(x[:3], [y[:3]], [0], batch, pool, tables)
    with pytest.raises(ValueError, match="does not fit"):
        grouped_sera(x, [y.half()], [0], batch, pool, tables)
    with pytest.raises(ValueError, match="1 outputs, but 2 modules"):
        grouped_sera(x, [y], [0, 1], batch, pool, tables)
    with pytest.raises(ValueError, match="the pool holds"):
        grouped_sera(x, [y], [0], batch, pool.half(), tables)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads through /proc, which is Linux's")
@pytest.mark.parametrize("threads", [1, 2])
def test_no_more_threads_compute_than_torch_has(threads: int) -> None:
    pool, tables = random_pool(64, [64], torch.float32)
    batch = AdapterBatch(torch.zeros(5000, dtype=torch.int32))
    x, y = torch.randn(5000, 64), torch.randn(5000, 64)

    def running() -> set[str]:
        return {thread.name for thread in Path("/proc/self/task").iterdir()}

    def new_threads() -> int:
        torch.set_num_threads(threads)
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
        before = running()
        grouped_sera(x, [y], [0], batch, pool, tables)
        # By name: threads of earlier tests may end meanwhile.
        return len(running() - before)

    # OpenMP gives its own pool to every thread that starts parallel work.
    with ThreadPoolExecutor(1) as thread:
        started = thread.submit(new_threads).result()
    assert started == min(threads, numba.config.NUMBA_NUM_THREADS) - 1


def test_warm_up_leaves_nothing_to_compile() -> None:
    torch.set_num_threads(max(2, torch.get_num_threads()))
    warm_up(torch.device("cpu"), torch.float32)
    functions = (
        numba_path._update,
        numba_path._update_parallel,
        numba_path._apply_vectors,
        numba_path._apply_vectors_parallel,
    )
    compiled = [len(f.signatures) for f in functions]
    assert min(compiled) == 1
    pool, tables = random_pool(64, [64, 128], torch.float32, vectors=True)
    for tokens in (1, 500):
        batch = AdapterBatch(torch.zeros(tokens, dtype=torch.int32))
        x = torch.randn(tokens, 64)
        grouped_sera(x, [torch.randn(tokens, 64), torch.randn(tokens, 128)], [0, 1], batch, pool, tables)
    assert [len(f.signatures) for f in functions] == compiled
