"""The activation of an MLP of Llama's form, silu(gate) * up, in one Triton launch, with the updates of gate and up.

Triton 3.6 or newer is required. Without a GPU, the kernel runs if TRITON_INTERPRET=1 was set before this module is
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

from sera_kernels.launches import vector_elements
from sera_kernels.operands import AdapterBatch, AdapterTables
from sera_kernels.run_kernels import expand_silu_mul_runs
from sera_kernels.triton_path import EXPAND_BYTES, EXPAND_WIDTH, Workspace, expand_updates, reduce_updates

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
            enable_fp_fusion=True,
        )  # fmt: skip
    return hidden


def updated_silu_mul(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    modules: Sequence[int],
    batch: AdapterBatch,
    pool: Tensor,
    tables: AdapterTables,
) -> Tensor:
    """Return silu(gate) * up, after the updates of both, which are computed here.

    Semantics: as `grouped_sera` on gate and up, then `silu_mul`, with the same roundings.

    Args:
        x: (tokens, d_in), the input of both layers.
        gate: (tokens, d_ff), of x's dtype. Its contents are lost. Rows may be farther apart than their width.
        up: (tokens, d_ff), likewise, with the same distance between rows.
        modules: The rows of both layers in `tables`.
        batch: The slot of each token.
        pool: (elements,), of x's dtype.
        tables: The offset and the shape of each adapter's factors.

    Returns:
        (tokens, d_ff), contiguous.
    """
    workspace = reduce_updates(x, modules, batch, pool, tables)
    if workspace is None:
        return silu_mul(gate, up)
    if workspace.runs and not workspace.has_tiles and not workspace.classes.vectors:
        return _silu_mul_runs(workspace, gate, up)
    expand_updates(workspace, [gate, up])
    return silu_mul(gate, up)


def _silu_mul_runs(workspace: Workspace, gate: Tensor, up: Tensor) -> Tensor:
    """The second phase and the activation in one launch, for blocks of neighbours."""
    tokens, width = gate.shape
    hidden = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    pool = workspace.pool
    columns = EXPAND_WIDTH // pool.element_size()
    # As many bytes of both layers together as of one in `expand_runs`.
    block = max(EXPAND_BYTES // EXPAND_WIDTH // 2 // workspace.parts, 1)
    with torch.cuda.device_of(gate):
        expand_silu_mul_runs[(triton.cdiv(tokens, block), triton.cdiv(width, columns))](
            gate, up, hidden, gate.stride(0), width, *workspace.layers[:4],
            workspace.batch.token_slots, *workspace.shapes, workspace.tables.scaling, workspace.slots,
            *workspace.v_parts, M=block, COLUMNS=columns, PARTS=workspace.parts,
            VEC=vector_elements(gate, up, hidden, pool=pool), num_warps=4, **workspace.options,
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
