"""One adapter as one contiguous run of elements, ready to be copied to the device at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters_store import Activation, AdapterBundle, AdapterConfig, reused_memory
from sera_kernels import ShapeClasses

T = TypeVar("T")
# Elements; keeps every module's factors on a 16-byte boundary in the smallest dtype.
ALIGNMENT = 8
# Elements that are joined at a time where the dtype changes: what is joined stays in the processor's cache.
_JOINED = 1 << 18
# The largest factor of a base layer's outputs that cannot make them overflow. Gains of trained adapters are about 1.
# Three layers in a row with this one make outputs 4,096 times as large, where some thousands is the most that trained
# transformers have, and float32's squares overflow at 1e19.
_SMALL_GAIN = 16.0
MODULE = np.dtype(
    [
        ("index", np.int32),
        ("offset", np.int64),
        ("rank", np.int32),
        ("split", np.int32),
        ("use_mixer", np.bool_),
        ("scaling", np.float64),
        ("vectors", np.int64),
    ]
)
"""Where one module's factors lie in the packed run, and their shape.

`index` is the module's row in the device tables, `offset` the first element of its factors, relative to the start of
the run. `vectors` is the first element of the gain and the offset, likewise, or `NO_VECTORS`. Where the bundle has one
of the two, the packed run has both: a gain of 1 or an offset of 0 takes little room, and kernels read one place.
"""
NO_VECTORS = -1
# One for all adapters.
_NOTHING: dict[str, Any] = {}
_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
}


@dataclass(frozen=True)
class PackedLinear:
    """Where a linear layer's weight (d_out, d_in) and bias (d_out,) lie in the packed run."""

    weight_offset: int
    bias_offset: int
    d_out: int
    d_in: int


@dataclass(frozen=True)
class PackedHead:
    """An adapter's head: its layers, first to last, and the activation after the first of two."""

    layers: tuple[PackedLinear, ...]
    activation: Activation | None = None


@dataclass(frozen=True, eq=False)
class AdapterLayout:
    """What a packed run holds and where. It is kept for every adapter in host memory or on the device.

    It is a few objects, whatever the number of modules: those of thousands of adapters are visited by each full
    garbage collection, for which all threads wait.

    Attributes:
        digest: Content digest of the bundle it came from, or of the combination.
        config: The bundle's configuration, without what nobody reads of it any more: modules, training, template.
        modules: (modules,) of `MODULE`, in the order of their offsets.
        elements: Length of the run.
        stretch: The most by which the update of a layer can be longer than the layer's input. It is infinite for
            adapters of generation: to find it takes 4 ms of a load, and only their embeddings would use it.
    """

    digest: str
    config: AdapterConfig
    modules: NDArray[np.void]
    head: PackedHead | None
    elements: int
    stretch: float = math.inf

    @cached_property
    def classes(self) -> ShapeClasses:
        """The kinds of shapes of its modules."""
        shapes = zip(self.modules["rank"].tolist(), self.modules["split"].tolist(), strict=True)
        found: ShapeClasses = _one_of_each(ShapeClasses.of(shapes, bool((self.modules["vectors"] != NO_VECTORS).any())))
        return found

    @property
    def chunks(self) -> list[int]:
        """Elements of each chunk, which must stay whole: a module's factors, its vectors, a head's weight or bias."""
        modules, vectors = self.modules["offset"], self.modules["vectors"]
        starts = sorted([*modules.tolist(), *vectors[vectors != NO_VECTORS].tolist()])
        for layer in self.head.layers if self.head is not None else ():
            starts += [layer.weight_offset, layer.bias_offset]
        return [end - start for start, end in pairwise([*starts, self.elements])]


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter in the pool's dtype and layout, on the host.

    Attributes:
        layout: What `data` holds.
        data: (elements,), the factors and vectors in the order of the layout's modules, then the head.
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


def packed_elements(config: AdapterConfig) -> int:
    """The length of the packed run of any bundle with this configuration: the `elements` of its layout."""
    chunks = []
    for spec in config.modules.values():
        vectors = 2 * spec.d_out if spec.has_gain or spec.has_offset else 0
        chunks += [spec.parameters - (spec.has_gain + spec.has_offset) * spec.d_out, vectors]
    if config.has_head:
        width = config.base.hidden_size
        if config.head is not None:
            chunks += [config.head.width * width, config.head.width]
            width = config.head.width
        chunks += [config.num_labels * width, config.num_labels]
    return sum(chunk + -chunk % ALIGNMENT for chunk in chunks)


def pack(
    bundle: AdapterBundle, module_index: Mapping[str, int], dtype: torch.dtype, digest: str | None = None
) -> PackedAdapter:
    """Lay out a bundle as the grouped operation reads it: per module A, then C, then B, row-major, then its vectors.

    Args:
        bundle: A validated bundle that fits the base.
        module_index: Row of each adaptable module in the device tables.
        dtype: The pool's dtype.
        digest: The adapter's name in caches, where it is not the bundle's own digest.
    """
    return join(*lay_out(bundle, module_index, digest), dtype)


def join(layout: AdapterLayout, parts: list[Tensor], dtype: torch.dtype) -> PackedAdapter:
    """Copy what `lay_out` gave into one run; arguments as of `pack`."""
    data = torch.frombuffer(reused_memory(layout.elements * dtype.itemsize), dtype=dtype)
    _join(parts, data)
    return PackedAdapter(layout, data)


