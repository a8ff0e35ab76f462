"""The activation of an MLP of Llama's form, silu(gate) * up, in one Triton launch, with the updates of gate and up.

Triton 3.4 or newer is required. Without a GPU, the kernel runs if TRITON_INTERPRET=1 was set before this module is
imported.
"""

# Triton's own language: its values have no Python type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sera_kernels.access import vector_elements

# Columns of a program.
_COLUMNS = 1024


def silu_mul(gate: Tensor, up: Tensor, updates: Sequence[Tensor] | None = None) -> Tensor:
    """Return silu(gate) * up, after the updates of both.

    Semantics: gate = gate + updates[0]; up = up + updates[1]; silu(gate) * up, with the roundings of torch.

    Args:
        gate: (tokens, d_ff), float32, bfloat16 or float16. Rows may be farther apart than their width.
        up: (tokens, d_ff), likewise, of the same dtype.
        updates: Two tensors as gate and up, with the same distance between rows; or None.

    Returns:
        (tokens, d_ff), contiguous.
    """
    tokens, width = gate.shape
    hidden = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if tokens == 0:
        return hidden
    more = [gate, up] if updates is None else list(updates)
    with torch.cuda.device_of(gate):
        _silu_mul_kernel[(tokens, triton.cdiv(width, _COLUMNS))](
            gate, up, *more, hidden, gate.stride(0), up.stride(0), more[0].stride(0), width,
            COLUMNS=_COLUMNS, VEC=vector_elements(gate, up, *more), HAS_UPDATES=updates is not None, num_warps=4,
        )  # fmt: skip
    return hidden


@triton.jit
def _updated(y, update, inside, HAS_UPDATE: tl.constexpr):
    """Return the values at y after their update, in float32."""
    value = tl.load(y, mask=inside, other=0)
    if HAS_UPDATE:
        more = tl.load(update, mask=inside, other=0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(value.dtype)
    return value.to(tl.float32)


@triton.jit(do_not_specialize=["gate_stride", "up_stride", "update_stride", "d_ff"])
def _silu_mul_kernel(
    gate, up, gate_update, up_update, hidden, gate_stride, up_stride, update_stride, d_ff,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, HAS_UPDATES: tl.constexpr,
):  # fmt: skip
    """A range of columns of one token."""
    row = tl.program_id(0).to(tl.int64)
    width = d_ff // VEC * VEC
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = n < width
    more = row * (update_stride // VEC * VEC) + n
    g = _updated(gate + row * (gate_stride // VEC * VEC) + n, gate_update + more, inside, HAS_UPDATES)
    u = _updated(up + row * (up_stride // VEC * VEC) + n, up_update + more, inside, HAS_UPDATES)
    # Rounded where torch, one operation after the other, would round.
    dtype = hidden.dtype.element_ty
    silu = (g / (1.0 + tl.exp(-g))).to(dtype).to(tl.float32)
    tl.store(hidden + row * width + n, (silu * u).to(dtype), mask=inside)
