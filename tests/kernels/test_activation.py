"""The kernel of an MLP's activation against torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from sera_kernels import AdapterBatch, AdapterTables, grouped_sera_reference, triton_path
from sera_kernels.activation import silu_mul, updated_silu_mul

# The interpreter cuts bfloat16 off where a GPU rounds, up to three times here.
RTOL = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 3 * 2**-7}


def joined(tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two parts of one product: their rows are not adjacent."""
    first, second = torch.randn(tokens, 2 * width).to(dtype).split(width, 1)
    return first, second


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize(("tokens", "width"), [(3, 64), (2, 1), (1, 1100), (2, 2048), (2, 45), (0, 8)])
def test_it_gives_what_torch_gives(tokens: int, width: int, dtype: torch.dtype) -> None:
    gate, up = joined(tokens, width, dtype)
    more = joined(tokens, width, dtype)
    for updates, (g, u) in ((None, (gate, up)), (more, (gate + more[0], up + more[1]))):
        result = silu_mul(gate, up, updates)
        assert result.is_contiguous()
        # A sum that is rounded the other way may come out near zero.
        atol = 1e-7 if updates is None or dtype == torch.float32 else 0.05
        torch.testing.assert_close(result, silu(g) * u, rtol=RTOL[dtype], atol=atol)
    assert width < 64 or not tokens or (silu_mul(gate, up, more) - silu_mul(gate, up)).abs().max() > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["none", "large", "small"])
@pytest.mark.parametrize(
    ("shapes", "vectors"),
    [
        ([(8, 8), (4, 4), (1, 1)], False),
        # Of small blocks, several programs share the inputs.
        ([(32, 32), (16, 16), (1, 1)], False),
        ([(8, 8), (4, 1), (8, 2)], False),
        ([(8, 8)] * 3, True),
    ],
)
def test_updates_and_activation(
    shapes: list[tuple[int, int]], vectors: bool, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks != "none":
        monkeypatch.setattr(triton_path, "PREFILL_TOKENS", 0)
    if blocks == "large":
        monkeypatch.setattr(triton_path, "RUN_ROWS", 0)
    tables = AdapterTables.empty(2, 3)
    for slot, (rank, split) in enumerate(shapes):
        # The second adapter's factors are not on a boundary of 16 bytes.
        tables.offset[:, slot], tables.rank[:, slot], tables.split[:, slot] = 8 * slot + 3 * (slot == 1), rank, split
    tables.offset[1] += 2048
    tables.scaling.fill_(0.5)
    tables.mixer[:, 0] = 1
    if vectors:
        tables.vectors[:, 1] = 4096
    pool, x = torch.randn(8192) / 2, torch.randn(9, 64)
    batch = AdapterBatch(torch.tensor([0, 0, 0, 0, 0, 2, -1, 1, 1], dtype=torch.int32))
    gate, up = joined(9, 96, torch.float32)
    want = [gate.double().contiguous(), up.double().contiguous()]
    grouped_sera_reference(x, want, [0, 1], batch, pool, tables)
    result = updated_silu_mul(x, gate.clone(), up.clone(), [0, 1], batch, pool, tables)
    exact = silu(want[0]) * want[1]
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
    assert (result - silu(gate) * up)[:6].abs().max() > 0.1
