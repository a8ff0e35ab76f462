"""Root-mean-square norm in one Triton launch: torch's own takes two to three times as long for the rows of a decode.

Triton 3.4 or newer is required. Without a GPU, the kernel runs if TRITON_INTERPRET=1 was set before this module is
imported.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_WIDTH = 16384
"""A row is held in the registers of one program."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis.

    Sums are in float32. The quotient is rounded to x's dtype before the product, as in transformers' norms.

    Args:
        x: (..., width), contiguous, float32, bfloat16 or float16; width at most `LARGEST_WIDTH`.
        weight: (width,), contiguous, of x's dtype.
        eps: Added to the mean.
    """
    width = x.shape[-1]
    y = torch.empty_like(x)
    rows = x.numel() // width
    if rows == 0:
        return y
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _norm_kernel[(rows,)](x, weight, y, eps, WIDTH=width, BLOCK=block, num_warps=min(8, max(1, block // 512)))
    return y


@triton.jit
def _norm_kernel(x, weight, y, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * WIDTH
    at = tl.arange(0, BLOCK)
    values = tl.load(x + row + at, mask=at < WIDTH, other=0)
    scale = tl.load(weight + at, mask=at < WIDTH, other=0).to(tl.float32)
    wide = values.to(tl.float32)
    quotient = wide * tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    tl.store(y + row + at, quotient.to(values.dtype).to(tl.float32) * scale, mask=at < WIDTH)
