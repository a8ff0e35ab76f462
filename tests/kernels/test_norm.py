"""The norm's kernel against transformers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sera_kernels.norm import add_norm, rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 3, 64), (5, 1), (2, 2, 100), (3, 4096), (0, 8)])
def test_it_gives_what_transformers_gives(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(shape[-1], eps=1e-3).to(dtype)
    nn.init.normal_(norm.weight)
    x = torch.randn(shape).to(dtype)
    # A row for which eps counts.
    x[:1] *= 0.01
    # The interpreter cuts bfloat16 off where a GPU rounds, twice here.
    rtol = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2**-6}[dtype]
    torch.testing.assert_close(rms_norm(x, norm.weight.detach(), 1e-3), norm(x), rtol=rtol, atol=1e-7)


def test_a_sum_of_squares_that_overflows_gives_zeros_and_nan_stays() -> None:
    # As transformers' own: what makes such an overflow visible rests on it.
    x = torch.tensor([[4e19, 1.0], [torch.nan, 1.0], [torch.inf, 1.0]])
    with np.errstate(over="ignore", invalid="ignore"):
        got, want = rms_norm(x, torch.ones(2), 1e-6), LlamaRMSNorm(2)(x)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.detach().nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(3, 64), (1, 1), (2, 100), (2, 4096), (0, 8), (2, 45)])
def test_sum_update_and_norm_in_one_launch(tokens: int, width: int, dtype: torch.dtype) -> None:
    weight, x = torch.randn(width).to(dtype), torch.randn(tokens, width).to(dtype)
    # Parts of one product: their rows are not adjacent.
    y, update = (torch.randn(tokens, 2 * width).to(dtype)[:, :width] for _ in range(2))
    # The interpreter cuts bfloat16 off where a GPU rounds.
    unit = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2**-6}[dtype]
    for more, total in ((None, x + y), (update, x + (y + update))):
        hidden, normed = add_norm(x, y, weight, 1e-3, more)
        assert hidden.is_contiguous() and normed.is_contiguous()
        torch.testing.assert_close(hidden, total, rtol=unit, atol=unit * 4)
        torch.testing.assert_close(normed, rms_norm(hidden, weight, 1e-3), rtol=unit, atol=unit)
