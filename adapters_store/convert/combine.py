"""Weighted sums of adapters as one adapter: factors side by side, in the greatest split that all parts have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import JsonValue
from torch import Tensor

from adapters_store.errors import CannotCombine
from adapters_store.format.bundle import AdapterBundle
from adapters_store.format.config import AdapterConfig, Method, ModuleSpec
from adapters_store.format.mmap_buffer import writable_memory
from adapters_store.format.validation import check_same_base, expected_shapes

MAX_PARTS = 8
"""The most adapters in one combination."""

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class _Place:
    """Where one part's factors of a module lie in the factors of the sum.

    Attributes:
        first: Its first row within the reduced vector of a segment of the sum.
        ratio: Its share of the sum's scaling, from -1 to 1.
    """

    first: int
    ratio: float


class Combination:
    """The exact weighted sum of adapters, made part by part, so that one part at a time is in memory beside the sum.

    Semantics: the update of a layer is sum_i w_i * scaling_i * A_i C_i B_i. In the greatest common divisor g of the
    parts' splits, A = [A_1 A_2 ...] and B = [B_1; B_2; ...] segment by segment, and C has the C_i on its diagonal; an
    adapter of a split that is a multiple of g has zeros between its blocks. The largest w_i * scaling_i becomes the
    scaling of the sum. The others' shares of it are multiplied into B_i in float64 and rounded once, to float32. A sum
    in a smaller dtype has the same numbers, rounded from float32.

    Classifiers have one head, which is not an update: the sum has the head that all parts have.

    Attributes:
        config: The configuration of the sum.
    """

    def __init__(
        self,
        configs: Sequence[AdapterConfig],
        weights: Sequence[float],
        names: Sequence[str] | None = None,
        training: Mapping[str, JsonValue] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Check that the parts can be added, and describe their sum; nothing large is allocated.

        Args:
            configs: Of the parts.
            weights: Of the parts, in the same order; finite.
            names: What messages call the parts; their places if None.
            training: The training record of the sum.
            dtype: Of the sum's factors; its head is float32.

        Raises:
            CannotCombine: There are no parts or too many, a weight is not finite, or what is no update differs: the
                task, pooling, labels, `max_length`, the head's shape, `multi_label`, the images, the chat template.
                Or a part has a gain or an offset, or a scaling times its weight is larger than float32 can hold.
            WrongBase: The parts were made for different bases.
        """
        self._names = list(names) if names is not None else [f"part {index + 1}" for index in range(len(configs))]
        self._configs = list(configs)
        self._dtype = dtype
        if not 1 <= len(configs) <= MAX_PARTS:
            raise CannotCombine(
                f"a combination has 1 to {MAX_PARTS} adapters, not {len(configs)}; combine some of them first",
                param="adapter",
            )
        for name, weight in zip(self._names, weights, strict=True):
            if not math.isfinite(weight):
                raise CannotCombine(f"the weight of {name} is {weight}; send a finite number", param="adapter")
        self._check_alike()
        # By layer and part.
        self._places: dict[tuple[str, int], _Place] = {}
        modules = {path: self._module(path, weights) for path in _paths(configs)}
        self.config = _config(self._configs, modules, training or {})
        self._bundle: AdapterBundle | None = None
        self._added = 0

    def add(self, bundle: AdapterBundle) -> None:
        """Write one part into the sum; parts come in the order of the configurations.

        Raises:
            CannotCombine: The classifier's head is not that of the first part.
        """
        part, self._added = self._added, self._added + 1
        if self._bundle is None:
            shapes = {name: shape for name, shape in expected_shapes(self.config).items() if not _is_head(name)}
            self._bundle = AdapterBundle(self.config, _zeros(shapes, self._dtype))
        tensors = self._bundle.tensors
        for path, spec in bundle.config.modules.items():
            total = self.config.modules[path]
            _write(tensors, path, spec, total, self._places[path, part], bundle.tensors)
        for name, tensor in bundle.tensors.items():
            if not _is_head(name):
                continue
            # A clone: the part's tensors share one buffer, which may go.
            if not torch.equal(tensors.setdefault(name, tensor.float().clone()), tensor.float()):
                raise CannotCombine(
                    f"{self._names[part]} and {self._names[0]} have different heads; adapters are added layer by "
                    "layer, and a head is no update that could be added: combine classifiers that share one head",
                    param="adapter",
                )

    def bundle(self) -> AdapterBundle:
        """The sum, after every part was added."""
        if self._bundle is None or self._added != len(self._configs):
            raise RuntimeError(f"{self._added} of {len(self._configs)} parts were added")
        return self._bundle

    def _check_alike(self) -> None:
        first = self._configs[0]
        for name, config in zip(self._names, self._configs, strict=True):
            check_same_base(config.base, first.base)
            for field in ("task", "labels", "pooling", "max_length", "head", "multi_label", "image"):
                ours, theirs = getattr(first, field), getattr(config, field)
                if ours != theirs:
                    raise CannotCombine(
                        f"{field} of {name} is {_shown(theirs)}, of {self._names[0]} {_shown(ours)}; a combination has "
                        f"one {field}: combine adapters that agree in it",
                        param="adapter",
                    )
            for path, spec in config.modules.items():
                if spec.has_gain or spec.has_offset:
                    raise CannotCombine(
                        f"{path} of {name} has a gain or an offset, which no sum of updates holds; leave {name} out",
                        param="adapter",
                    )
        if len(_templates(self._configs)) > 1:
            raise CannotCombine(
                "the adapters have different chat templates; combine adapters of which at most one has a template, or "
                "whose templates are the same",
                param="adapter",
            )

    def _module(self, path: str, weights: Sequence[float]) -> ModuleSpec:
        """The specification of one layer of the sum; notes the places of the parts that adapt the layer."""
        specs = {part: config.modules[path] for part, config in enumerate(self._configs) if path in config.modules}
        widths = {(spec.d_in, spec.d_out) for spec in specs.values()}
        if len(widths) > 1:
            raise CannotCombine(f"the adapters have different widths of {path}; they fit no one base", param="adapter")
        split = math.gcd(*(spec.split for spec in specs.values()))
        factors = {part: weights[part] * spec.scaling for part, spec in specs.items()}
        scaling = max(factors.values(), key=abs)
        if not abs(scaling) <= _LARGEST:
            raise CannotCombine(
                f"a weight times the scaling of {path} is {scaling:g}, larger than float32 can hold; send smaller "
                "weights",
                param="adapter",
            )
        first = 0
        for part, spec in specs.items():
            self._places[path, part] = _Place(first, factors[part] / scaling if scaling else 1.0)
            first += spec.rank // split
        d_in, d_out = widths.pop()
        # Without mixers, factors side by side need none.
        use_mixer = any(spec.use_mixer for spec in specs.values())
        return ModuleSpec(d_in=d_in, d_out=d_out, rank=first * split, split=split, use_mixer=use_mixer, scaling=scaling)