def lay_out(
    bundle: AdapterBundle, module_index: Mapping[str, int], digest: str | None = None
) -> tuple[AdapterLayout, list[Tensor]]:
    """The layout of a bundle's packed run, and the tensors that the run joins; nothing is copied. As of `pack`."""
    config, flat = bundle.config, bundle.flat_tensors()
    parts: list[Tensor] = []
    end = 0

    def place(*tensors: Tensor) -> int:
        nonlocal end
        start = end
        parts.extend(tensors)
        end += sum(map(len, tensors))
        if padding := -end % ALIGNMENT:
            parts.append(tensors[0].new_zeros(padding))
            end += padding
        return start

    modules = []
    for path, spec in config.modules.items():
        offset = place(*(flat[f"{path}.{name}"] for name in _factor_names(spec.use_mixer)))
        vectors = place(*_vectors(flat, path)) if spec.has_gain or spec.has_offset else NO_VECTORS
        shape = spec.rank, spec.split, spec.use_mixer, spec.scaling
        modules.append((module_index[path], offset, *shape, vectors))
    head = None
    stretch = math.inf if config.task == "generate" else _stretch(config, flat)
    if config.has_head:
        names = ["head"] if config.head is None else ["head.dense", "head"]
        layers = []
        for name in names:
            weight, bias = flat[f"{name}.weight"], flat[f"{name}.bias"]
            layers.append(PackedLinear(place(weight), place(bias), len(bias), len(weight) // len(bias)))
        head = PackedHead(tuple(layers), None if config.head is None else config.head.activation)
    left_out = {"modules": _NOTHING, "training": _NOTHING, "chat_template": None}
    kept = config.model_copy(update=left_out | {"base": _one_of_each(config.base)})
    return AdapterLayout(digest or bundle.digest, kept, np.array(modules, MODULE), head, end, stretch), parts


def _vectors(flat: Mapping[str, Tensor], path: str) -> tuple[Tensor, Tensor]:
    """The gain and the offset (d_out,) of a module; 1 and 0 where the bundle has none."""
    gain, offset = flat.get(f"{path}.gain"), flat.get(f"{path}.offset")
    if gain is None:
        assert offset is not None
        return torch.ones_like(offset), offset
    return gain, torch.zeros_like(gain) if offset is None else offset


def _stretch(config: AdapterConfig, flat: Mapping[str, Tensor]) -> float:
    """The greatest product of scaling and norms of factors: no update is longer, relative to its input.

    Small gains multiply it, and the offset's norm is added. It is infinite with a gain above `_SMALL_GAIN`, which also
    multiplies the base's output.
    """
    stretch = 0.0
    for path, spec in config.modules.items():
        # A block-diagonal factor lengthens nothing by more than the norm of its blocks' elements.
        factors = [flat[f"{path}.{name}"] for name in _factor_names(spec.use_mixer)]
        norms = [float(torch.linalg.vector_norm(factor, dtype=torch.float32)) for factor in factors]
        most = abs(spec.scaling) * math.prod(norms)
        if spec.has_gain:
            gain = float(flat[f"{path}.gain"].abs().max())
            most = most * max(gain, 1.0) if gain <= _SMALL_GAIN else math.inf
        if spec.has_offset:
            most += float(torch.linalg.vector_norm(flat[f"{path}.offset"], dtype=torch.float32))
        # The norms of huge factors are infinite, and with a factor of zeros their product is not a number.
        stretch = max(stretch, most if most == most else math.inf)
    return stretch


def head_logits(states: Tensor, layers: Sequence[tuple[Tensor, Tensor]], activation: Activation | None) -> Tensor:
    """The scores of a classifier's head.

    Args:
        states: (rows, hidden), pooled; or the states of tokens.
        layers: Weight (d_out, d_in) and bias (d_out,) of each layer, first to last.
        activation: What comes after the first of two layers.

    Returns:
        (rows, rows of the head), in the dtype of `states`.
    """
    linear = torch.nn.functional.linear
    if activation is not None:
        states = _ACTIVATIONS[activation](linear(states, *layers[0]))
    return linear(states, *layers[-1])


@lru_cache(maxsize=256)
def _one_of_each(value: T) -> T:
    """The first of equal values, which takes the place of all others."""
    return value


def _factor_names(use_mixer: bool) -> list[str]:
    return ["sera_a", "sera_c", "sera_b"] if use_mixer else ["sera_a", "sera_b"]


def _join(parts: list[Tensor], out: Tensor) -> None:
    """Copy all parts (elements,), one after another, into `out`, which may be of another dtype."""
    # One copy for all parts: torch gives up the interpreter's lock during each operation, and in a busy server waits to
    # get the lock back.
    if all(part.dtype == out.dtype for part in parts):
        torch.cat(parts, out=out)
        return
    # torch.cat is slow where it changes the dtype: 1.2 ms instead of 0.5 for 168 parts of 168 KiB together. To join all
    # parts first would make the largest block that a loader thread's heap ever holds.
    begin = end = first = 0
    for last, part in enumerate(parts, 1):
        end += len(part)
        if end - begin >= _JOINED or last == len(parts):
            out[begin:end].copy_(torch.cat(parts[first:last]))
            begin, first = end, last
