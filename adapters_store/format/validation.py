"""Checks of a bundle: exactly the tensors that its configuration calls for, all finite, and made for the base model."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from adapters_store.errors import (
    MissingTensor,
    NotFinite,
    UnexpectedTensor,
    UnknownModule,
    WrongBase,
    WrongDtype,
    WrongShape,
)
from adapters_store.format.config import AdapterConfig, BaseInfo
from adapters_store.format.tensor_table import DTYPE_NAMES

Shape = tuple[int, ...]

# A step's workspace has tokens * rank numbers a layer. With many segments, a small file can name a huge rank. A rank
# above the narrower width of a layer computes nothing more; a sum of adapters has the sum of their ranks.
_RANK_OF_WIDTH = 2
# The highest rank of a training job may be trained, and served, on any base.
_ANY_WIDTH = 256

MOST_RANK = 4096
"""The highest rank of a layer that is trained or served. A GPU's kernels are compiled for no higher one, and a store is
read by servers on any device."""


def expected_shapes(config: AdapterConfig) -> dict[str, Shape]:
    """The name and shape of every tensor of an adapter.

    For each adapted layer P: `P.sera_a` (d_in, segment_rank), `P.sera_c` (rank, rank) with the mixer, `P.sera_b`
    (segment_rank, d_out), `P.gain` (d_out,) with a gain, `P.offset` (d_out,) with an offset. For a task with a head
    `head.weight` (rows, hidden) and `head.bias` (rows,): a row for each label, one for a regression. With a hidden
    layer in the head `head.dense.weight` (width, hidden), `head.dense.bias` (width,), and then `head.weight` is
    (rows, width).
    """
    shapes: dict[str, Shape] = {}
    for path, spec in config.modules.items():
        shapes[f"{path}.sera_a"] = (spec.d_in, spec.segment_rank)
        if spec.use_mixer:
            shapes[f"{path}.sera_c"] = (spec.rank, spec.rank)
        shapes[f"{path}.sera_b"] = (spec.segment_rank, spec.d_out)
        if spec.has_gain:
            shapes[f"{path}.gain"] = (spec.d_out,)
        if spec.has_offset:
            shapes[f"{path}.offset"] = (spec.d_out,)
    if config.has_head:
        width = config.base.hidden_size
        if config.head is not None:
            shapes["head.dense.weight"] = (config.head.width, width)
            shapes["head.dense.bias"] = (config.head.width,)
            width = config.head.width
        shapes["head.weight"] = (config.num_labels, width)
        shapes["head.bias"] = (config.num_labels,)
    return shapes


def check_names_and_shapes(config: AdapterConfig, shapes: Mapping[str, Shape]) -> None:
    """Compare what is there with what the configuration calls for.

    Raises:
        MissingTensor, UnexpectedTensor, WrongShape: `param` is the tensor's name.
    """
    expected = expected_shapes(config)
    for name in expected:
        if name not in shapes:
            raise MissingTensor(f"tensor {name!r} {expected[name]} is missing", param=name)
    for name, shape in shapes.items():
        if name not in expected:
            raise UnexpectedTensor(
                f"tensor {name!r} is not called for by adapter_config; remove it or describe it in modules",
                param=name,
            )
        if shape != expected[name]:
            raise WrongShape(
                f"tensor {name!r} has shape {shape}; adapter_config calls for {expected[name]}", param=name
            )


def rank_fault(path: str, rank: int, d_in: int, d_out: int) -> str | None:
    """What is wrong with a layer's rank. None for nothing.

    A rank is at most `MOST_RANK`, and at most 256 or twice the wider of the layer's widths.
    """
    most = min(MOST_RANK, max(_ANY_WIDTH, _RANK_OF_WIDTH * max(d_in, d_out)))
    if rank <= most:
        return None
    of = "any layer" if most == MOST_RANK else f"a layer of widths {d_in} and {d_out}"
    return (
        f"the rank {rank} of {path} is more than {most}, the most for {of}; train or compress the adapter with a "
        "smaller rank"
    )


def check_values(tensors: Mapping[str, Tensor]) -> None:
    """Every tensor is float32, float16 or bfloat16, and finite in every element.

    Raises:
        WrongDtype, NotFinite: `param` is the tensor's name.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise WrongDtype(f"tensor {name!r} has dtype {tensor.dtype}; use F32, F16 or BF16", param=name)
        if not is_surely_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            if not bad:
                continue
            raise NotFinite(
                f"tensor {name!r} holds NaN or infinity in {bad} of {tensor.numel()} elements; "
                "train again with a lower learning rate",
                param=name,
            )


# The bits of the exponent. All of them are set in infinities and NaN, and in no other value.
_EXPONENTS = {torch.bfloat16: np.int16(0x7F80), torch.float16: np.int16(0x7C00)}
_BLOCK = 1 << 20


def is_surely_finite(tensor: Tensor) -> bool:
    """Quick check: True means that every element is finite. False means that each element must be looked at."""
    if tensor.dtype in _EXPONENTS and tensor.numel():
        # Ten times as fast as a sum, which torch converts element by element; in blocks, to spare memory.
        bits, exponent = tensor.reshape(-1).view(torch.int16).numpy(), _EXPONENTS[tensor.dtype]
        blocks = (bits[start : start + _BLOCK] for start in range(0, len(bits), _BLOCK))
        return all((block & exponent).max() < exponent for block in blocks)
    return math.isfinite(tensor.sum(dtype=torch.float32).item())


def check_same_base(theirs: BaseInfo, ours: BaseInfo) -> None:
    """Refuse an adapter of the base `theirs` on the base `ours`; their names are not compared.

    Raises:
        WrongBase: `param` is the field of adapter_config at fault.
    """
    for field in ("architecture", "hidden_size", "config_digest", "weights_digest"):
        if getattr(theirs, field) != getattr(ours, field):
            raise WrongBase(
                f"the adapter was made for base {theirs.name!r} ({field} {getattr(theirs, field)}), the base here is "
                f"{ours.name!r} ({getattr(ours, field)}); train it again on this base",
                param=f"adapter_config.base.{field}",
            )


def check_base(config: AdapterConfig, base: BaseInfo, module_shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse an adapter that was made for another base model than `base`.

    Args:
        config: The adapter's configuration.
        base: Identity of the base that would serve it; its `name` is not compared.
        module_shapes: (d_in, d_out) of every linear layer of that base, by path.

    Raises:
        WrongBase, UnknownModule, WrongShape: `param` is the field of adapter_config at fault.
    """
    check_same_base(config.base, base)
    for path, spec in config.modules.items():
        param = f"adapter_config.modules.{path}"
        if path not in module_shapes:
            raise UnknownModule(f"the base has no linear layer {path!r}", param=param)
        if (spec.d_in, spec.d_out) != tuple(module_shapes[path]):
            raise WrongShape(
                f"layer {path!r} is {tuple(module_shapes[path])} in the base, {(spec.d_in, spec.d_out)} in the adapter",
                param=param,
            )