def combine(bundles: Sequence[AdapterBundle], weights: Sequence[float]) -> AdapterBundle:
    """The weighted sum of adapters in memory as one adapter; arguments and errors as of `Combination`."""
    combination = Combination([bundle.config for bundle in bundles], weights)
    for bundle in bundles:
        combination.add(bundle)
    return combination.bundle()


def _write(
    out: Mapping[str, Tensor],
    path: str,
    spec: ModuleSpec,
    total: ModuleSpec,
    place: _Place,
    tensors: Mapping[str, Tensor],
) -> None:
    """Write the factors of one part's layer into those of the sum.

    A segment of the sum holds `blocks` blocks of the part. The blocks lie on the diagonal of two axes of blocks: rows
    of a block meet columns of the same block.
    """
    split, blocks, rank = total.split, spec.split // total.split, spec.segment_rank
    rows = slice(place.first, place.first + blocks * rank)
    a = out[f"{path}.sera_a"].view(split, blocks, spec.d_in // spec.split, total.segment_rank)
    a = a[..., rows].unflatten(-1, (blocks, rank)).diagonal(dim1=1, dim2=3)
    a.copy_(tensors[f"{path}.sera_a"].view(split, blocks, -1, rank).permute(0, 2, 3, 1))
    b = out[f"{path}.sera_b"][rows].view(blocks, rank, split, blocks, -1).diagonal(dim1=0, dim2=3)
    part = tensors[f"{path}.sera_b"].to(torch.float64, copy=True).mul_(place.ratio).float()
    b.copy_(part.view(rank, split, blocks, -1).permute(0, 1, 3, 2))
    if total.use_mixer:
        segments = (split, total.segment_rank)
        c = out[f"{path}.sera_c"].view(*segments, *segments)[:, rows, :, rows]
        own = tensors[f"{path}.sera_c"] if spec.use_mixer else torch.eye(spec.rank)
        c.copy_(own.view(split, blocks * rank, split, blocks * rank))


def _zeros(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of zeros in one buffer, which goes back to the system as a whole."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    if not sizes:
        return {}
    data = torch.frombuffer(writable_memory(sum(sizes) * dtype.itemsize), dtype=dtype)
    parts = zip(shapes.items(), data.split(sizes), strict=True)
    return {name: part.view(shape) for (name, shape), part in parts}


def _is_head(name: str) -> bool:
    return name.startswith("head.")


def _paths(configs: Sequence[AdapterConfig]) -> list[str]:
    """Every layer that a part adapts, in the order of the parts."""
    return list(dict.fromkeys(path for config in configs for path in config.modules))


def _templates(configs: Sequence[AdapterConfig]) -> set[str]:
    return {config.chat_template for config in configs if config.chat_template is not None}


def _config(
    configs: Sequence[AdapterConfig], modules: dict[str, ModuleSpec], training: Mapping[str, JsonValue]
) -> AdapterConfig:
    first = configs[0]
    return AdapterConfig(
        task=first.task,
        method=_method(configs, modules),
        base=first.base,
        modules=modules,
        labels=first.labels,
        pooling=first.pooling,
        max_length=first.max_length,
        training=dict(training),
        chat_template=next(iter(_templates(configs)), None),
        head=first.head,
        multi_label=first.multi_label,
        image=first.image,
    )


def _method(configs: Sequence[AdapterConfig], modules: Mapping[str, ModuleSpec]) -> Method:
    methods = {config.method for config in configs} - {"head-only"}
    if not modules:
        return "head-only"
    if len(methods) == 1:
        return methods.pop()
    is_lora = all(spec.split == 1 and not spec.use_mixer for spec in modules.values())
    return "lora" if is_lora else "sera"


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
