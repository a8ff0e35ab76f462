"""Pools of more elements than 32 bits count: those of thousands of adapters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sera_kernels import AdapterBatch, AdapterTables, grouped_sera, grouped_sera_reference, triton_path

# Elements before the adapters. Nothing touches them, so they take no memory.
BEFORE = (1 << 31) + 8
WIDTH, SHAPES = 64, ((16, 16, True), (8, 1, False), (16, 4, True))

CASES: dict[str, tuple[Callable[..., None], torch.dtype]] = {
    "numba": (grouped_sera, torch.float32),
    "torch": (grouped_sera, torch.bfloat16),
    "triton": (triton_path.grouped_sera_triton, torch.float16),
}


def far_adapters(dtype: torch.dtype) -> tuple[torch.Tensor, AdapterTables]:
    """Adapters of `SHAPES` on one layer, each with a gain and an offset, at the end of a large pool."""
    tables = AdapterTables.empty(1, len(SHAPES))
    chunks: list[torch.Tensor] = []
    for slot, (rank, split, mixer) in enumerate(SHAPES):
        tables.offset[0, slot] = BEFORE + sum(map(len, chunks))
        tables.rank[0, slot], tables.split[0, slot] = rank, split
        tables.mixer[0, slot], tables.scaling[0, slot] = int(mixer), 1.0
        chunks.append(torch.randn(2 * WIDTH * rank // split + mixer * rank**2) / 4)
        tables.vectors[0, slot] = BEFORE + sum(map(len, chunks))
        chunks += [1 + torch.randn(WIDTH) / 4, torch.randn(WIDTH)]
    factors = torch.cat(chunks)
    pool = torch.empty(BEFORE + len(factors), dtype=dtype)
    pool[BEFORE:] = factors
    return pool, tables


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_adapters_are_found_behind_two_billion_elements(
    case: str, prefill: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation, dtype = CASES[case]
    if prefill:
        monkeypatch.setattr(triton_path, "PREFILL_TOKENS", 0)
    pool, tables = far_adapters(dtype)
    slots = torch.tensor([0, 0, 1, -1, 2, 2] * (10 if prefill and case != "triton" else 1), dtype=torch.int32)
    x = torch.randn(len(slots), WIDTH).to(dtype)
    y = torch.randn(len(slots), WIDTH).to(dtype)
    want = y.double()
    grouped_sera_reference(x, [want], [0], AdapterBatch(slots), pool, tables)
    operation(x, [y], [0], AdapterBatch(slots), pool, tables)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())
