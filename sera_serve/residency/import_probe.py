"""Imports a PEFT checkpoint, and compares what the served operation computes with PEFT's own arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters_store import AdapterBundle, ImportBase, PeftFiles, PeftImport, PeftLayer, import_peft, with_record
from sera_kernels import AdapterBatch, grouped_sera
from sera_serve.errors import AdapterOverflow, SeraServeError
from sera_serve.residency.bundle_check import slot_tables
from sera_serve.residency.packing import pack

# Rows of random inputs.
_ROWS = 4
# How many times the noise of the dtype a served update may differ from the exact one.
_FACTOR = 2.0


class ImportMismatch(SeraServeError):
    """The imported adapter does not compute what the checkpoint computes. The fault is the importer's."""

    code = "import_mismatch"
    status = 422


@dataclass(frozen=True)
class ImportedAdapter:
    """An adapter from elsewhere, ready to be published.

    Attributes:
        bundle: The adapter; its training record has the largest error of the comparison.
        warnings: What differs between the checkpoint and the base.
        largest_error: Largest difference to the exact update, relative to the largest element of that update.
    """

    bundle: AdapterBundle
    warnings: tuple[str, ...]
    largest_error: float


def import_checkpoint(files: PeftFiles, base: ImportBase, dtype: torch.dtype) -> ImportedAdapter:
    """Import a PEFT checkpoint for a base that is served in `dtype`. Blocks.

    Raises:
        InvalidBundle: The checkpoint is refused; see `import_peft`.
        AdapterOverflow: An update overflows in `dtype`.
        ImportMismatch: The bundle does not compute what PEFT computes.
    """
    return compared(import_peft(files, base), base, dtype)


def compared(imported: PeftImport, base: ImportBase, dtype: torch.dtype) -> ImportedAdapter:
    """Compare an imported adapter with PEFT's arithmetic. Blocks, and takes several times the adapter's memory.

    Raises:
        AdapterOverflow, ImportMismatch: As `import_checkpoint`.
    """
    module_index = {path: row for row, path in enumerate(base.shapes)}
    error = largest_error(imported.bundle, imported.layers, module_index, dtype)
    name = str(dtype).removeprefix("torch.")
    # Two digits: the last ones depend on the order in which a machine adds.
    bundle = with_record(imported.bundle, largest_error=float(f"{error:.1e}"), probe_dtype=name)
    return ImportedAdapter(bundle, imported.warnings, error)


def largest_error(
    bundle: AdapterBundle, layers: Mapping[str, PeftLayer], module_index: Mapping[str, int], dtype: torch.dtype
) -> float:
    """Compare the served update of every layer with `scaling * (B (A x) + lora_bias)` in float64, on random inputs.

    Args:
        bundle: The imported adapter.
        layers: PEFT's own tensors by path.
        module_index: Row of each adaptable module in the pool's tables.
        dtype: The dtype that the base is served in.

    Returns:
        The largest difference of any layer, relative to the largest element of the layer's exact update.

    Raises:
        AdapterOverflow: An update is infinite or not a number.
        ImportMismatch: A difference is more than twice the noise of `dtype`: PEFT's own difference in `dtype`, or what
            rounding the factors and adding in float32 may do.
    """
    packed = pack(bundle, module_index, dtype)
    tables = slot_tables(packed.layout, len(module_index))
    batch = AdapterBatch(torch.zeros(_ROWS, dtype=torch.int32))
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for path, layer in layers.items():
        x = torch.randn(_ROWS, layer.a.shape[1], generator=generator).to(dtype)
        vectors = [bundle.tensors.get(f"{path}.{name}") for name in ("gain", "offset")]
        exact = _peft_update(layer, x, torch.float64, vectors)
        # What the base gives is left out, so that it cannot hide a wrong update.
        served = x.new_zeros(_ROWS, len(layer.b))
        grouped_sera(x, [served], [module_index[path]], batch, packed.data, tables)
        if not served.isfinite().all():
            raise AdapterOverflow(
                f"the update of {path} overflows in {dtype}; serve the base in bfloat16 or float32", param=path
            )
        scale = max(float(exact.abs().max()), torch.finfo(torch.float32).tiny)
        error = float((served.double() - exact).abs().max()) / scale
        own = float((_peft_update(layer, x, dtype, vectors).double() - exact).abs().max()) / scale
        noise = _noise(layer, x, dtype) / scale
        # Where PEFT's own sums overflow in `dtype`, its difference is infinite and allows any.
        noise = max(own, noise) if math.isfinite(own) else noise
        if error > _FACTOR * noise:
            raise ImportMismatch(
                f"layer {path}: the update differs from PEFT's by {error:.1e} of its size; the noise of {dtype} is "
                f"{noise:.1e}; report this checkpoint, and merge the adapter into the base meanwhile",
                param=path,
            )
        largest = max(largest, error)
    return largest


def _peft_update(layer: PeftLayer, x: Tensor, dtype: torch.dtype, vectors: list[Tensor | None]) -> Tensor:
    """What PEFT's layers make of an output of zeros, every tensor in `dtype`; DoRA's vectors are the bundle's."""
    hidden = torch.nn.functional.linear(x.to(dtype), layer.a.to(dtype))
    bias = None if layer.lora_bias is None else layer.lora_bias.to(dtype)
    update = torch.nn.functional.linear(hidden, layer.b.to(dtype), bias) * layer.scaling
    gain, offset = vectors
    if layer.magnitude is None or gain is None:
        return update
    update = update * gain.to(dtype)
    return update if offset is None else update + offset.to(dtype)


def _noise(layer: PeftLayer, x: Tensor, dtype: torch.dtype) -> float:
    """What rounding may change in an element of the update.

    Each factor is rounded to `dtype` by itself, so that the errors of a product's terms add like random numbers: to
    eps(dtype) times the root of the sum of the terms' squares. Adding n terms in float32, one after another, adds about
    eps(float32) times the root of n.
    """
    squares = x.double().square() @ layer.a.double().square().T @ layer.b.double().square().T
    terms = layer.a.shape[1] + layer.rank
    relative = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * math.sqrt(terms)
    return abs(layer.scaling) * float(squares.max().sqrt()) * relative
