"""Root-mean-square norm in one Triton launch, by itself and together with the sum before it.

torch's own norm takes two to three times as long for the rows of a decode. A decoder layer adds an output to the
residual stream and normalizes the sum. `add_norm` does both, and adds the adapters' updates to that output before.

Triton 3.6 or newer is required. Without a GPU, the kernels run if TRITON_INTERPRET=1 was set before this module is
imported.
"""

# Triton's own language: its values have no Python type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sera_kernels.launches import vector_elements

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
        _norm_kernel[(rows,)](x, weight, y, eps, WIDTH=width, BLOCK=block, **_options(block))
    return y


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Add `y` to `x`, and normalize the sum.

    Semantics: y = y + update; hidden = x + y; normed = `rms_norm(hidden)`. Each is rounded to the dtype.

    Args:
        x: (tokens, width), contiguous, float32, bfloat16 or float16; width at most `LARGEST_WIDTH`.
        y: (tokens, width), of x's dtype; rows may be farther apart than their width.
        weight: (width,), contiguous, of x's dtype.
        eps: Added to the mean of squares.
        update: As y.

    Returns:
        hidden and normed, both (tokens, width) and contiguous.
    """
    tokens, width = x.shape
    hidden, normed = torch.empty_like(x), torch.empty_like(x)
    if tokens == 0:
        return hidden, normed
    block = triton.next_power_of_2(width)
    more = [] if update is None else [update]
    with torch.cuda.device_of(x):
        _add_norm_kernel[(tokens,)](
            x, y, y if update is None else update, weight, hidden, normed,
            y.stride(0), 0 if update is None else update.stride(0), eps,
            WIDTH=width, BLOCK=block, VEC=vector_elements(x, y, *more), HAS_UPDATE=update is not None,
            **_options(block),
        )  # fmt: skip
    return hidden, normed


def _options(block: int) -> dict[str, Any]:
    # Fusion is the default so far. Triton 3.9 warns that the default will change.
    return {"num_warps": min(8, max(1, block // 512)), "enable_fp_fusion": True}


@triton.jit
def _norm_kernel(x, weight, y, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * WIDTH
    at = tl.arange(0, BLOCK)
    values = tl.load(x + row + at, mask=at < WIDTH, other=0)
    scale = tl.load(weight + at, mask=at < WIDTH, other=0).to(tl.float32)
    wide = values.to(tl.float32)
    quotient = wide * tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    tl.store(y + row + at, quotient.to(values.dtype).to(tl.float32) * scale, mask=at < WIDTH)


@triton.jit(do_not_specialize=["y_stride", "update_stride"])
def _add_norm_kernel(
    x, y, update, weight, hidden, normed, y_stride, update_stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, HAS_UPDATE: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    values = tl.load(x + row * WIDTH + at, mask=inside, other=0)
    output = tl.load(y + row * (y_stride // VEC * VEC) + at, mask=inside, other=0)
    dtype = values.dtype
    if HAS_UPDATE:
        more = tl.load(update + row * (update_stride // VEC * VEC) + at, mask=inside, other=0)
        output = (output.to(tl.float32) + more.to(tl.float32)).to(dtype)
    scale = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    total = (values.to(tl.float32) + output.to(tl.float32)).to(dtype)
    tl.store(hidden + row * WIDTH + at, total, mask=inside)
    wide = total.to(tl.float32)
    quotient = wide * tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    tl.store(normed + row * WIDTH + at, quotient.to(dtype).to(tl.float32) * scale, mask=inside)
