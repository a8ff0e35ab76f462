"""Whether a bundle can be served: it fits the device pool, and its updates of ordinary inputs are finite numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adapters_store import AdapterBundle, AdapterConfig, rank_fault
from sera_kernels import AdapterBatch, AdapterTables, grouped_sera
from sera_serve.errors import AdapterOverflow, AdapterTooLarge
from sera_serve.residency.packing import AdapterLayout, PackedAdapter, head_logits, join, lay_out
from sera_serve.residency.pool import DevicePool, head_layers, slot_columns

# Rows of random inputs. Most layers read a normalized state, whose elements are about 1. The last row stands for the
# largest elements that trained transformers are known to have, which are some thousands.
_ROWS = 4
_LARGE = 1e3
_REMEDY = "publish it with a smaller scaling or smaller values, such as from a training with a lower learning rate"


def check_servable(bundle: AdapterBundle, module_index: Mapping[str, int], pool: DevicePool) -> None:
    """Refuse a bundle that cannot be served: before it is published, not at its first request.

    An adapter that passes can still overflow inside the base; the engine ends the requests in which it does.

    Args:
        bundle: A validated bundle that fits the base.
        module_index: Row of each adaptable module in the pool's tables.
        pool: The pool that the adapter will be copied to: its size and dtype. Nothing is written to it.

    Raises:
        AdapterTooLarge: It is larger than the whole pool.
        AdapterOverflow: A scaling, the update of a module (its gain and offset applied) or a logit of the head is
            infinite or not a number, or the sum of squares of an update is, which the next normalization computes;
            `param` names the module.
    """
    layout, parts = lay_out(bundle, module_index)
    check_fits(layout.elements, pool)
    dtype = pool.data.dtype
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    for path, spec in bundle.config.modules.items():
        if not abs(spec.scaling) <= largest:
            raise AdapterOverflow(
                f"the scaling {spec.scaling:g} of {path} is larger than {dtype} can hold; {_REMEDY}", param=path
            )
    _probe(join(layout, parts, dtype), bundle.config, module_index)


def check_ranks(config: AdapterConfig) -> None:
    """Raise AdapterTooLarge where a layer's rank is higher than `rank_fault` allows, on a device of any kind."""
    for path, spec in config.modules.items():
        if fault := rank_fault(path, spec.rank, spec.d_in, spec.d_out):
            raise AdapterTooLarge(fault, param=f"adapter_config.modules.{path}.rank")


def check_fits(elements: int, pool: DevicePool) -> None:
    """Raise AdapterTooLarge where a packed run of so many elements is larger than the whole pool."""
    if elements > pool.capacity:
        itemsize = pool.data.element_size()
        raise AdapterTooLarge(
            f"the adapter takes {elements * itemsize} bytes, the device pool has {pool.capacity * itemsize}; "
            "raise pool_mib",
            param="adapter",
        )


def _probe(packed: PackedAdapter, config: AdapterConfig, module_index: Mapping[str, int]) -> None:
    """Compute updates and logits of random inputs by the served operation, from the packed run itself, on the CPU."""
    data = packed.data
    tables = slot_tables(packed.layout, len(module_index))
    batch = AdapterBatch(torch.zeros(_ROWS, dtype=torch.int32))
    generator = torch.Generator().manual_seed(0)
    inputs: dict[int, Tensor] = {}

    def random_inputs(width: int) -> Tensor:
        if width not in inputs:
            x = torch.randn(_ROWS, width, generator=generator)
            x[-1] *= _LARGE
            inputs[width] = x.to(data.dtype)
        return inputs[width]

    for path, spec in config.modules.items():
        update = data.new_zeros(_ROWS, spec.d_out)
        grouped_sera(random_inputs(spec.d_in), [update], [module_index[path]], batch, data, tables)
        if not torch.linalg.vector_norm(update, dim=1, dtype=torch.float32).isfinite().all():
            raise AdapterOverflow(
                f"the update of {path} overflows: for ordinary inputs it, or the sum of its squares, is infinite or "
                f"not a number; {_REMEDY}",
                param=path,
            )
    head = packed.layout.head
    if head is not None:
        layers = head_layers(data, head, lambda offset: offset)
        if not head_logits(random_inputs(head.layers[0].d_in), layers, head.activation).isfinite().all():
            raise AdapterOverflow(
                f"the head overflows: for ordinary inputs its logits are infinite or not a number; {_REMEDY}",
                param="head",
            )


def slot_tables(layout: AdapterLayout, modules: int) -> AdapterTables:
    """Tables of one slot, for a pool that holds the packed run alone."""
    tables = AdapterTables.empty(modules, 1)
    columns = slot_columns(layout, modules, lambda offset: offset)
    for table, values in zip(tables.host_arrays, columns, strict=True):
        table[:, 0] = values
    return tables
