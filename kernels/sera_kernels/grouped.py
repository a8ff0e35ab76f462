"""The grouped operation: one call adds the update of each token's adapter to the outputs of the base layers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from sera_kernels.operands import NO_ADAPTER, AdapterBatch, AdapterTables
from sera_kernels.shape_classes import ShapeClasses
from sera_kernels.torch_path import grouped_sera_torch

try:
    from sera_kernels.numba_path import grouped_sera_numba
except ImportError:  # numba is optional: for some time after a Python release, numba has no build for it
    grouped_sera_numba = None  # type: ignore[assignment]


def grouped_sera(
    x: Tensor,
    outputs: Sequence[Tensor],
    modules: Sequence[int],
    batch: AdapterBatch,
    pool: Tensor,
    tables: AdapterTables,
) -> None:
    """Add each token's adapter update, in place, to the outputs of layers that share the input `x`.

    Semantics, for token t with slot s = batch.token_slots[t], and each output y with its module m:
        y[t] += scaling[m, s] * ((x[t] A) C) B     if s >= 0 and offset[m, s] >= 0
        y[t] = gain * y[t] + offset                then, if vectors[m, s] >= 0, element by element
        y[t] stays as it is, bit for bit           otherwise
    The outputs must be complete before, with the layers' biases: a gain is a factor of the whole.
    A and B are block-diagonal with split[m, s] blocks (paper, section 3.2). Without a mixer, C is the identity. All
    sums are in float32. The vectors take a pass of their own, only where the batch may have any, by
    `ShapeClasses.vectors`. There is no gradient: training uses the layers' autograd.

    Args:
        x: (tokens, d_in), contiguous. float32, bfloat16 or float16.
        outputs: One contiguous (tokens, d_out) tensor for each layer, of x's dtype. Changed in place.
        modules: The layers' rows in `tables`, in the order of `outputs`.
        batch: The slot of each token. Made once for each step.
        pool: (elements,), contiguous. The factors of all resident adapters, of x's dtype.
        tables: The offset and the shape of each adapter's factors.

    Raises:
        ValueError: A shape, a layout or a dtype does not fit, or a rank is above `MOST_RANK`.
    """
    if x.dim() != 2 or len(batch.token_slots) != len(x):
        raise ValueError(f"x must be (tokens, d_in) with {len(batch.token_slots)} tokens, not {tuple(x.shape)}")
    if len(outputs) != len(modules):
        raise ValueError(f"{len(outputs)} outputs, but {len(modules)} modules")
    if not all(tensor.is_contiguous() for tensor in (x, pool, *outputs)):
        raise ValueError("x, pool and outputs must be contiguous")
    for y in outputs:
        if y.dim() != 2 or len(y) != len(x) or y.dtype != x.dtype:
            raise ValueError(f"output {tuple(y.shape)} {y.dtype} does not fit x {tuple(x.shape)} {x.dtype}")
    if pool.dtype != x.dtype:
        raise ValueError(f"the pool holds {pool.dtype}, activations are {x.dtype}")
    add_updates(x, outputs, modules, batch, pool, tables)


def add_updates(
    x: Tensor,
    outputs: Sequence[Tensor],
    modules: Sequence[int],
    batch: AdapterBatch,
    pool: Tensor,
    tables: AdapterTables,
) -> None:
    """Do the same as `grouped_sera` without its checks, for callers whose arguments fit by construction.

    Layers call this function dozens of times in a step, and there the checks would cost as much as the updates. x and
    the outputs may have the shape (..., width).
    """
    if x.is_cpu and x.dtype == torch.float32 and grouped_sera_numba is not None:
        grouped_sera_numba(x, outputs, modules, batch, pool, tables)
    else:
        rows = [y.view(-1, y.shape[-1]) for y in outputs]
        path_for(x.device)(x.view(-1, x.shape[-1]), rows, modules, batch, pool, tables)


def path_name(device: torch.device, dtype: torch.dtype) -> Literal["numba", "triton", "torch"]:
    """Say which path `add_updates` takes for tensors of a device and a dtype."""
    if device.type == "cpu" and dtype == torch.float32 and grouped_sera_numba is not None:
        return "numba"
    return "torch" if path_for(device) is grouped_sera_torch else "triton"


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Compile the operation, so that the first request with an adapter does not wait for the compiler.

    The first compilation after an installation takes seconds. Its result is kept on disk.
    """
    # One thread of a CPU computes few rows, and all threads compute many. A GPU has kernels for steps, and for prompts
    # of few tokens and of many.
    for rows in (1, 512, 1 << 15):
        x = torch.zeros(rows, 8, dtype=dtype, device=device)
        batch = AdapterBatch(torch.full((rows,), NO_ADAPTER, dtype=torch.int32, device=device))
        tables = AdapterTables.empty(1, 1, device)
        tables.set_classes(ShapeClasses(single=64, vectors=True))
        add_updates(x, [x.clone()], [0], batch, x.new_zeros(1), tables)
        if path_name(device, dtype) == "triton":
            from sera_kernels.activation import updated_silu_mul

            tables.set_classes(ShapeClasses(single=64))
            updated_silu_mul(x, x.clone(), x.clone(), [0, 0], batch, x.new_zeros(1), tables)


@cache
def path_for(device: torch.device) -> Callable[..., None]:
    """Return the function for a device and any dtype: Triton on a GPU if it is installed, else torch."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return grouped_sera_torch
    # Imported here, because the import of Triton takes as long as the rest of a small server's start.
    from sera_kernels.triton_path import grouped_sera_triton

    return grouped_sera_triton
