"""One adapter as one contiguous run of elements, ready to be copied to the device at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from adapters_store import AdapterBundle, AdapterConfig, writable_memory
from sera_kernels import ShapeClasses

# Elements; keeps every module's factors on a 16-byte boundary in the smallest dtype.
ALIGNMENT = 8
# Elements that are joined at a time where the dtype changes: what is joined stays in the processor's cache.
_JOINED = 1 << 18


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
    """What a packed run holds and where. It is kept for every adapter that is on the device or waits for room there.

    Attributes:
        digest: Content digest of the bundle it came from.
        config: The bundle's configuration.
        modules: In the order of their offsets.
        elements: Length of the run.
        gain: For a classifier, the most by which the update of a layer can be longer than the layer's input.
    """

    digest: str
    config: AdapterConfig
    modules: tuple[PackedModule, ...]
    head: PackedHead | None
    elements: int
    gain: float = math.inf

    @cached_property
    def classes(self) -> ShapeClasses:
        """The kinds of shapes of its modules."""
        return ShapeClasses.of((module.rank, module.split) for module in self.modules)

    @cached_property
    def chunks(self) -> tuple[int, ...]:
        """Elements of each chunk, which must stay whole: a module, the head's weight, the head's bias."""
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
        """Host memory of the adapter in bytes."""
        return self.data.numel() * self.data.element_size()


def pack(bundle: AdapterBundle, module_index: Mapping[str, int], dtype: torch.dtype) -> PackedAdapter:
    """Lay out a bundle as the grouped operation reads it: per module A, then C, then B, row-major.

    Args:
        bundle: A validated bundle that fits the base.
        module_index: Row of each adaptable module in the device tables.
        dtype: The pool's dtype.
    """
    return join(*lay_out(bundle, module_index), dtype)


def join(layout: AdapterLayout, parts: Sequence[Tensor], dtype: torch.dtype) -> PackedAdapter:
    """Copy what `lay_out` gave into one run; arguments as of `pack`."""
    data = torch.frombuffer(writable_memory(layout.elements * dtype.itemsize), dtype=dtype)
    _join(parts, data)
    return PackedAdapter(layout, data)


def lay_out(bundle: AdapterBundle, module_index: Mapping[str, int]) -> tuple[AdapterLayout, list[Tensor]]:
    """The layout of a bundle's packed run, and the tensors that the run joins; nothing is copied."""
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
        offset = place(*(bundle.tensors[f"{path}.{name}"] for name in _factor_names(spec.use_mixer)))
        modules.append(PackedModule(module_index[path], offset, spec.rank, spec.split, spec.use_mixer, spec.scaling))
    head, gain = None, math.inf
    if bundle.config.task == "classify":
        gain = _gain(bundle)
        weight, bias = bundle.tensors["head.weight"], bundle.tensors["head.bias"]
        head = PackedHead(place(weight), place(bias), *weight.shape)
    return AdapterLayout(bundle.digest, bundle.config, tuple(modules), head, end, gain), parts


def _gain(bundle: AdapterBundle) -> float:
    """The greatest product of scaling and norms of factors: no update is longer, relative to its input."""
    gain = 0.0
    for path, spec in bundle.config.modules.items():
        # A block-diagonal factor lengthens nothing by more than the norm of its blocks' elements.
        factors = [bundle.tensors[f"{path}.{name}"] for name in _factor_names(spec.use_mixer)]
        norms = [float(torch.linalg.vector_norm(factor, dtype=torch.float32)) for factor in factors]
        gain = max(gain, abs(spec.scaling) * math.prod(norms))
    # The norms of huge factors are infinite, and with a factor of zeros their product is not a number.
    return gain if gain == gain else math.inf


def _factor_names(use_mixer: bool) -> list[str]:
    return ["sera_a", "sera_c", "sera_b"] if use_mixer else ["sera_a", "sera_b"]


def _join(parts: Sequence[Tensor], out: Tensor) -> None:
    """Copy the elements of all parts, one after another, into `out`, which may be of another dtype."""
    # One copy for all parts: torch gives up the interpreter's lock during each operation, and in a busy server waits to
    # get the lock back. (A view takes so little time that no other thread gets the lock: beside a busy thread 168 views
    # and one copy take no longer than one operation for all views and one copy.)
    views = [part.view(-1) for part in parts]
    if all(view.dtype == out.dtype for view in views):
        torch.cat(views, out=out)
        return
    # torch.cat is slow where it changes the dtype: 1.2 ms instead of 0.5 for 168 parts of 168 KiB together. To join all
    # parts first would make the largest block that a loader thread's heap ever holds.
    begin = end = first = 0
    for last, view in enumerate(views, 1):
        end += view.numel()
        if end - begin >= _JOINED or last == len(views):
            out[begin:end].copy_(torch.cat(views[first:last]))
            begin, first = end, last
