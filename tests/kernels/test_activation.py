"""The kernel of an MLP's activation against torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from sera_kernels.activation import silu_mul

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
