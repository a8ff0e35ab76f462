"""One adapter as one contiguous run of elements, ready to be copied to the device at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from adapters_store import AdapterBundle, AdapterConfig, writable_memory

# Elements; keeps every module's factors on a 16-byte boundary in the smallest dtype.
ALIGNMENT = 8


@dataclass(frozen=True)
class PackedModule:
    """Where one module's factors lie in the packed run, and their shape.

    Attributes:
        index: Row of the module in the device tables.
        offset: First element, relative to the start of the run.
    """

    index: int
    offset: int
    rank: int
    split: int
    use_mixer: bool
    scaling: float


@dataclass(frozen=True)
class PackedHead:
    """Where a classifier's weight (labels, hidden) and bias (labels,) lie in the packed run."""

    weight_offset: int
    bias_offset: int
    labels: int
    hidden_size: int


@dataclass(frozen=True)
class AdapterLayout:
    """What a packed run holds and where; all that is kept of an adapter once it is on the device.

    Attributes:
        digest: Content digest of the bundle it came from.
        config: The bundle's configuration.
        modules: In the order of their offsets.
        elements: Length of the run.
    """

    digest: str
    config: AdapterConfig
    modules: tuple[PackedModule, ...]
    head: PackedHead | None
    elements: int

    @cached_property
    def pieces(self) -> tuple[int, ...]:
        """Elements of each part that must stay whole: every module, the head's weight, the head's bias."""
        starts = [module.offset for module in self.modules]
        if self.head is not None:
            starts += [self.head.weight_offset, self.head.bias_offset]
        return tuple(end - start for start, end in pairwise([*starts, self.elements]))


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter in the pool's dtype and layout, on the host.

    Attributes:
        layout: What `data` holds.
        data: (elements,), the factors and the head, in the order of the layout's modules, then the head.
    """

    layout: AdapterLayout
    data: Tensor

    @property
    def digest(self) -> str:
        """Content digest of the bundle it came from."""
        return self.layout.digest

    @cached_property
    def nbytes(self) -> int:
        """Host memory that it takes: page-locked memory is given out in powers of two."""
        nbytes = self.data.numel() * self.data.element_size()
        return 1 << (nbytes - 1).bit_length() if self.data.is_pinned() else nbytes


def pack(
    bundle: AdapterBundle, module_index: Mapping[str, int], dtype: torch.dtype, pin_memory: bool = False
) -> PackedAdapter:
    """Lay out a bundle as the grouped operation reads it: per module A, then C, then B, row-major.

    Args:
        bundle: A validated bundle that fits the base.
        module_index: Row of each adaptable module in the device tables.
        dtype: The pool's dtype.
        pin_memory: Put the run in page-locked memory, for asynchronous copies to a GPU.
    """
    parts: list[Tensor] = []
    end = 0

    def place(*tensors: Tensor) -> int:
        nonlocal end
        start = end
        parts.extend(tensors)
        end += sum(tensor.numel() for tensor in tensors)
        if padding := -end % ALIGNMENT:
            parts.append(tensors[0].new_zeros(padding))
            end += padding
        return start

    modules = []
    for path, spec in bundle.config.modules.items():
        names = ["sera_a", "sera_c", "sera_b"] if spec.use_mixer else ["sera_a", "sera_b"]
        offset = place(*(bundle.tensors[f"{path}.{name}"] for name in names))
        modules.append(PackedModule(module_index[path], offset, spec.rank, spec.split, spec.use_mixer, spec.scaling))
    head = None
    if bundle.config.task == "classify":
        weight, bias = bundle.tensors["head.weight"], bundle.tensors["head.bias"]
        head = PackedHead(place(weight), place(bias), *weight.shape)
    if pin_memory:
        data = torch.empty(end, dtype=dtype, pin_memory=True)
    else:
        data = torch.frombuffer(writable_memory(end * dtype.itemsize), dtype=dtype)
    # Two operations for all parts: torch gives up the interpreter's lock for each, and in a busy server waits to have
    # it back. No joined copy in between: it would be the largest block that a loader's heap ever holds.
    torch._foreach_copy_(_unflatten_dense_tensors(data, parts), parts)
    return PackedAdapter(AdapterLayout(bundle.digest, bundle.config, tuple(modules), head, end), data)
